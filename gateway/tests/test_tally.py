from __future__ import annotations

import threading

from billing.events import UsageEvent
from gateway.openai_routes import ROUTES
from gateway.tally import EDGES_MS, Tally, status_class


def ended(**changes: object) -> UsageEvent:
    fields: dict[str, object] = {"endpoint": "/v1/models", "status": 200}
    return UsageEvent(id="1", started_at=1.0, **fields | changes)  # type: ignore[arg-type]


def test_requests_are_counted_by_endpoint_outcome_and_class_of_status() -> None:
    tally = Tally()
    for status, outcome in ((200, "completed"), (201, "completed"), (200, "client_closed"), (0, "client_closed")):
        tally.finished(ended(status=status, outcome=outcome), has_begun=True)
    counters = tally.counters()
    assert counters["requests", "/v1/models", "completed", "2xx"] == 2
    assert counters["requests", "/v1/models", "client_closed", "2xx"] == 1
    assert counters["requests", "/v1/models", "client_closed", "none"] == 1


def test_an_upstreams_statuses_are_counted_one_by_one_and_ours_are_not_among_them() -> None:
    tally = Tally()
    for status, outcome in ((429, "completed"), (429, "completed"), (502, "upstream_error"), (403, "refused")):
        tally.finished(ended(status=status, outcome=outcome), has_begun=True)
    answers = {key: count for key, count in tally.counters().items() if key[0] == "upstream_answers"}
    assert answers == {("upstream_answers", "429"): 2}


def test_no_number_of_strange_statuses_makes_many_labels() -> None:
    tally = Tally()
    for status in range(200, 1000):
        tally.finished(ended(status=status), has_begun=True)
    counters = tally.counters()
    assert counters["upstream_answers", "5xx"] > 50
    assert counters["upstream_answers", "none"] == 400
    assert len(counters) < 80
    assert sum(count for key, count in counters.items() if key[0] == "requests") == 800


def test_labels_are_of_fixed_sets() -> None:
    tally = Tally()
    routes = {route for _, route in ROUTES}
    for route in routes:
        for outcome in ("completed", "client_closed", "upstream_error", "timeout", "refused"):
            for status in (200, 404, 500):
                tally.finished(ended(endpoint=route, outcome=outcome, status=status), has_begun=True)
    assert {key[1] for key in tally.counters() if key[0] == "requests"} == routes
    assert len([key for key in tally.counters() if key[0] == "requests"]) == len(routes) * 15


def test_a_time_is_in_the_bucket_of_the_first_edge_that_it_does_not_exceed() -> None:
    tally = Tally()
    for ms in (1, 50, 51, 10_000_000):
        tally.finished(ended(first_byte_ms=ms, duration_ms=ms, proxy_ms=ms / 1000), has_begun=True)
    waits = tally.histograms()["first_byte_seconds", "/v1/models"]
    assert (waits[0], waits[1], waits[-2]) == (2, 1, 1)
    assert waits[-1] == 1 + 50 + 51 + 10_000_000
    assert len(waits) == len(EDGES_MS["first_byte_seconds"]) + 2
    added = tally.histograms()["added_latency_seconds",]
    assert sum(added[:-1]) == 4


def test_what_never_reached_an_answer_has_no_time_to_its_first_byte() -> None:
    tally = Tally()
    tally.finished(ended(status=502, outcome="upstream_error", duration_ms=7), has_begun=False)
    histograms = tally.histograms()
    assert sum(histograms["first_byte_seconds", "/v1/models"]) == 0
    assert histograms["request_duration_seconds", "/v1/models"][-1] == 7


def test_errors_are_counted_by_code_and_bytes_by_endpoint() -> None:
    tally = Tally()
    tally.failed("upstream_timeout")
    tally.failed("upstream_timeout")
    tally.finished(ended(request_bytes=3, response_bytes=5), has_begun=True)
    tally.finished(ended(request_bytes=4, response_bytes=6), has_begun=True)
    counters = tally.counters()
    assert counters["errors", "upstream_timeout"] == 2
    assert (counters["request_bytes", "/v1/models"], counters["response_bytes", "/v1/models"]) == (7, 11)


def test_nothing_is_lost_or_counted_twice_while_others_read() -> None:
    tally, requests = Tally(), 20_000
    seen: list[float] = []

    def add() -> None:
        for number in range(requests):
            tally.finished(ended(duration_ms=number % 100, request_bytes=1), has_begun=True)

    adding = threading.Thread(target=add)
    adding.start()
    while adding.is_alive():
        seen.append(tally.counters().get(("requests", "/v1/models", "completed", "2xx"), 0))
        tally.histograms()
    adding.join()
    counters = tally.counters()
    assert counters["requests", "/v1/models", "completed", "2xx"] == requests
    assert counters["request_bytes", "/v1/models"] == requests
    assert sum(tally.histograms()["request_duration_seconds", "/v1/models"][:-1]) == requests
    assert seen == sorted(seen)


def test_a_class_of_status_has_a_name() -> None:
    assert [status_class(status) for status in (101, 204, 404, 599, 0, 5, 600, 999)] == [
        "1xx",
        "2xx",
        "4xx",
        "5xx",
        "none",
        "5xx",
        "none",
        "none",
    ]
