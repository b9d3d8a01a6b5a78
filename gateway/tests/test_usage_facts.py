from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.endpoints import endpoint_of
from gateway.usage import RequestFacts, multipart_facts, prompt_sample, request_facts


def short_id(value: object) -> str:
    return repr(value)[:40]


CHAT = endpoint_of("POST", b"/v1/chat/completions")
SPEECH = endpoint_of("POST", b"/v1/audio/speech")


@pytest.mark.parametrize(
    ("body", "facts"),
    [
        ({}, RequestFacts()),
        ({"model": "gpt-4o", "messages": []}, RequestFacts("gpt-4o")),
        ({"model": "gpt-4o", "stream": True, "n": 3}, RequestFacts("gpt-4o", is_stream=True, choices=3)),
        (
            {"model": "gpt-4o", "stream": True, "stream_options": {"include_usage": True}, "service_tier": "flex"},
            RequestFacts("gpt-4o", "flex", is_stream=True, has_stream_options=True, includes_usage=True),
        ),
        ({"stream": True, "stream_options": None}, RequestFacts(is_stream=True, has_stream_options=True)),
        ({"stream_options": {"include_usage": "yes"}}, RequestFacts(has_stream_options=True)),
        ({"stream_options": {"include_usage": False}}, RequestFacts(has_stream_options=True)),
        ({"background": True, "model": "o3"}, RequestFacts("o3", in_background=True)),
        ({"stream": "true", "n": None, "model": None, "service_tier": 7}, RequestFacts()),
        ({"model": "x" * 500}, RequestFacts("x" * 100)),
        ({"model": "a\u0000b\n"}, RequestFacts("ab")),
        ({"n": -5}, RequestFacts()),
        ({"n": 10**30}, RequestFacts(choices=1024)),
        ({"x": {"model": "inner", "stream": True}}, RequestFacts()),
        ({"input": "not counted here"}, RequestFacts()),
    ],
    ids=short_id,
)
def test_a_request_tells_its_facts(body: dict[str, Any], facts: RequestFacts) -> None:
    assert request_facts(CHAT, json.dumps(body).encode()) == facts


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"7", b"\xef\xbb\xbf{}", b'{"x":NaN}', b"{", b'{"x":' + b"[" * 100_000, b"\xff", b"x=1&y=2"],
    ids=short_id,
)
def test_a_request_that_cannot_be_read_has_no_facts(body: bytes) -> None:
    assert request_facts(CHAT, body) is None


def test_what_shall_be_spoken_is_counted_in_characters() -> None:
    body = {"model": "tts-1", "input": "Grüße, 世界 😀", "voice": "alloy"}
    facts = request_facts(SPEECH, json.dumps(body).encode())
    assert facts is not None
    assert facts.characters == len("Grüße, 世界 😀")
    for odd in (7, None, ["a"], "\ud800"):
        facts = request_facts(SPEECH, json.dumps(body | {"input": odd}).encode())
        assert facts is None or facts.characters == 0


@settings(deadline=None)
@given(st.binary(max_size=200), st.binary(max_size=50))
def test_garbage_is_no_exception(body: bytes, content_type: bytes) -> None:
    request_facts(SPEECH, body)
    prompt_sample(body)
    multipart_facts(body, b"multipart/form-data; boundary=" + content_type, body)


# Multipart

BOUNDARY = b"d41d8cd98f"
CONTENT_TYPE = b"multipart/form-data; boundary=" + BOUNDARY


def part(name: str, value: bytes, *, filename: str = "") -> bytes:
    head = f'Content-Disposition: form-data; name="{name}"' + (f'; filename="{filename}"' if filename else "")
    return b"--%b\r\n%b\r\n\r\n%b\r\n" % (BOUNDARY, head.encode(), value)


END = b"--" + BOUNDARY + b"--\r\n"
FILE = part("file", b'\r\n\r\nname="model"\r\n\r\nno\r\n--' + b"\x00" * 100, filename="a.mp3")


