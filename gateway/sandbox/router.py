"""One request's bytes in, one answer out: which route, read how, refused by which model. No I/O, no clock."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qsl, unquote

import msgspec

from gateway.sandbox.fields import Fields, SandboxError
from gateway.sandbox.multipart import parse_form
from gateway.sandbox.routes import (
    audio,
    chat,
    completions,
    embeddings,
    files,
    images,
    models,
    moderations,
    responses,
)
from gateway.sandbox.shelf import Stock
from gateway.sandbox.trouble import manner_of, refusal_by
from gateway.sandbox.wire import Answer, Call, Upload, encode, error_answer

_Handler = Callable[[Call, Stock], Answer]

_ROUTES: dict[str, dict[str, _Handler]] = {
    "/v1/models": {"GET": models.list_models},
    "/v1/models/{}": {"GET": models.retrieve},
    "/v1/chat/completions": {"POST": chat.create},
    "/v1/completions": {"POST": completions.create},
    "/v1/responses": {"POST": responses.create},
    "/v1/responses/input_tokens": {"POST": responses.input_tokens},
    "/v1/responses/{}": {"GET": responses.retrieve, "DELETE": responses.delete},
    "/v1/responses/{}/input_items": {"GET": responses.input_items},
    "/v1/embeddings": {"POST": embeddings.create},
    "/v1/images/generations": {"POST": images.generate},
    "/v1/images/edits": {"POST": images.edit},
    "/v1/images/variations": {"POST": images.vary},
    "/v1/audio/speech": {"POST": audio.speak},
    "/v1/audio/transcriptions": {"POST": audio.transcribe},
    "/v1/audio/translations": {"POST": audio.translate},
    "/v1/moderations": {"POST": moderations.create},
    "/v1/files": {"GET": files.list_files, "POST": files.upload},
    "/v1/files/{}": {"GET": files.retrieve, "DELETE": files.delete},
    "/v1/files/{}/content": {"GET": files.content},
}
_BY_STEPS = {tuple(path.split("/")): methods for path, methods in _ROUTES.items()}
# Values of JSON cost far more memory and time than their bytes: 30 MB of `{},` cost 800 MB and 5 seconds. No two
# values stand without a comma between them, and commas are cheap to count.
MOST_COMMAS = 500_000
# Not part of what makes one answer another: `chatcmpl-…` is the same, streamed or not.
_FORM_OF_ANSWER = ("stream", "stream_options", "stream_format")


class Sandbox:
    """The practice upstream behind both of its seams; what it keeps, it keeps in `stock`."""

    def __init__(self) -> None:
        self.stock = Stock()

    def answer(self, method: str, target: bytes, content_type: bytes, body: bytes) -> Answer:
        """Return the answer, errors included; `target` is path?query as the client sent it."""
        try:
            return self._answer(method, target, content_type, body)
        except SandboxError as error:
            return error_answer(error)
        except RecursionError:
            return error_answer(SandboxError(400, "The request's JSON is too deeply nested.", code="invalid_json"))

    def _answer(self, method: str, target: bytes, content_type: bytes, body: bytes) -> Answer:
        raw_path, _, raw_query = target.partition(b"?")
        path = raw_path.decode("ascii", errors="replace")
        handler, arguments = _route(method, path)
        query = dict(parse_qsl(raw_query.decode("ascii", errors="replace"), keep_blank_values=True))
        fields, uploads = _read_body(content_type, body) if method == "POST" else (Fields({}), ())
        call = Call(method, arguments, query, fields, uploads, seed_of(path, fields.values, uploads))
        model = fields.values.get("model")
        if refusal := refusal_by(model):
            raise refusal
        return replace(handler(call, self.stock), manner=manner_of(model))


def _route(method: str, path: str) -> tuple[_Handler, tuple[str, ...]]:
    """Return the handler and the decoded steps that stand for `{}`; SandboxError 404 or 405."""
    steps = path.split("/")
    methods = _BY_STEPS.get(tuple(steps))
    arguments: tuple[str, ...] = ()
    if methods is None and len(steps) > 3 and steps[3]:
        methods = _BY_STEPS.get((*steps[:3], "{}", *steps[4:]))
        arguments = (unquote(steps[3]),)
    if methods is None:
        raise SandboxError(
            404,
            f"The sandbox does not play {method[:20]} {path[:200]}. It plays: {', '.join(_ROUTES)}.",
            code="unknown_url",
        )
    handler = methods.get("GET" if method == "HEAD" else method)
    if handler is None:
        raise SandboxError(
            405,
            f"Not allowed to {method[:20]} on {path[:200]}.",
            code="method_not_allowed",
            headers=((b"allow", ", ".join(methods).encode()),),
        )
    return handler, arguments


def _read_body(content_type: bytes, body: bytes) -> tuple[Fields, tuple[Upload, ...]]:
    if content_type.lower().startswith(b"multipart/form-data"):
        values, uploads = parse_form(content_type, body)
        return Fields(values, form=True), uploads
    return Fields(decode_object(body)), ()


def decode_object(body: bytes | str) -> dict[str, Any]:
    """Return a JSON object; SandboxError 400 for anything else."""
    commas = body.count(",") if isinstance(body, str) else body.count(b",")
    if commas > MOST_COMMAS:
        raise SandboxError(400, f"The sandbox reads JSON with up to {MOST_COMMAS} commas.", code="request_too_large")
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise SandboxError(
            400, f"We could not parse the JSON body of your request: {exc}.", code="invalid_json"
        ) from exc
    if not isinstance(value, dict):
        raise SandboxError(400, "The JSON body of your request must be an object.", code="invalid_json")
    return value


def seed_of(path: str, values: Mapping[str, Any], uploads: tuple[Upload, ...]) -> bytes:
    """Return a digest of the request by its meaning: a form's boundary and the order of keys do not count."""
    digest = hashlib.blake2b(path.encode(), digest_size=32)
    for name in sorted(set(values).difference(_FORM_OF_ANSWER)):
        digest.update(encode([name, values[name]]))
    for upload in uploads:
        digest.update(encode([upload.field, upload.filename, len(upload.content)]))
        digest.update(upload.content)
    return digest.digest()
