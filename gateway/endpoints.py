"""Which of OpenAI's routes a request is for, and what tells its usage."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes

from gateway.openai_routes import ROUTES

_MOST_SLASHES = 64


class Meter(enum.Enum):
    """What tells the usage of a request."""

    CHAT = "chat"
    COMPLETIONS = "completions"
    RESPONSES = "responses"
    EMBEDDINGS = "embeddings"
    IMAGES = "images"
    TRANSCRIPTION = "transcription"
    TRANSLATION = "translation"
    SPEECH = "speech"
    MODERATION = "moderation"
    RUNS = "runs"
    REALTIME = "realtime"
    # No answer tells what a video costs: what it is made with is all that a record can say.
    VIDEO = "video"
    # An object that exists already: the usage in it is not this request's, and comes again at every look.
    BATCH = "batch"
    STORED = "stored"
    # No route of OpenAI's, perhaps one of another upstream's: a POST there may report usage like any other.
    OTHER = "other"
    NONE = "none"

    # Members are one of a kind; enum's own is a call of Python's at each look into a set.
    __hash__ = object.__hash__


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A route as it may stand in a record: always one of a fixed set, never text of the client's.

    `has_untold_cost`: it begins what costs money, and its own answer does not tell how much.
    """

    route: str
    meter: Meter = Meter.NONE
    splices_usage: bool = False
    has_untold_cost: bool = False


_METERS: dict[tuple[str, str], Meter] = {
    ("POST", "/v1/chat/completions"): Meter.CHAT,
    ("POST", "/v1/completions"): Meter.COMPLETIONS,
    ("POST", "/v1/responses"): Meter.RESPONSES,
    ("POST", "/v1/responses/compact"): Meter.RESPONSES,
    ("POST", "/v1/embeddings"): Meter.EMBEDDINGS,
    ("POST", "/v1/images/edits"): Meter.IMAGES,
    ("POST", "/v1/images/generations"): Meter.IMAGES,
    ("POST", "/v1/images/variations"): Meter.IMAGES,
    ("POST", "/v1/audio/transcriptions"): Meter.TRANSCRIPTION,
    ("POST", "/v1/audio/translations"): Meter.TRANSLATION,
    ("POST", "/v1/audio/speech"): Meter.SPEECH,
    ("POST", "/v1/moderations"): Meter.MODERATION,
    ("POST", "/v1/decisions"): Meter.OTHER,
    ("POST", "/v1/videos"): Meter.VIDEO,
    ("POST", "/v1/videos/edits"): Meter.VIDEO,
    ("POST", "/v1/videos/extensions"): Meter.VIDEO,
    ("POST", "/v1/videos/{video_id}/remix"): Meter.VIDEO,
    ("POST", "/v1/threads/runs"): Meter.RUNS,
    ("POST", "/v1/threads/{thread_id}/runs"): Meter.RUNS,
    ("POST", "/v1/threads/{thread_id}/runs/{run_id}/submit_tool_outputs"): Meter.RUNS,
    ("GET", "/v1/realtime"): Meter.REALTIME,
    ("GET", "/v1/realtime/translations"): Meter.REALTIME,
    ("GET", "/v1/live/sessions"): Meter.REALTIME,
    ("GET", "/v1/responses"): Meter.REALTIME,
    ("POST", "/v1/batches"): Meter.BATCH,
    ("GET", "/v1/batches/{batch_id}"): Meter.BATCH,
    ("POST", "/v1/batches/{batch_id}/cancel"): Meter.BATCH,
    ("GET", "/v1/chat/completions/{completion_id}"): Meter.STORED,
    ("POST", "/v1/chat/completions/{completion_id}"): Meter.STORED,
    ("GET", "/v1/responses/{response_id}"): Meter.STORED,
    ("POST", "/v1/responses/{response_id}/cancel"): Meter.STORED,
    ("GET", "/v1/threads/{thread_id}/runs/{run_id}"): Meter.STORED,
    ("POST", "/v1/threads/{thread_id}/runs/{run_id}"): Meter.STORED,
    ("POST", "/v1/threads/{thread_id}/runs/{run_id}/cancel"): Meter.STORED,
}
# Batches and evaluations that run later, videos by the second, jobs, storage and containers by the hour, sessions that
# a client's browser or telephone has with OpenAI itself, and searches.
_UNTOLD_COSTS = frozenset(
    {
        "/v1/audio/voices",
        "/v1/batches",
        "/v1/chatkit/sessions",
        "/v1/containers",
        "/v1/evals/{eval_id}/runs",
        "/v1/fine_tuning/alpha/graders/run",
        "/v1/fine_tuning/jobs",
        "/v1/fine_tuning/jobs/{fine_tuning_job_id}/resume",
        "/v1/live/sessions",
        "/v1/realtime/calls",
        "/v1/realtime/calls/{call_id}/accept",
        "/v1/realtime/client_secrets",
        "/v1/realtime/sessions",
        "/v1/realtime/transcription_sessions",
        "/v1/realtime/translations/client_secrets",
        "/v1/vector_stores",
        "/v1/vector_stores/{vector_store_id}/file_batches",
        "/v1/vector_stores/{vector_store_id}/files",
        "/v1/vector_stores/{vector_store_id}/search",
        "/v1/videos",
        "/v1/videos/characters",
        "/v1/videos/edits",
        "/v1/videos/extensions",
        "/v1/videos/{video_id}/remix",
    }
)
_SPLICED = (Meter.CHAT, Meter.COMPLETIONS)
_OTHER = Endpoint("other")
_OTHER_POST = Endpoint("other", Meter.OTHER)


