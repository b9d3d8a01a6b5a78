from __future__ import annotations

import base64

import pytest

from gateway import headers as wire
from gateway.errors import BadRequestError, UpstreamProtocolError


def upstream_names(headers: wire.RawHeaders) -> list[bytes]:
    return [name for name, _ in wire.to_upstream(headers, host=b"api.example").headers]


def test_two_keys_are_refused() -> None:
    one = (b"authorization", b"Bearer sk-a")
    assert upstream_names([one]) == [b"host", b"authorization"]
    with pytest.raises(BadRequestError):
        upstream_names([one, (b"authorization", b"Bearer sk-b")])


def client_names(headers: wire.RawHeaders) -> list[bytes]:
    added = {name for name, _ in wire.CORS_HEADERS}
    return [name for name, _ in wire.to_client(headers).headers if name not in added]


@pytest.mark.parametrize(
    "name",
    [
        "connection",
        "keep-alive",
        "proxy-connection",
        "proxy-authorization",
        "te",
        "upgrade",
        "http2-settings",
        "cookie",
        "origin",
        "referer",
        "expect",
        "forwarded",
        "via",
        "x-forwarded-for",
        "x-forwarded-proto",
        "x-forwarded-anything",
        "x-real-ip",
        "cf-connecting-ip",
        "cf-ray",
        "true-client-ip",
        "x-client-ip",
        "cdn-loop",
        "x-forwarded",
        "forwarded-for",
        "remote-addr",
        "x-originating-ip",
        "cloudfront-viewer-address",
        "x-vercel-forwarded-for",
        "do-connecting-ip",
    ],
)
def test_a_field_that_is_no_business_of_the_upstream_stays_here(name: str) -> None:
    assert upstream_names([(name.encode(), b"1"), (b"accept", b"*/*")]) == [b"host", b"accept"]


def test_end_to_end_fields_keep_order_value_and_duplicates() -> None:
    headers = [(b"authorization", b"Bearer sk-x"), (b"x-a", b"1"), (b"openai-beta", b"v=2"), (b"x-a", b"\xe4 2")]
    assert wire.to_upstream(headers, host=b"h").headers[1:] == headers


def test_host_is_the_upstreams_whatever_the_client_says() -> None:
    assert wire.to_upstream([(b"host", b"evil")], host=b"api.example").headers == [(b"host", b"api.example")]


def test_fields_named_by_connection_stay_here() -> None:
    headers = [(b"connection", b"close, X-Hop"), (b"x-hop", b"1"), (b"x-end", b"2")]
    assert upstream_names(headers) == [b"host", b"x-end"]


def test_connection_cannot_take_away_framing_or_the_key() -> None:
    headers = [
        (b"connection", b"content-length, authorization, host, transfer-encoding"),
        (b"content-length", b"3"),
        (b"authorization", b"Bearer sk-x"),
    ]
    assert upstream_names(headers) == [b"host", b"content-length", b"authorization"]


def test_a_chunked_body_stays_chunked() -> None:
    assert wire.to_upstream([(b"transfer-encoding", b"Chunked")], host=b"h").headers[1:] == [
        (b"transfer-encoding", b"chunked")
    ]


@pytest.mark.parametrize(
    "name",
    [
        "Connection",
        "keep-alive",
        "Proxy-Authenticate",
        "Transfer-Encoding",
        "Upgrade",
        "Set-Cookie",
        "Strict-Transport-Security",
        "Alt-Svc",
        "Access-Control-Allow-Origin",
        "access-control-allow-credentials",
    ],
)
def test_a_field_that_is_no_business_of_the_client_stays_here(name: str) -> None:
    assert client_names([(name.encode(), b"chunked"), (b"ETag", b"x")]) == [b"ETag"]


def test_the_clients_fields_keep_case_order_and_duplicates() -> None:
    headers = [(b"X-Request-ID", b"r"), (b"link", b"1"), (b"Link", b"2"), (b"Date", b"d"), (b"Server", b"cloudflare")]
    assert wire.to_client(headers).headers[: len(headers)] == headers


def test_fields_named_by_the_upstreams_connection_stay_here() -> None:
    assert client_names([(b"Connection", b"X-Hop"), (b"x-hop", b"1"), (b"x-end", b"2")]) == [b"x-end"]


def test_no_answer_ever_allows_credentials() -> None:
    answers = wire.to_client([(b"access-control-allow-credentials", b"true")]).headers
    answers += wire.preflight([(b"origin", b"https://app"), (b"access-control-request-headers", b"authorization")])
    assert b"access-control-allow-credentials" not in dict(answers)


def test_a_preflight_gets_what_it_asks_for() -> None:
    asked = [
        (b"origin", b"chrome-extension://abc"),
        (b"access-control-request-method", b"DELETE"),
        (b"access-control-request-headers", b"authorization, x-stainless-os"),
        (b"access-control-request-private-network", b"true"),
    ]
    assert wire.is_preflight(asked)
    allowed = dict(wire.preflight(asked))
    assert allowed[b"access-control-allow-origin"] == b"*"
    assert allowed[b"access-control-allow-methods"] == b"DELETE"
    assert allowed[b"access-control-allow-headers"] == b"authorization, x-stainless-os"
    assert allowed[b"access-control-allow-private-network"] == b"true"


