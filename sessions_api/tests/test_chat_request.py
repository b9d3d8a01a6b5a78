"""Each field of a request, right and wrong."""

from __future__ import annotations

import contextlib
import json
from typing import Any
from urllib.parse import urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pytest_django import Settings

from gateway.endings import ClientLeftError
from proxysite.envelope import ProError
from sessions_api.chat_request import ChatRequest, read_request

RIGHT = {"apiKey": "sk-abc", "sessionId": "s", "content": "hello"}
JSON, FORM = "application/json", "application/x-www-form-urlencoded"


async def read(body: bytes, content_type: str = JSON, *, bearer: str = "", parts: int = 1) -> ChatRequest:
    headers = [(b"content-type", content_type.encode())] if content_type else []
    if bearer:
        headers.append((b"authorization", b"Bearer " + bearer.encode()))
    size = max(1, len(body) // parts)
    pieces = [body[start : start + size] for start in range(0, len(body), size)] or [b""]
    messages = [
        {"type": "http.request", "body": piece, "more_body": number < len(pieces)}
        for number, piece in enumerate(pieces, start=1)
    ]

    async def receive() -> Any:
        return messages.pop(0)

    return await read_request({"headers": headers}, receive)


async def read_json(**changed: Any) -> ChatRequest:
    fields = {name: value for name, value in {**RIGHT, **changed}.items() if value is not ...}
    return await read(json.dumps(fields).encode())


async def refusal(body: bytes, content_type: str = JSON) -> ProError:
    with pytest.raises(ProError) as raised:
        await read(body, content_type)
    return raised.value


async def test_the_least_that_is_asked() -> None:
    expected = ChatRequest(b"sk-abc", "s", "hello", "gpt-3.5-turbo", False)
    for parts in (1, 3, 50):
        assert await read(json.dumps(RIGHT).encode(), parts=parts) == expected
    assert await read(urlencode(RIGHT).encode(), FORM) == expected


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON", "text/plain", ""])
async def test_json_goes_by_several_names(content_type: str) -> None:
    assert (await read(b"\xef\xbb\xbf" + json.dumps(RIGHT).encode(), content_type)).content == "hello"


async def test_all_fields() -> None:
    request = await read_json(model="gpt-4o", stream=True, unknown=[1])
    assert request == ChatRequest(b"sk-abc", "s", "hello", "gpt-4o", True)


@pytest.mark.parametrize(
    ("value", "is_stream"), [("true", True), ("1", True), ("TRUE", True), ("false", False), ("", False)]
)
async def test_a_form_says_true_in_words(value: str, is_stream: bool) -> None:
    assert (await read(urlencode(RIGHT | {"stream": value}).encode(), FORM)).is_stream is is_stream


async def test_a_form_may_hold_text_that_nobody_has_encoded() -> None:
    request = await read("apiKey=sk-abc&sessionId=会话&content=1+1 等于几？%E4%BD%A0😀".encode(), FORM)
    assert (request.session_id, request.content) == ("会话", "1 1 等于几？你😀")


async def test_the_key_may_come_as_bearer() -> None:
    body = {"sessionId": "s", "content": "x"}
    assert (await read(json.dumps(body).encode(), bearer="sk-bearer")).api_key == b"sk-bearer"
    both = await read(json.dumps(body | {"apiKey": " sk-body\n"}).encode(), bearer="sk-bearer")
    assert both.api_key == b"sk-body"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("apiKey", ..., "apiKey is missing."),
        ("apiKey", None, "apiKey is missing."),
        ("apiKey", 7, "apiKey must be a string."),
        ("apiKey", "", "apiKey must have 1 to 256 characters."),
        ("apiKey", " ", "apiKey must have 1 to 256 characters."),
        ("apiKey", "k" * 257, "apiKey must have 1 to 256 characters."),
        ("apiKey", "sk-a b", "apiKey holds characters that are not allowed."),
        ("apiKey", "sk-a\r\nx: y", "apiKey holds characters that are not allowed."),
        ("apiKey", "密钥", "apiKey holds characters that are not allowed."),
        ("sessionId", ..., "sessionId is missing."),
        ("sessionId", ["s"], "sessionId must be a string."),
        ("sessionId", "", "sessionId must have 1 to 64 characters."),
        ("sessionId", "s" * 65, "sessionId must have 1 to 64 characters."),
        ("sessionId", "a\0b", "sessionId holds characters that are not allowed."),
        ("sessionId", "a\ud800", "sessionId holds characters that are not allowed."),
        ("content", ..., "content is missing."),
        ("content", {}, "content must be a string."),
        ("content", "", "content must have 1 to 1000 characters."),
        ("content", "x" * 1001, "content must have 1 to 1000 characters."),
        ("content", "half \udc00", "content holds characters that are not allowed."),
        ("model", "", "model must have 1 to 128 characters."),
        ("model", 4, "model must be a string."),
        ("model", "a\n", "model holds characters that are not allowed."),
        ("stream", "true", "stream must be true or false."),
        ("stream", 1, "stream must be true or false."),
    ],
)
async def test_a_wrong_field_is_named(name: str, value: object, message: str) -> None:
    with pytest.raises(ProError) as raised:
        await read_json(**{name: value})
    assert (raised.value.status, raised.value.message.en) == (400, message)
    assert name in raised.value.message.zh