@dataclass(slots=True)
class _Node:
    """A point in the tree of path segments."""

    literals: dict[bytes, _Node] = field(default_factory=dict)
    parameter: _Node | None = None
    by_method: dict[str, Endpoint] = field(default_factory=dict)
    unmetered: Endpoint | None = None


def _endpoint(method: str, route: str) -> Endpoint:
    meter = _METERS.get((method, route), Meter.NONE)
    is_untold = method == "POST" and route in _UNTOLD_COSTS
    return Endpoint(route, meter, splices_usage=meter in _SPLICED, has_untold_cost=is_untold)


def _tree() -> _Node:
    root = _Node()
    for methods, route in ROUTES:
        node = root
        for segment in route.encode().split(b"/")[1:]:
            if segment.startswith(b"{"):
                node.parameter = node = node.parameter or _Node()
            else:
                node = node.literals.setdefault(segment, _Node())
        node.unmetered = Endpoint(route)
        node.by_method = {method: _endpoint(method, route) for method in methods.split()}
    return root


_ROOT = _tree()
_EXACT = {
    (method, route.encode() + slash): _endpoint(method, route)
    for methods, route in ROUTES
    if "{" not in route
    for method in methods.split()
    for slash in (b"", b"/")
}


# Paths below /v1 that are some route of OpenAI's as they stand; OpenAI has others.
ROUTE_PATHS = frozenset(path for _, path in _EXACT if path.startswith(b"/v1/"))


def endpoint_of(method: str, path: bytes) -> Endpoint:
    """Return the endpoint of a request; a WebSocket handshake is a GET.

    `path` is the path as sent; a query is ignored. Doubled and trailing slashes, dot segments and percent-encoding
    are read as an upstream that normalises would, so that no spelling of a path goes unmetered.
    """
    return _EXACT.get((method, path)) or _find(method, path)


def _find(method: str, path: bytes) -> Endpoint:
    path = path.partition(b"?")[0]
    within_reason = path.count(b"/") <= _MOST_SLASHES
    node = _matching(_ROOT, _segments(path), 0) if within_reason else None
    if node is None and b"%" in path and within_reason:
        node = _matching(_ROOT, _segments(unquote_to_bytes(path)), 0)
    if node is None or node.unmetered is None:
        return _OTHER_POST if method == "POST" else _OTHER
    return node.by_method.get(method, node.unmetered)


def _segments(path: bytes) -> list[bytes]:
    segments: list[bytes] = []
    for raw in path.split(b"/"):
        segment = unquote_to_bytes(raw) if b"%" in raw else raw
        if segment == b"..":
            del segments[-1:]
        elif segment not in (b"", b"."):
            segments.append(segment)
    return segments


def _matching(node: _Node, segments: Sequence[bytes], depth: int) -> _Node | None:
    """Return the node of a path, a literal segment before a parameter; None where there is no route."""
    if depth == len(segments):
        return node if node.unmetered else None
    literal = node.literals.get(segments[depth])
    found = _matching(literal, segments, depth + 1) if literal else None
    if found is None and node.parameter is not None:
        found = _matching(node.parameter, segments, depth + 1)
    return found