def test_a_preflight_may_ask_for_header_fields_in_several_lines() -> None:
    name = b"access-control-request-headers"
    allowed = wire.preflight([(b"origin", b"https://app"), (name, b"authorization"), (name, b"x-a, x-b")])
    assert (b"access-control-allow-headers", b"authorization, x-a, x-b") in allowed


def test_an_options_request_that_is_no_preflight_goes_upstream() -> None:
    assert not wire.is_preflight([(b"origin", b"https://app")])


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ([(b"authorization", b"Bearer sk-1")], b"sk-1"),
        ([(b"authorization", b"bearer  sk-1 ")], b"sk-1"),
        ([(b"authorization", b"Bearer\tsk-1")], b"sk-1"),
        ([(b"authorization", b"Basic abc")], b""),
        ([(b"sec-websocket-protocol", b"realtime, openai-insecure-api-key.sk-2, x")], b"sk-2"),
        ([], b""),
    ],
)
def test_the_key_is_found_where_clients_put_it(headers: wire.RawHeaders, key: bytes) -> None:
    assert wire.bearer_key(headers) == key


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ([(b"authorization", b"Bearer sk-1"), (b"api-key", b"sk-3")], b"sk-1"),
        ([(b"authorization", b"Basic " + base64.b64encode(b":sk-1"))], b"sk-1"),
        ([(b"authorization", b"basic\t" + base64.b64encode(b"sk-1:"))], b"sk-1"),
        ([(b"authorization", b"Basic " + base64.b64encode(b"user:sk-1").rstrip(b"="))], b"sk-1"),
        ([(b"authorization", b"Basic a")], b""),
        ([(b"authorization", b"sk-1")], b"sk-1"),
        ([(b"authorization", b"AWS4-HMAC-SHA256 Credential=x")], b""),
        ([(b"api-key", b"sk-1")], b"sk-1"),
        ([(b"x-api-key", b" sk-1 ")], b"sk-1"),
        ([], b""),
    ],
)
def test_a_key_is_known_in_whatever_form_an_upstream_may_take_it(headers: wire.RawHeaders, key: bytes) -> None:
    assert wire.api_key_of(headers) == key


@pytest.mark.parametrize(
    ("headers", "body_bytes"),
    [
        ([], 0),
        ([(b"content-length", b"0")], 0),
        ([(b"content-length", b"7")], 7),
        ([(b"transfer-encoding", b"chunked")], -1),
    ],
)
def test_the_declared_size_of_a_body_is_found(headers: wire.RawHeaders, body_bytes: int) -> None:
    assert wire.to_upstream(headers, host=b"h").body_bytes == body_bytes


@pytest.mark.parametrize(
    ("headers", "is_event_stream"),
    [
        ([(b"Content-Type", b"text/event-stream")], True),
        ([(b"content-type", b"Text/Event-Stream; charset=utf-8"), (b"Content-Encoding", b"identity")], True),
        ([(b"Content-Encoding", b"gzip"), (b"content-type", b"text/event-stream")], False),
        ([(b"content-type", b"application/json")], False),
        ([], False),
    ],
)
def test_an_event_stream_is_one_that_can_be_read(headers: wire.RawHeaders, is_event_stream: bool) -> None:
    assert wire.to_client(headers).is_event_stream is is_event_stream


@pytest.mark.parametrize("codings", [[b"gzip, chunked"], [b"identity"], [b""], [b"chunked", b"chunked"]])
def test_an_answer_in_another_coding_than_chunked_is_none(codings: list[bytes]) -> None:
    with pytest.raises(UpstreamProtocolError):
        wire.to_client([(b"Transfer-Encoding", coding) for coding in codings])
    wire.to_client([(b"Transfer-Encoding", b"Chunked ")])


def test_a_strangers_names_are_remembered_in_bounded_number_and_length() -> None:
    roles = wire.Roles(len)
    assert [roles[b"x-%d" % number] for number in range(10_000)][-1] == 6
    assert len(roles) <= 4096
    long = b"y" * 60_000
    assert roles[long] == 60_000
    assert long not in roles


def test_lists_of_names_are_remembered_in_bounded_number_and_length() -> None:
    plans = wire.Plans(lambda name: 0, frozenset())
    for number in range(2000):
        assert plans[(b"x-%d" % number,)].hosts == 0
    assert len(plans) <= 512
    for odd in [(b"y" * 60_000,), (b"y",) * 200]:
        assert len(list(plans[odd].kept([(name, b"") for name in odd]))) == len(odd)
        assert odd not in plans


@pytest.mark.parametrize(
    "headers",
    [
        [(b"content-length", b"1"), (b"content-length", b"1")],
        [(b"content-length", b"1"), (b"transfer-encoding", b"chunked")],
        [(b"authorization", b"Bearer a"), (b"authorization", b"Bearer b")],
        [(b"a b", b"1")],
        [(b"", b"1")],
    ],
)
def test_what_means_two_things_does_not_go_up(headers: wire.RawHeaders) -> None:
    for _ in range(2):
        with pytest.raises(BadRequestError):
            wire.to_upstream(headers, host=b"h")


def test_a_long_name_is_judged_as_a_short_one() -> None:
    long = b"x-forwarded-" + b"y" * 1000
    assert upstream_names([(long, b"1"), (b"y" * 1000, b"2")]) == [b"host", b"y" * 1000]
