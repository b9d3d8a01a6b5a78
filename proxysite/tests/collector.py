"""A collector of traces on 127.0.0.1: takes OTLP over HTTP, and keeps every span that it is sent."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from gateway.tests.live import PATIENCE_S, free_port


class Collector:
    """`with Collector() as collector:` listens at `collector.url`; `requests` are the bodies, as they came."""

    def __init__(self, port: int | None = None) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.requests: list[bytes] = []
        self.paths: list[str] = []
        self.spans: list[Span] = []
        self.services: set[str] = set()
        self._arrived = threading.Condition()
        self._server: ThreadingHTTPServer | None = None

    def __enter__(self) -> Collector:
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                collector._take(self.path, self.rfile.read(int(self.headers["content-length"])))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *arguments: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()

    def _take(self, path: str, body: bytes) -> None:
        with self._arrived:
            self.paths.append(path)
            self.requests.append(body)
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                self.services.add(attributes_of(resource.resource)["service.name"])
                self.spans += [span for scope in resource.scope_spans for span in scope.spans]
            self._arrived.notify_all()

    def wait_for(self, request_id: str) -> list[Span]:
        """Return the span of a request and those below it."""
        own = self._wait(lambda span: attributes_of(span).get("proxysite.request_id") == request_id)
        return [own, *(span for span in self.spans if span.parent_span_id == own.span_id)]

    def _wait(self, is_it: Callable[[Span], bool]) -> Span:
        deadline = time.monotonic() + PATIENCE_S
        with self._arrived:
            while True:
                # The last to end is sent last: its children are there before.
                for span in self.spans:
                    if is_it(span):
                        return span
                assert self._arrived.wait(deadline - time.monotonic()), "the span was never sent"


def attributes_of(named: Any) -> dict[str, Any]:
    """Return the attributes of a span or a resource as plain values."""
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in named.attributes}
