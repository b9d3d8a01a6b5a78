"""Every route of OpenAI's, with every kind of body up and down: what arrives is, byte for byte, what was sent."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pytest

from gateway.openai_routes import ROUTES
from gateway.tests.fake_upstream import Exchange, FakeUpstream
from gateway.tests.live import LiveProxy
from gateway.tests.raw_client import RawClient

Fields = list[tuple[str, str]]

EACH_ROUTE = [(method, route) for methods, route in ROUTES for method in methods.split() if "/dashboard/" not in route]
ID = "ft:gpt-4o%2Fa~b.c:%E4%BD%A0@8xYz!$&'()*+,="
QUERY = '?beta=true&limit=2&limit=3&after=a+b%20c&include[]=x&q=%2B;r&metadata[k]=&"|^`{}'
BINARY = bytes(range(256)) * 9
# Nothing that a proxy would write like this by itself: spaces, equal names, escapes, big numbers, a NUL in a string.
JSON = b'\r\n{ "model" : "m", "model":"gpt-4o\\u002dmini",\t"stream":true , "stream_options":null,"x":1e400,'
JSON += '"\\u0000":"\\ud83d","你好":"😀\u2028", "n":12345678901234567890.10 }\n\n'.encode()
FORM = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + BINARY + b"\r\n--b--\r\n"


class Body(NamedTuple):
    """What goes up: with a length, or in these parts, or (None) not at all."""

    content_type: str
    parts: list[bytes] | None
    is_chunked: bool = False


UP = [
    Body("", None),
    Body("application/json", [JSON]),
    Body("application/json; charset=UTF-8", [JSON[:7], JSON[7:]], is_chunked=True),
    Body('multipart/form-data; boundary="b"', [FORM]),
    Body("multipart/form-data;boundary=b", [FORM[:100], FORM[100:101], FORM[101:]], is_chunked=True),
    Body("application/sdp", [b"v=0\r\no=- 1 1 IN IP4 127.0.0.1\r\n"]),
    Body("", [b""]),
]
SENT: Fields = [
    ("Accept", "application/json"),
    ("Accept-Encoding", "gzip, deflate, br, zstd"),
    ("User-Agent", "AsyncOpenAI/Python 3.3.1"),
    ("X-Stainless-Lang", "python"),
    ("X-Stainless-Retry-Count", "0"),
    ("Authorization", "Bearer sk-\"x'\\ y"),
    ("OpenAI-Organization", "org-x"),
    ("OpenAI-Project", "proj_x"),
    ("OpenAI-Beta", "assistants=v2"),
    ("OpenAI-Beta", "realtime=v1"),
    ("Idempotency-Key", "stainless-python-retry-1"),
    ("X-Client-Request-Id", "\xe9\xff tab\there"),
    ("X-Empty", ""),
    ("If-None-Match", 'W/"1"'),
    ("Range", "bytes=0-1"),
]
# Of the hop, and what would name the client.
KEPT_HERE: Fields = [
    ("Cookie", "a=1"),
    ("Origin", "https://app.example"),
    ("Referer", "https://app.example/"),
    ("Connection", "keep-alive, x-mine"),
    ("X-Mine", "1"),
    ("TE", "trailers"),
    ("X-Forwarded-For", "10.0.0.1"),
    ("CF-Ray", "1"),
    ("Via", "1.1 a"),
]


class Answer(NamedTuple):
    """What comes back; `parts` go out one by one, chunked or with a length, or until the connection closes."""

    status: str
    content_type: str
    parts: list[bytes]
    framing: str = "length"


EVENTS = [
    b'event: a\ndata: {"x": "\xe2\x80\xa8", "usage":null}\n\n: comment\n\n',
    b'data:{"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1}}\r\n\r\n',
    b"id: 7\nretry: 3\ndata: a\ndata: b\n\ndata: [DONE]\n",  # and not the empty line that would end it
]
DOWN = [
    Answer("200 OK", "application/json", [JSON]),
    Answer("200 OK", "text/event-stream; charset=utf-8", EVENTS, "chunked"),
    Answer("200 Fine", "application/octet-stream", [BINARY, BINARY], "chunked"),
    Answer("206 Partial Content", "audio/mpeg", [BINARY]),
    Answer("204 No Content", "", [], "none"),
    Answer("404 Not Found", "application/json", [b'{"error": {"message": "no"}}  ']),
    Answer("201 Created", "text/event-stream", EVENTS, "close"),
    Answer("200 OK", "text/event-stream", EVENTS),
]
TOLD: Fields = [
    ("Date", "Thu, 01 Jan 2026 00:00:00 GMT"),
    ("X-Request-Id", "req_1"),
    ("openai-processing-ms", "7"),
    ("OpenAI-Version", "2020-10-01"),
    ("x-ratelimit-remaining-tokens", "1"),
    ("Link", "a"),
    ("link", "b"),
    ("Retry-After", "1"),
    ("Location", "/v1/x"),
    ("Content-Disposition", 'attachment; filename="\xe9"'),
    ("Vary", "Origin"),
    ("Server", "cloudflare"),
    ("Server-Timing", "cdn;dur=1"),
    ("X-Nothing", ""),
]
KEPT_FROM_CLIENT: Fields = [
    ("Set-Cookie", "__cf_bm=1"),
    ("Alt-Svc", 'h3=":443"'),
    ("Strict-Transport-Security", "max-age=1"),
    ("Keep-Alive", "timeout=5"),
    ("access-control-allow-origin", "https://a.example"),
]


@dataclass(frozen=True)
class Case:
    method: str
    target: str
    up: Body
    down: Answer


def cases() -> Iterator[Case]:
    """Yield every route with every body up; the answers take turns, so that each route sees most of them."""
    answers = itertools.cycle(DOWN)
    for method, route in EACH_ROUTE:
        for up in UP:
            yield Case(method, re.sub(r"\{\w+\}", ID, route) + QUERY, up, next(answers))


@pytest.mark.slow
def test_each_route_passes_every_byte_both_ways(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    upstream.script = _play
    with RawClient(proxy) as client:
        for case in cases():
            _check(case, client, upstream)
    assert len(upstream.requests) == len(EACH_ROUTE) * len(UP)


def _check(case: Case, client: RawClient, upstream: FakeUpstream) -> None:
    _plans[case.target, case.method] = case.down
    client.send(_request(case))
    answer = client.answer()
    arrived = upstream.requests[-1]
    host = [("host", upstream.url.removeprefix("http://"))]
    assert arrived.raw_head.split(b"\r\n", 1)[0] == f"{case.method} {case.target} HTTP/1.1".encode(), case
    assert _lowered(arrived.headers) == host + _lowered(SENT + _body_fields(case.up)), case
    assert bytes(arrived.body) == b"".join(case.up.parts or []), case
    assert answer.status == int(case.down.status[:3]), case
    assert (answer.body, answer.end) == (b"".join(case.down.parts), "whole"), case
    assert _without_added(answer.headers) == TOLD + _answer_fields(case.down, is_to_client=True), case


def _request(case: Case) -> bytes:
    fields = [("Host", "proxy.example"), *SENT[:5], *KEPT_HERE, *SENT[5:], *_body_fields(case.up)]
    lines = [f"{case.method} {case.target} HTTP/1.1", *(f"{name}: {value}" for name, value in fields)]
    head = "\r\n".join([*lines, "", ""]).encode("latin-1")
    return head + _framed(case.up.parts or [], is_chunked=case.up.is_chunked)


def _body_fields(body: Body) -> Fields:
    fields = [("Content-Type", body.content_type)] if body.content_type else []
    if body.is_chunked:
        fields.append(("Transfer-Encoding", "chunked"))
    elif body.parts is not None:
        fields.append(("Content-Length", str(sum(map(len, body.parts)))))
    return fields


def _answer_fields(answer: Answer, *, is_to_client: bool = False) -> Fields:
    fields = [("Content-Type", answer.content_type)] if answer.content_type else []
    # The framing of events is each hop's own: one of the gateway's may have to follow.
    if answer.framing == "length" and not (is_to_client and "event-stream" in answer.content_type):
        fields.append(("Content-Length", str(sum(map(len, answer.parts)))))
    return fields


def _framed(parts: list[bytes], *, is_chunked: bool) -> bytes:
    if not is_chunked:
        return b"".join(parts)
    return b"".join(b"%X;x=1\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


# What the upstream is to answer, by target and method.
_plans: dict[tuple[str, str], Answer] = {}


async def _play(exchange: Exchange) -> None:
    await exchange.read_body()
    answer = _plans[exchange.request.target, exchange.request.method]
    fields = [*TOLD[:4], *KEPT_FROM_CLIENT, *TOLD[4:], *_answer_fields(answer)]
    if answer.framing == "chunked":
        fields.append(("Transfer-Encoding", "chunked"))
    elif answer.framing == "close":
        fields.append(("Connection", "close"))
    lines = [f"HTTP/1.1 {answer.status}", *(f"{name}: {value}" for name, value in fields), "", ""]
    await exchange.send("\r\n".join(lines).encode("latin-1"))
    await exchange.send(_framed(answer.parts, is_chunked=answer.framing == "chunked"))
    if answer.framing == "close":
        await exchange.close()


def _lowered(fields: Fields) -> Fields:
    return [(name.lower(), value) for name, value in fields]


def _without_added(fields: Fields) -> Fields:
    """Return an answer's fields without what the gateway and this hop add: the last of each name."""
    left = list(fields)
    for name in ("access-control-allow-origin", "access-control-expose-headers", "server-timing", "x-proxy-request-id"):
        left.remove(next(pair for pair in reversed(left) if pair[0].lower() == name))
    return [pair for pair in left if pair[0].lower() not in ("x-accel-buffering", "transfer-encoding")]
