"""What a route is given, what it gives back, and how both stand on the wire. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gateway.sandbox.fields import Fields, SandboxError
from gateway.sandbox.trouble import Manner

Json = dict[str, Any]
Header = tuple[bytes, bytes]

# 2025-01-01T00:00:00Z stands for every point in time: the same request must get the same answer.
CREATED = 1_735_689_600

JSON_TYPE = "application/json"
EVENT_STREAM_TYPE = "text/event-stream; charset=utf-8"
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Upload:
    """One file of a multipart form; `field` without a trailing `[]`."""

    field: str
    filename: str
    content_type: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Call:
    """One request, read: `arguments` are what stood in the path's `{…}`, percent-decoded.

    `seed` is a digest of everything in the request that can change the answer's content. Whether the answer
    is streamed is not in it, so both forms of one question have one id.
    """

    method: str
    arguments: tuple[str, ...]
    query: Mapping[str, str]
    fields: Fields
    uploads: tuple[Upload, ...]
    seed: bytes

    def id(self, prefix: str, *parts: object, length: int = 24) -> str:
        """Return prefix + hex digits that follow from the request and from `parts`, e.g. a choice's index."""
        digest = hashlib.sha256(self.seed)
        digest.update(repr((prefix, *parts)).encode())
        return prefix + digest.hexdigest()[:length]

    def upload(self, field: str) -> Upload:
        """Return the first file of that form field; SandboxError 400 when there is none."""
        for upload in self.uploads:
            if upload.field == field:
                return upload
        raise SandboxError(
            400, f"Missing required parameter: '{field}'.", param=field, code="missing_required_parameter"
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer. With `events` it is a stream and `body` stays empty: one item is one chunk on the wire."""

    status: int
    content_type: str
    body: bytes = b""
    events: tuple[bytes, ...] = ()
    headers: tuple[Header, ...] = ()
    manner: Manner = Manner.PLAIN


def encode(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def json_answer(value: object, status: int = 200) -> Answer:
    return Answer(status, JSON_TYPE, encode(value))


def sse(value: Json, *, named: bool = False) -> bytes:
    """Return one SSE event; `named` puts the object's `type` on an `event:` line, as the newer routes do."""
    name = b"event: " + str(value["type"]).encode() + b"\n" if named else b""
    return name + b"data: " + encode(value) + b"\n\n"


def event_stream(events: Iterable[bytes]) -> Answer:
    return Answer(200, EVENT_STREAM_TYPE, events=tuple(events))


def error_object(error: SandboxError) -> Json:
    return {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}


def error_answer(error: SandboxError) -> Answer:
    body = encode({"error": error_object(error)})
    return Answer(error.status, JSON_TYPE, body, headers=error.headers)


_STANDING_HEADERS: tuple[Header, ...] = (
    (b"openai-organization", b"sandbox"),
    (b"openai-processing-ms", b"12"),
    (b"openai-version", b"2020-10-01"),
    (b"x-ratelimit-limit-requests", b"10000"),
    (b"x-ratelimit-limit-tokens", b"200000"),
    (b"x-ratelimit-remaining-requests", b"9999"),
    (b"x-ratelimit-remaining-tokens", b"199000"),
    (b"x-ratelimit-reset-requests", b"6ms"),
    (b"x-ratelimit-reset-tokens", b"300ms"),
)


def head_of(answer: Answer, *, request_id: str) -> list[Header]:
    """Return the answer's headers as OpenAI sends them; a header of the answer replaces the standing one."""
    head: list[Header] = [(b"content-type", answer.content_type.encode())]
    if not answer.events:
        head.append((b"content-length", str(len(answer.body)).encode()))
    own = {name for name, _ in answer.headers}
    head.append((b"x-request-id", request_id.encode()))
    head.extend(header for header in _STANDING_HEADERS if header[0] not in own)
    head.extend(answer.headers)
    return head