async def test_a_wrong_word_in_a_form_is_named() -> None:
    error = await refusal(urlencode(RIGHT | {"stream": "maybe"}).encode(), FORM)
    assert error.message.en == "stream must be true or false."


@pytest.mark.parametrize("char", ["x", "é", "中", "😀", "\n"])
async def test_content_is_counted_in_code_points(char: str) -> None:
    assert len((await read_json(content=char * 1000)).content) == 1000
    assert (await read(urlencode(RIGHT | {"content": char * 1000}).encode(), FORM)).content == char * 1000
    with pytest.raises(ProError):
        await read_json(content=char * 1001)


async def test_the_limit_of_content_is_a_setting(settings: Settings) -> None:
    settings.SESSION_CONTENT_MAX_CHARS = 100_000
    assert len((await read_json(content="😀" * 100_000)).content) == 100_000


async def test_the_longest_names_pass() -> None:
    request = await read_json(apiKey="k" * 256, sessionId="会" * 64, model="m" * 128)
    assert (len(request.api_key), len(request.session_id), len(request.model)) == (256, 64, 128)


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b'"x"', b"{", b"\xff\xfe", b"[" * 60_000, b'{"a":' * 10_000])
async def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    error = await refusal(body)
    assert (error.status, error.message.en) == (400, "The request body is not a JSON object.")


@pytest.mark.parametrize("body", [b"content=%ff", b"content=\xff", b"&".join([b"a=b"] * 101)])
async def test_what_is_no_form_is_refused(body: bytes) -> None:
    error = await refusal(body, FORM)
    assert (error.status, error.message.en) == (400, "The request body is not a valid form.")


@pytest.mark.parametrize("content_type", ["multipart/form-data; boundary=x", "text/xml", "application/jsonp"])
async def test_other_types_are_refused(content_type: str) -> None:
    assert (await refusal(json.dumps(RIGHT).encode(), content_type)).status == 415


async def test_a_body_beyond_all_bounds_is_refused() -> None:
    assert (await refusal(b" " * 70_000)).status == 413


async def test_a_client_that_leaves_is_noticed() -> None:
    async def receive() -> Any:
        return {"type": "http.disconnect"}

    with pytest.raises(ClientLeftError):
        await read_request({"headers": []}, receive)


@given(st.binary(max_size=200), st.sampled_from([JSON, FORM]))
async def test_no_body_is_too_strange(body: bytes, content_type: str) -> None:
    with contextlib.suppress(ProError):
        await read(body, content_type)
