from __future__ import annotations

import itertools
import json
import re
import timeit
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.splice import UsageEventRemover, with_include_usage
from gateway.sse import EventAligner


def short_id(value: object) -> str:
    return repr(value)[:40]


MEMBER = b'"stream_options":{"include_usage":true},'
REQUEST = b'{"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}], "stream": true}'


# The way up


@pytest.mark.parametrize(
    "body",
    [
        REQUEST,
        b'{"stream":true}',
        b' \r\n\t{ "stream"\n:\ttrue }\n',
        b'{"messages":[{"content":"\\"stream_options\\": {}, \\"stream\\": false"}],"stream":true}',
        b'{"metadata":{"stream_options":{"include_usage":false},"stream":false},"stream":true}',
        b'{"tools":[{"properties":{"stream":{"type":"boolean"}}}],"x":"stream","stream":true}',
        b'{"a":"\xe4\xbd\xa0 \xe2\x80\xa8","stream":true,"b":1e999}',
    ],
    ids=short_id,
)
def test_usage_is_asked_for_by_one_member_and_no_other_byte_changes(body: bytes) -> None:
    spliced = with_include_usage(body)
    assert spliced is not None
    assert spliced.replace(MEMBER, b"", 1) == body
    assert json.loads(spliced) == json.loads(body) | {"stream_options": {"include_usage": True}}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"true",
        b"[true]",
        b'"stream"',
        b"{}",
        b'{"stream":false}',
        b'{"stream":"true"}',
        b'{"stream":1}',
        b'{"stream":null}',
        b'{"x":{"stream":true}}',
        b'{"stream":true,"stream_options":null}',
        b'{"stream":true,"stream_options":{}}',
        b'{"stream_options":{"include_usage":false},"stream":true}',
        b'{"stream":true,"stream\\u005foptions":{"include_obfuscation":false}}',
        b'{"stream":true,"stream":true}',
        b'{"stream":false,"stream":true}',
        b'{"stream":true,"stream":false}',
        b'{"stream":true',
        b'{"stream":true}}',
        b'{"stream":true,}',
        b"{'stream':true}",
        b'{"stream":true,"x":NaN}',
        b'{"stream":true,"x":"\xff"}',
        b'{"stream":true,"x":"\xed\xa0\x80"}',
        b'\xef\xbb\xbf{"stream":true}',
        '{"stream":true}'.encode("utf-16"),
        b'{"stream":true,"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"x":' * 100_000,
    ],
    ids=short_id,
)
def test_what_is_no_plain_request_for_a_stream_passes_as_it_is(body: bytes) -> None:
    assert with_include_usage(body) is None


def test_a_body_that_is_too_large_passes_as_it_is() -> None:
    assert with_include_usage(REQUEST, max_bytes=len(REQUEST)) is not None
    assert with_include_usage(REQUEST, max_bytes=len(REQUEST) - 1) is None


NAMES = st.sampled_from(["stream", "stream_options", "messages", 'a"stream', "b\\", "\u2028"]) | st.text(max_size=5)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(
    LEAVES | NAMES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3)
)
SPACES = st.lists(st.sampled_from(["", "", "", " ", "\n", "\t", "\r\n  "]), min_size=1, max_size=7)


def dumped(value: Any, spaces: list[str], *, ascii_only: bool) -> str:
    """Return JSON with white space, in turn, wherever it may stand."""
    turn = 0

    def space() -> str:
        nonlocal turn
        turn += 1
        return spaces[turn % len(spaces)]

    def text(part: Any) -> str:
        if isinstance(part, dict):
            members = (f"{space()}{text(name)}{space()}:{text(member)}" for name, member in part.items())
            inner = "{" + ",".join(members) + space() + "}"
        elif isinstance(part, list):
            inner = "[" + ",".join(map(text, part)) + space() + "]"
        else:
            inner = json.dumps(part, ensure_ascii=ascii_only)
        return space() + inner + space()

    return text(value)


@settings(deadline=None)
@given(st.dictionaries(NAMES, VALUES, max_size=5), st.sampled_from([True, False, None, 0]), SPACES, st.booleans())
def test_any_object_gains_the_member_or_stays_as_it_is(
    members: dict[str, Any], stream: object, spaces: list[str], ascii_only: bool
) -> None:
    if stream != 0:
        members["stream"] = stream
    body = dumped(members, spaces, ascii_only=ascii_only).encode("utf-8", "replace")
    spliced = with_include_usage(body)
    if members.get("stream") is True and "stream_options" not in members:
        assert spliced is not None
        assert spliced.replace(MEMBER, b"", 1) == body
        assert json.loads(spliced) == json.loads(body) | {"stream_options": {"include_usage": True}}
    else:
        assert spliced is None