@pytest.mark.parametrize("content_type", [CONTENT_TYPE, b'Multipart/Form-Data; Boundary="%b"; x=y' % BOUNDARY])
@pytest.mark.parametrize("file_first", [True, False])
def test_a_form_tells_its_facts(content_type: bytes, file_first: bool) -> None:
    fields = part("model", b"whisper-1") + part("stream", b"True") + part("n", b"2")
    body = (FILE + fields if file_first else fields + FILE) + END
    assert multipart_facts(body, content_type) == RequestFacts("whisper-1", is_stream=True, choices=2)


def test_a_field_behind_a_large_file_is_found_in_the_tail() -> None:
    body = part("file", b"\x00" * 200_000, filename="a.mp3") + part("model", b"whisper-1") + END
    assert multipart_facts(body, CONTENT_TYPE).model == ""
    assert multipart_facts(body[:1000], CONTENT_TYPE, body[-1000:]).model == "whisper-1"
    assert multipart_facts(part("model", b"a") + body, CONTENT_TYPE, body).model == "a"


def test_a_field_that_is_cut_is_no_field() -> None:
    body = part("model", b"gpt-4o-mini\r\n-transcribe") + FILE + END
    seen = {multipart_facts(body[:end], CONTENT_TYPE).model for end in range(len(body))}
    assert seen == {"", "gpt-4o-mini-transcribe"}


@pytest.mark.parametrize("content_type", [b"", b"multipart/form-data", b"application/json", b"x; boundary="])
def test_without_a_boundary_nothing_is_known(content_type: bytes) -> None:
    assert multipart_facts(part("model", b"whisper-1") + END, content_type) == RequestFacts()


def test_a_file_called_model_is_no_model() -> None:
    assert multipart_facts(part("model", b"x", filename="model") + END, CONTENT_TYPE).model == ""


# Prompts


@pytest.mark.parametrize(
    ("body", "text", "messages", "images"),
    [
        ({"prompt": "Say hi"}, "Say hi", 1, 0),
        ({"prompt": ["a", "b"]}, "a\nb", 1, 0),
        ({"messages": [{"role": "system", "content": "Be"}, {"role": "user", "content": "Hi"}]}, "Be\nHi", 2, 0),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "What?"},
                            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}},
                            {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
                        ],
                    }
                ]
            },
            "What?",
            1,
            1,
        ),
        (
            {
                "instructions": "Be",
                "input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:x"}]}],
            },
            "Be",
            1,
            1,
        ),
        ({"input": "Hello"}, "Hello", 1, 0),
        (
            {
                "messages": [{"role": "user", "content": "Hi"}],
                "tools": [
                    {
                        "type": "function",
                        "function": {
                            "name": "weather",
                            "description": "Tells it",
                            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
                        },
                    }
                ],
            },
            "Hi\nweather\nTells it\ncity",
            1,
            0,
        ),
        ([], "", 0, 0),
    ],
    ids=short_id,
)
def test_a_prompt_is_what_the_model_reads(body: Any, text: str, messages: int, images: int) -> None:
    sample = prompt_sample(json.dumps(body).encode())
    assert (sample.text, sample.messages, sample.images, sample.left_out_chars) == (text, messages, images, 0)


def test_a_prompt_of_tokens_is_counted() -> None:
    assert prompt_sample(b'{"prompt":[[1,2,3],[4,5]]}').tokens == 5


def test_a_prompt_is_read_where_a_parser_gives_up() -> None:
    body = b'\xef\xbb\xbf{"prompt":"Hi \\ud800","x":NaN}'
    assert prompt_sample(body).text == "Hi ?"
    deep = b'{"prompt":' + b"[" * 100_000 + b'"Hi"'
    assert prompt_sample(deep).text == deep.decode()


def test_a_long_prompt_is_kept_in_part() -> None:
    body = json.dumps({"prompt": ["a" * 10, "b" * 10, "c"]}).encode()
    sample = prompt_sample(body, max_text=15)
    assert (sample.text, sample.left_out_chars) == ("a" * 10 + "\n" + "b" * 5, 6)
