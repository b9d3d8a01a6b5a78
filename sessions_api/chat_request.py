"""What a caller of /pro/chat/completions asks: JSON or a form, each field looked at and named where it is wrong."""

from __future__ import annotations

import asyncio
import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from django.conf import settings

from gateway import headers as wire
from gateway.asgi import Receive, Scope
from gateway.endings import ClientLeftError
from proxysite.envelope import ProError
from sessions_api import wording
from sessions_api.models import MODEL_MAX_CHARS, SESSION_ID_MAX_CHARS

API_KEY_MAX_CHARS = 256
_API_KEY = re.compile(r"[!-~]+")
_FORM = b"application/x-www-form-urlencoded"
_JSON = (b"application/json", b"text/json", b"text/plain", b"")
_FLAGS = {"true": True, "1": True, "false": False, "0": False, "": False}
_BODY_LEAST_BYTES = 64 * 1024
# A character of four bytes in UTF-8, percent-encoded or as two \u escapes.
_CHAR_MOST_BYTES = 12
_BODY_SECONDS = 30.0
_MOST_FIELDS = 100


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One message of a caller's. `api_key` is printable ASCII; `content` and `session_id` are valid Unicode."""

    api_key: bytes
    session_id: str
    content: str
    model: str
    is_stream: bool


async def read_request(scope: Scope, receive: Receive) -> ChatRequest:
    """Return what is asked. Raises ProError 400, 408, 413 or 415, ClientLeftError."""
    content_type = b""
    for name, value in scope["headers"]:
        if name == b"content-type":
            content_type = value.partition(b";")[0].strip().lower()
    parse = _parser_for(content_type)
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            body = await _whole_body(receive)
    except TimeoutError:
        raise ProError(408, wording.BODY_TOO_SLOW) from None
    return _request(parse(body), bearer_key=wire.bearer_key(scope["headers"]))


async def _whole_body(receive: Receive) -> bytes:
    most_bytes = max(_BODY_LEAST_BYTES, _CHAR_MOST_BYTES * settings.SESSION_CONTENT_MAX_CHARS + 16 * 1024)
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeftError
        body += message["body"]
        if len(body) > most_bytes:
            raise ProError(413, wording.BODY_TOO_LARGE)
        if not message["more_body"]:
            return bytes(body)


def _parser_for(content_type: bytes) -> Callable[[bytes], Mapping[str, Any]]:
    if content_type == _FORM:
        return _form_fields
    if content_type in _JSON or content_type.endswith(b"+json"):
        return json_fields
    raise ProError(415, wording.WRONG_TYPE)


def checked_api_key(bearer_key: bytes) -> bytes:
    """Return what may be a key, as /pro/chat/completions takes it. Raises ProError 400."""
    return _api_key({}, bearer_key)


def checked_session_id(session_id: str) -> str:
    """Return what may be a session's name. Raises ProError 400."""
    return _plain({"sessionId": session_id}, "sessionId", SESSION_ID_MAX_CHARS)


def model_in(fields: Mapping[str, Any]) -> str:
    """Return the model that is named, SESSIONS_MODEL if there is none. Raises ProError 400."""
    return _plain(fields, "model", MODEL_MAX_CHARS, default=settings.SESSIONS_MODEL)


def json_fields(body: bytes) -> Mapping[str, Any]:
    try:
        fields = json.loads(body.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise ProError(400, wording.NOT_JSON) from None
    if not isinstance(fields, dict):
        raise ProError(400, wording.NOT_JSON)
    return fields


def _form_fields(body: bytes) -> Mapping[str, Any]:
    try:
        fields = dict(
            parse_qsl(
                # Not ASCII alone: `curl -d` and its like send Chinese as it is typed.
                body.decode(),
                keep_blank_values=True,
                encoding="utf-8",
                errors="strict",
                max_num_fields=_MOST_FIELDS,
            )
        )
    except ValueError:
        raise ProError(400, wording.NOT_A_FORM) from None
    stream = fields.get("stream")
    return fields | {"stream": _FLAGS.get(stream.lower(), stream)} if stream is not None else fields


def _request(fields: Mapping[str, Any], *, bearer_key: bytes) -> ChatRequest:
    return ChatRequest(
        api_key=_api_key(fields, bearer_key),
        session_id=_plain(fields, "sessionId", SESSION_ID_MAX_CHARS),
        content=_text(fields, "content", settings.SESSION_CONTENT_MAX_CHARS),
        model=model_in(fields),
        is_stream=_flag(fields, "stream"),
    )


def _api_key(fields: Mapping[str, Any], bearer_key: bytes) -> bytes:
    given = fields.get("apiKey")
    if given is None and bearer_key:
        given = bearer_key.decode("latin-1")
    if isinstance(given, str):
        given = given.strip()
    api_key = _text({"apiKey": given}, "apiKey", API_KEY_MAX_CHARS)
    if not _API_KEY.fullmatch(api_key):
        raise ProError(400, wording.field_characters("apiKey"))
    return api_key.encode()


def _plain(fields: Mapping[str, Any], name: str, most_chars: int, *, default: str | None = None) -> str:
    """Return a text without control characters: it stands in the database and in the admin as it is."""
    text = _text(fields, name, most_chars, default=default)
    if any(unicodedata.category(char) == "Cc" for char in text):
        raise ProError(400, wording.field_characters(name))
    return text


def _text(fields: Mapping[str, Any], name: str, most_chars: int, *, default: str | None = None) -> str:
    """Return a field of 1 to so many characters, each a code point."""
    text = fields.get(name)
    if text is None:
        text = default
    if text is None:
        raise ProError(400, wording.field_missing(name))
    if not isinstance(text, str):
        raise ProError(400, wording.field_not_text(name))
    if not 1 <= len(text) <= most_chars:
        raise ProError(400, wording.field_length(name, most_chars))
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        raise ProError(400, wording.field_characters(name)) from None
    return text


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise ProError(400, wording.field_not_a_flag(name))
    return value