# The way back

USAGE = {
    "prompt_tokens": 19,
    "completion_tokens": 10,
    "total_tokens": 29,
    "prompt_tokens_details": {"cached_tokens": 0},
}


def chunk(**members: Any) -> dict[str, Any]:
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o"} | members


def content(text: str, **members: Any) -> dict[str, Any]:
    return chunk(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": None}], **members)


def event(data: dict[str, Any], *, end: str = "\n", spaced: bool = False) -> bytes:
    text = json.dumps(data) if spaced else json.dumps(data, separators=(",", ":"))
    return f"data: {text}{end}{end}".encode()


def passed(stream: list[bytes]) -> bytes:
    remover = UsageEventRemover()
    return b"".join(remover.feed(piece) for piece in stream)


STYLES = st.fixed_dictionaries({"end": st.sampled_from(["\n", "\r\n", "\r"]), "spaced": st.booleans()})


@settings(deadline=None)
@given(
    st.lists(st.text(max_size=12) | st.sampled_from(['"usage":null', ',"usage":null}', "\\", '"usage":{}'])),
    STYLES,
    st.sampled_from([None, "usage_last", "usage_inside", "usage_first"]),
    st.lists(st.integers(0, 4000), max_size=8),
    st.booleans(),
)
def test_the_client_gets_the_stream_it_asked_for(
    texts: list[str], style: dict[str, Any], nulls: str | None, cuts: list[int], has_comments: bool
) -> None:
    """Whatever its text, its line ends and its white space, and wherever pieces end."""
    asked, spliced = [], []
    for text in texts:
        plain = content(text, obfuscation="x}")
        asked.append(event(plain, **style))
        spliced.append(event(with_null(plain, nulls), **style))
        if has_comments:
            for stream in asked, spliced:
                stream.append(b": ping" + 2 * style["end"].encode())
    spliced.append(event(chunk(choices=[], usage=USAGE), **style))
    for stream in asked, spliced:
        stream.append(b"data: [DONE]" + 2 * style["end"].encode())
    aligner, whole = EventAligner(1 << 20), b"".join(spliced)
    borders = [0, *sorted(cut % (len(whole) + 1) for cut in cuts), len(whole)]
    pieces = [aligner.feed(whole[a:b]) for a, b in itertools.pairwise(borders)]
    assert passed([*pieces, aligner.flush()]) == b"".join(asked)
    assert passed([b"".join(asked)]) == b"".join(asked)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_no_border_of_two_pieces_leaves_anything_of_the_usage_event(end: str) -> None:
    asked = [event(content("a"), end=end), f"data: [DONE]{end}{end}".encode()]
    whole = b"".join([asked[0], event(chunk(choices=[], usage=USAGE), end=end), asked[1]])
    for cut in range(len(whole)):
        aligner = EventAligner(1 << 20)
        assert passed([aligner.feed(whole[:cut]), aligner.feed(whole[cut:]), aligner.flush()]) == b"".join(asked)


@pytest.mark.parametrize("end", ["\r\r\n", "\n\r\n", "\n\r", "\r\n\n"])
def test_the_usage_event_is_taken_out_where_line_ends_are_mixed(end: str) -> None:
    def ended(data: str) -> bytes:
        return f"data: {data}{end}".encode()

    asked = [ended(json.dumps(content("a"))), ended("[DONE]")]
    spliced = [asked[0], ended(json.dumps(chunk(choices=[], usage=USAGE))), asked[1]]
    assert passed(spliced) == passed([b"".join(spliced)]) == b"".join(asked)


def with_null(data: dict[str, Any], where: str | None) -> dict[str, Any]:
    null: dict[str, Any] = {"usage": None}
    if where == "usage_first":
        return null | data
    if where == "usage_last":
        return data | null
    if where == "usage_inside":
        return {name: member for name, member in data.items() if name != "obfuscation"} | null | data
    return data


REAL = (
    b'data: {"id":"chatcmpl-B9","object":"chat.completion.chunk","created":1741570283,"model":"gpt-4o-2024-08-06",'
    b'"service_tier":"default","system_fingerprint":"fp_fc","choices":[{"index":0,"delta":{"content":"Hello"},'
    b'"logprobs":null,"finish_reason":null}],"usage":null,"obfuscation":"r5Kx"}\n\n'
)


@pytest.mark.parametrize(
    ("piece", "rest"),
    [
        (REAL, REAL.replace(b'"usage":null,', b"")),
        (REAL * 3, REAL.replace(b'"usage":null,', b"") * 3),
        (
            REAL.replace(b"\n", b"\r") + REAL,
            REAL.replace(b'"usage":null,', b"").replace(b"\n", b"\r") + REAL.replace(b'"usage":null,', b""),
        ),
        (b'data: {"usage":null}\n\n', b"data: {}\n\n"),
        (b'data:{"usage":null,"choices":[]}\n\n', b'data:{"choices":[]}\n\n'),
        (b"event: x\nid: 7\n" + REAL, b"event: x\nid: 7\n" + REAL.replace(b'"usage":null,', b"")),
        (b"\xef\xbb\xbf" + REAL, b"\xef\xbb\xbf" + REAL.replace(b'"usage":null,', b"")),
        (b'data: {"a":{"usage":null},"usage":null}\n\n', b'data: {"a":{"usage":null}}\n\n'),
        (b'data: {"usage":null,"a":{"usage":null}}\n\n', b'data: {"a":{"usage":null}}\n\n'),
        # The usage event, alone and in company.
        (event(chunk(choices=[], usage=USAGE)), b""),
        (event(chunk(choices=[], usage=USAGE), spaced=True), b""),
        (event(chunk(usage=USAGE, choices=[])), b""),
        (b"event: x\n" + event(chunk(choices=[], usage=USAGE)) + b": ping\n\n", b": ping\n\n"),
        (b'data: {"choices":[],\ndata: "usage":{"prompt_tokens":1}}\n\n', b""),
        # The last event of a stream that ends without an empty line.
        (event(chunk(choices=[], usage=USAGE))[:-2], b""),
    ],
    ids=short_id,
)
def test_what_was_added_is_taken_out(piece: bytes, rest: bytes) -> None:
    assert passed([piece]) == rest


@pytest.mark.parametrize(
    "piece",
    [
        b"",
        b"\n",
        b"data: [DONE]\n\n",
        b': ,"usage":null}\n\n',
        b'data: "usage"\n\n',
        event(content('"usage":null')),
        event({"choices": [{"delta": {}, "usage": None}]}),
        event({"choices": [{"delta": {"usage": None}}]}),
        # Usage of the upstream's own accord: with choices, or beside content filters.
        event(content("x", usage=USAGE)),
        event(chunk(choices=[], prompt_filter_results=[{"prompt_index": 0}])),
        event({"type": "response.completed", "response": {"usage": None}}),
        event({"type": "message_start", "usage": USAGE}),
        # Nothing that a parser takes.
        b'data: {"choices":[],"usage":{}\n\n',
        b'data: {"x":NaN,"usage":null,"y":[]}\n\n',
        b'data: {"usage":null,"usage":null,"x":[]}\n\n',
        b'data: {"x":1,\ndata: "usage":null}\n\n',
    ],
    ids=short_id,
)
def test_everything_else_passes_as_it_came(piece: bytes) -> None:
    assert passed([piece]) == piece


def test_only_one_event_of_usage_is_taken_out() -> None:
    usage_event = event(chunk(choices=[], usage=USAGE))
    assert passed([usage_event, usage_event]) == usage_event
    assert passed([usage_event * 3]) == usage_event * 2


def test_parts_of_an_event_that_is_too_long_pass_as_they_are() -> None:
    long = event(content("x" * 500, usage=None))
    parts = [long[:200], long[200:400], long[400:] + REAL]
    assert passed(parts) == long + REAL.replace(b'"usage":null,', b"")
    assert passed([long[:200], long[200:], REAL]) == long + REAL.replace(b'"usage":null,', b"")


@settings(deadline=None)
@given(st.lists(st.binary(max_size=30) | st.sampled_from([b'"usage":null', b"data: {", b"}\n\n", b"\r", b"\n"])))
def test_garbage_is_no_exception_and_loses_no_byte_but_null_usage(parts: list[bytes]) -> None:
    out = passed(parts)
    assert re.sub(rb'[\s,]*"usage":null[\s,]*', b"", out) == re.sub(rb'[\s,]*"usage":null[\s,]*', b"", b"".join(parts))


def test_more_lines_than_an_upstream_sends_at_once_pass_unread() -> None:
    remover = UsageEventRemover()
    many = b":\n" * 20_000 + b"\n" + REAL
    assert remover.feed(many) == many
    assert remover.feed(REAL) != REAL  # whole events went before


def test_a_chunk_costs_microseconds() -> None:
    remover = UsageEventRemover()
    plain = REAL.replace(b'"usage":null,', b"")
    for piece, most_us in ((plain, 3), (REAL, 10)):
        times = timeit.repeat(lambda piece=piece: remover.feed(piece), number=200, repeat=20)  # type: ignore[misc]
        assert min(times) / 200 * 1e6 < most_us
