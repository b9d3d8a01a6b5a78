from __future__ import annotations

import re
import timeit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.endpoints import Endpoint, Meter, endpoint_of
from gateway.openai_routes import ROUTES


def short_id(value: object) -> str:
    return repr(value)[:40]


EACH_ROUTE = [(method, route) for methods, route in ROUTES for method in methods.split()]
IDS = ["abc-123", "ft:gpt-4o-mini:org::8xYz", "%E4%BD%A0%2Fb", "a.b_c~d", "{file_id}", "x" * 300, "%00", "a b"]


def with_ids(route: str, identity: str) -> bytes:
    return re.sub(r"\{\w+\}", identity.replace("\\", ""), route).encode()


def test_the_table_holds_every_operation_of_the_reference() -> None:
    in_reference = [pair for pair in EACH_ROUTE if "/dashboard/" not in pair[1]]
    # 288 operations, 7 of which are others with a query; and the 4 sockets and 2 routes that came later.
    assert len(in_reference) == 288 - 7 + 6
    assert len(set(EACH_ROUTE)) == len(EACH_ROUTE)


@pytest.mark.parametrize("identity", IDS)
def test_each_route_with_any_id_is_that_route(identity: str) -> None:
    for method, route in EACH_ROUTE:
        assert endpoint_of(method, with_ids(route, identity)).route == route
        assert endpoint_of(method, with_ids(route, identity) + b"/").route == route


@pytest.mark.parametrize(
    ("method", "path", "route", "meter"),
    [
        ("POST", b"/v1/chat/completions", "/v1/chat/completions", Meter.CHAT),
        ("GET", b"/v1/chat/completions", "/v1/chat/completions", Meter.NONE),
        ("GET", b"/v1/chat/completions/chatcmpl-1", "/v1/chat/completions/{completion_id}", Meter.STORED),
        ("POST", b"/v1/completions", "/v1/completions", Meter.COMPLETIONS),
        ("POST", b"/v1/responses", "/v1/responses", Meter.RESPONSES),
        ("POST", b"/v1/responses/compact", "/v1/responses/compact", Meter.RESPONSES),
        ("GET", b"/v1/responses/resp_1", "/v1/responses/{response_id}", Meter.STORED),
        ("GET", b"/v1/responses", "/v1/responses", Meter.REALTIME),
        ("GET", b"/v1/realtime?model=gpt-realtime", "/v1/realtime", Meter.REALTIME),
        ("POST", b"/v1/embeddings", "/v1/embeddings", Meter.EMBEDDINGS),
        ("POST", b"/v1/images/edits", "/v1/images/edits", Meter.IMAGES),
        ("POST", b"/v1/audio/speech", "/v1/audio/speech", Meter.SPEECH),
        ("POST", b"/v1/audio/transcriptions", "/v1/audio/transcriptions", Meter.TRANSCRIPTION),
        ("POST", b"/v1/audio/translations", "/v1/audio/translations", Meter.TRANSLATION),
        ("POST", b"/v1/moderations", "/v1/moderations", Meter.MODERATION),
        ("POST", b"/v1/threads/thread_1/runs", "/v1/threads/{thread_id}/runs", Meter.RUNS),
        ("POST", b"/v1/threads/runs", "/v1/threads/runs", Meter.RUNS),
        ("GET", b"/v1/batches/batch_1", "/v1/batches/{batch_id}", Meter.BATCH),
        ("GET", b"/v1/batches", "/v1/batches", Meter.NONE),
        ("GET", b"/v1/files/file-1/content", "/v1/files/{file_id}/content", Meter.NONE),
        ("GET", b"/dashboard/billing/usage", "/dashboard/billing/usage", Meter.NONE),
        ("POST", b"/v1/videos", "/v1/videos", Meter.VIDEO),
        ("POST", b"/v1/videos/video_1/remix", "/v1/videos/{video_id}/remix", Meter.VIDEO),
        # A literal before a parameter, whatever the method.
        ("POST", b"/v1/videos/characters", "/v1/videos/characters", Meter.NONE),
        ("POST", b"/v1/videos/video_1", "/v1/videos/{video_id}", Meter.NONE),
        ("BREW", b"/v1/chat/completions", "/v1/chat/completions", Meter.NONE),
        # Nothing that a client could fill in.
        ("POST", b"/v1/messages", "other", Meter.OTHER),
        ("GET", b"/v1/unheard/of", "other", Meter.NONE),
        ("POST", b"/v1/models/meta-llama/Llama-3", "other", Meter.OTHER),
        ("GET", b"/v1", "other", Meter.NONE),
        ("GET", b"", "other", Meter.NONE),
        ("GET", b"/v1/files/" + b"/x" * 40000, "other", Meter.NONE),
    ],
    ids=short_id,
)
def test_a_request_has_the_route_and_the_meter_of_its_path(method: str, path: bytes, route: str, meter: Meter) -> None:
    endpoint = endpoint_of(method, path)
    assert (endpoint.route, endpoint.meter) == (route, meter)


@pytest.mark.parametrize(
    "path",
    [
        b"/v1/chat//completions",
        b"//v1/chat/completions//",
        b"/v1/chat/%63ompletions",
        b"/v1/chat%2Fcompletions",
        b"/v1/./chat/completions",
        b"/v1/files/../chat/completions",
        b"/v1/files/%2e%2e/chat/completions?x=1",
    ],
    ids=short_id,
)
def test_no_spelling_of_a_path_goes_unmetered(path: bytes) -> None:
    assert endpoint_of("POST", path) == Endpoint("/v1/chat/completions", Meter.CHAT, splices_usage=True)


def test_usage_is_spliced_into_chat_and_text_completions_only() -> None:
    splicing = {(method, route) for method, route in EACH_ROUTE if endpoint_of(method, route.encode()).splices_usage}
    assert splicing == {("POST", "/v1/chat/completions"), ("POST", "/v1/completions")}


@settings(deadline=None)
@given(st.text(max_size=20), st.binary(max_size=100))
def test_a_route_is_one_of_the_table_whatever_the_client_sends(method: str, path: bytes) -> None:
    known = {route for _, route in ROUTES} | {"other"}
    assert endpoint_of(method, path).route in known
    assert endpoint_of(method, b"/v1/" + path).route in known


def us_per_call(method: str, path: bytes) -> float:
    return min(timeit.repeat(lambda: endpoint_of(method, path), number=200, repeat=20)) / 200 * 1e6


def test_finding_the_endpoint_costs_next_to_nothing() -> None:
    assert us_per_call("POST", b"/v1/chat/completions") < 2
    longest = max((with_ids(route, "abc-123") for _, route in ROUTES), key=lambda path: path.count(b"/"))
    assert us_per_call("GET", longest) < 15
