"""Models and networks that a key is bound to, through the live proxy, with both stores of limits."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai import OpenAI

from gateway.tests.fake_upstream import FakeUpstream
from gateway.tests.limited import CHAT, FREE, MODELS, NETWORKS, ask, error_of
from gateway.tests.live import LiveProxy


@pytest.fixture
def upstream(answering_upstream: FakeUpstream) -> FakeUpstream:
    return answering_upstream


@pytest.fixture
def proxy(limited: LiveProxy) -> LiveProxy:
    return limited


def test_models_that_a_key_may_not_use_are_refused(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    assert ask(proxy, MODELS).status_code == 200
    assert ask(proxy, MODELS, json={"model": "o3-pro"}).status_code == 200
    for body in ({"model": "gpt-4o"}, {"model": ""}, {"model": None}, {"model": ["gpt-4o-mini"]}):
        assert error_of(ask(proxy, MODELS, json=body)) == (403, "invalid_request_error", "model_not_allowed")
    assert len(upstream.requests) == 2
    with pytest.raises(openai.PermissionDeniedError):
        OpenAI(api_key=MODELS, base_url=f"{proxy.url}/v1").chat.completions.create(**CHAT | {"model": "gpt-4o"})
    headers = {"authorization": f"Bearer {MODELS}"}
    assert proxy.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "gpt-4o-mini", "model": "gpt-4o"}',
        b'{"mod\\u0065l": "gpt-4o"}',
        b'{"x": {"model": "gpt-4o-mini"}, "model": "gpt-4o"}',
        b"\xef\xbb\xbf" + b'{"x": "gpt-4o-mini", "model": "gpt-4o"}',
        b'{"model": "gpt-4o-mini"',
        b"[]",
        b"",
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1//chat/./completions", "/v1/videos", "/v1/batches"])
def test_no_spelling_of_a_body_or_path_gets_another_model(
    proxy: LiveProxy, upstream: FakeUpstream, body: bytes, path: str
) -> None:
    headers = {"authorization": f"Bearer {MODELS}", "content-type": "application/json"}
    response = proxy.post(path, content=body, headers=headers)
    assert response.status_code in (400, 403)
    assert not upstream.requests


def form(*fields: tuple[str, bytes]) -> bytes:
    parts = [
        b"--b\r\ncontent-disposition: form-data; %b\r\n\r\n%b\r\n" % (name.encode(), value) for name, value in fields
    ]
    return b"".join(parts) + b"--b--\r\n"


FILE = ('name="file"; filename="a.mp3"', b"\0" * 300_000)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ([('name="model"', b"gpt-4o-mini"), FILE], 200),
        ([FILE, ('name="model"', b"gpt-4o-mini")], 200),
        ([FILE, ('name="model"', b"whisper-1")], 403),
        ([FILE], 403),
        ([('name="model"', b"gpt-4o-mini"), FILE, ('name="model"', b"whisper-1")], 403),
        ([('name="model"', b"gpt-4o-mini"), FILE, ("name=model", b"whisper-1")], 403),
    ],
)
@pytest.mark.parametrize("is_chunked", [False, True])
def test_the_model_of_a_form_is_seen_wherever_it_stands(
    proxy: LiveProxy, upstream: FakeUpstream, fields: Any, status: int, is_chunked: bool
) -> None:
    body = form(*fields)
    content: Any = iter([body[start : start + 50_000] for start in range(0, len(body), 50_000)]) if is_chunked else body
    headers = {"authorization": f"Bearer {MODELS}", "content-type": "multipart/form-data; boundary=b"}
    response = proxy.post("/v1/audio/transcriptions", content=content, headers=headers)
    assert response.status_code == status
    assert len(upstream.requests) == (status == 200)
    if status == 200:
        assert bytes(upstream.requests[0].body) == body


def test_a_second_model_behind_megabytes_does_not_reach_the_upstream_whole(
    proxy: LiveProxy, upstream: FakeUpstream
) -> None:
    large = ('name="file"; filename="a.mp3"', b"\0" * (6 << 20))
    body = form(('name="model"', b"gpt-4o-mini"), large, ('name="model"', b"whisper-1"))
    headers = {"authorization": f"Bearer {MODELS}", "content-type": "multipart/form-data; boundary=b"}
    response = proxy.post("/v1/audio/transcriptions", content=body, headers=headers)
    assert error_of(response) == (403, "invalid_request_error", "model_not_allowed")
    assert not any(request.complete for request in upstream.requests)


def test_files_need_no_model_and_large_bodies_must_show_theirs(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    headers = {"authorization": f"Bearer {MODELS}"}
    assert proxy.post("/v1/files", headers=headers, files={"file": b"x" * 100}).status_code == 200
    response = ask(proxy, MODELS, json={"x": "y" * (5 << 20)})
    assert error_of(response) == (413, "invalid_request_error", "request_too_large")
    assert len(upstream.requests) == 1


def test_a_key_passes_from_its_networks_only(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    def status_from(*forwarded: str) -> int:
        headers = [("authorization", f"Bearer {NETWORKS}"), *(("x-forwarded-for", said) for said in forwarded)]
        return proxy.get("/v1/models", headers=headers).status_code

    assert status_from("192.0.2.9") == 200
    assert status_from("6.6.6.6, 192.0.2.9") == 200
    assert status_from("2001:db8::9") == 200
    assert status_from("192.0.2.9, 6.6.6.6") == 403
    assert status_from("192.0.3.9") == 403
    assert status_from() == 403
    assert len(upstream.requests) == 3
    assert all(request.value("x-forwarded-for") is None for request in upstream.requests)


def test_two_authorization_fields_are_none(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    headers = [("authorization", f"Bearer {FREE}"), ("authorization", f"Bearer {NETWORKS}")]
    assert proxy.get("/v1/models", headers=headers).status_code == 400
    assert not upstream.requests


def test_a_conversation_is_bound_to_networks_and_models(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    body = {"apiKey": NETWORKS, "sessionId": "s", "content": "hello"}
    refused = proxy.post("/pro/chat/completions", json=body)
    assert (refused.status_code, refused.json()["message"]) == (403, "不允许从您的网络地址使用该密钥")
    refused = proxy.post("/pro/chat/completions", json=body | {"apiKey": MODELS, "model": "gpt-4o"})
    assert (refused.status_code, refused.json()["message"]) == (403, "该密钥不允许使用此模型")
    assert not upstream.requests
