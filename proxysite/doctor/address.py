"""The way of a client's request: does the public address stream, take uploads as they come, and pass WebSockets?

Everything is asked as a client would ask. With the sandbox's key nothing costs anything, and when each event was sent
is known; with a key of the upstream's, one short answer is paid for.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx
from websockets.exceptions import InvalidStatus, WebSocketException
from websockets.sync.client import connect

from gateway.sandbox.transport import SLOW_SPEECH_PARTS, Pace
from proxysite.doctor.findings import Check, Finding, error, ok, warning
from proxysite.doctor.fronts import cure_for, front_of
from proxysite.doctor.instance import is_loopback
from proxysite.doctor.refusals import Refusals
from proxysite.doctor.timing import Arrivals

_PATIENCE_S = 60.0
_SHORT_PATIENCE_S = 5.0
_UPLOAD_PAUSE_S = 1.0
# OpenAI's own limit of a file.
_LARGE_BODY_BYTES = 512 << 20
# Where a server that listens on all addresses is reached from its own machine.
_SELF = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}  # noqa: S104
# What sandbox-slow waits before each part of an answer.
_SANDBOX_PAUSE_S = Pace().slow_event_s
_ANOTHER_MODEL = "Is there such a model? Give --model."


@dataclass(slots=True)
class Visit:
    """Whom to ask, and as whom; `front` is filled in when the first answer tells, `refusals` as limits are met."""

    url: str
    key: str
    is_sandbox: bool
    model: str
    context: ssl.SSLContext
    own_address: tuple[str, int]
    front: str = ""
    failed: bool = field(default=False)
    refusals: Refusals = field(default_factory=Refusals)

    def client(self) -> httpx.Client:
        return httpx.Client(
            base_url=self.url,
            verify=self.context,
            trust_env=False,
            timeout=_PATIENCE_S,
            headers={"Authorization": f"Bearer {self.key}", "Accept-Encoding": "gzip"},
        )

    @property
    def streaming_model(self) -> str:
        return "sandbox-slow" if self.is_sandbox else self.model

    def cure(self, problem: str) -> str:
        return cure_for(problem, self.front)

    def is_limited(self, part: str, answer: httpx.Response) -> bool:
        """Return whether the key's limits are why this is no answer to what was asked."""
        return answer.is_error and self.refusals.note(part, answer.status_code, answer.headers, answer.content)


def address_checks(visit: Visit) -> list[tuple[str, Check]]:
    checks = [
        ("address", _reached),
        ("http", _http_version),
        ("metrics", _metrics_hidden),
        ("key", _key_accepted),
        ("streams", _events),
        ("answers", _parts),
        ("uploads", _uploads),
        ("size", _size),
        ("websocket", _websocket),
        ("errors", _errors),
        ("limits", _limits),
    ]

    def after_the_first(check: Any) -> Check:
        return lambda: [] if visit.failed else check(visit)

    return [(part, after_the_first(check)) for part, check in checks]


# Is it there, and is it us?


def _reached(visit: Visit) -> Iterator[Finding]:
    try:
        with visit.client() as client:
            answer = client.get("/healthz")
    except httpx.HTTPError as exc:
        visit.failed = True
        cure = (
            "Look at the name in DNS, the port in the firewall, and the certificate (`--ca-file` for a CA of your own)."
        )
        yield error("address", f"{visit.url} cannot be reached: {exc}", cure)
        return
    visit.front = front_of(answer.headers)
    who = f"{visit.front} in front" if visit.front else "nobody seen in front"
    if answer.status_code == 200 and answer.text == '{"status": "ok"}':
        yield ok("address", f"{visit.url} is reached, {who}")
        return
    visit.failed = True
    said = f"something else answers at {visit.url}/healthz, with {answer.status_code}"
    yield error("address", said, "Pass every path on to HOST:PORT of this instance, and let it run.")


def _http_version(visit: Visit) -> Iterator[Finding]:
    url = urlsplit(visit.url)
    if url.scheme == "http":
        if is_loopback(url.hostname):
            yield ok("http", "plain HTTP/1.1, on this machine")
        else:
            yield error("http", "keys travel in the clear: http://", "Put TLS in front, and redirect nothing but GET.")
        return
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # whom to trust was settled when it was reached
    context.set_alpn_protocols(["h2", "http/1.1"])
    with (
        socket.create_connection((str(url.hostname), url.port or 443), timeout=_SHORT_PATIENCE_S) as sock,
        context.wrap_socket(sock, server_hostname=url.hostname) as secured,
    ):
        if secured.selected_alpn_protocol() == "h2":
            yield ok("http", f"HTTP/2 over {secured.version()}")
        else:
            yield warning("http", "no HTTP/2: browsers open six connections at most", visit.cure("http2"))


def _metrics_hidden(visit: Visit) -> Iterator[Finding]:
    url = urlsplit(visit.url)
    with visit.client() as client:
        answer = client.get("/metrics", headers={"Authorization": ""})
    if (url.hostname, url.port) == visit.own_address and is_loopback(url.hostname):
        yield ok("metrics", "this is the gateway's own address: whoever comes from this machine may see /metrics")
    elif answer.status_code == 200 and "proxysite_" in answer.text:
        yield error("metrics", "everybody may read /metrics", visit.cure("metrics"))
    else:
        yield ok("metrics", f"/metrics is hidden ({answer.status_code})")


def _key_accepted(visit: Visit) -> Iterator[Finding]:
    with visit.client() as client:
        answer = client.get("/v1/models")
    if answer.status_code == 200:
        whose = "the sandbox's key" if visit.is_sandbox else "the key"
        yield ok("key", f"{whose} is accepted")
        return
    is_limited = visit.is_limited("key", answer)
    if is_limited and answer.status_code == 429:
        return  # other requests may pass
    visit.failed = True
    if is_limited:
        yield error("limits", f"nothing was looked at: {visit.refusals.said}", visit.refusals.cure)
        return
    cure = (
        "Does the instance at this address run with SANDBOX_ENABLED=true and this SANDBOX_KEY? Or give --key."
        if visit.is_sandbox
        else "Give a key that the upstream accepts."
    )
    yield error("key", f"the key is answered with {answer.status_code}: nothing further can be tried", cure)


# Down


def _events(visit: Visit) -> Iterator[Finding]:
    arrivals, answer = _streamed(visit, visit.url)
    if visit.is_limited("streams", answer):
        return
    if answer.status_code != 200:
        is_busy = answer.status_code == 429
        cure = "The upstream limits this key: wait, or give another --key." if is_busy else _ANOTHER_MODEL
        yield error("streams", f"a stream is answered with {answer.status_code}", cure)
        return
    coding = answer.headers.get("content-encoding", "")
    if trouble := _stream_trouble(visit, arrivals):
        yield error("streams", f"{trouble}, {_where(visit)}", visit.cure("stream"))
    elif coding:
        yield warning("streams", f"events are compressed on the way ({coding})", visit.cure("stream"))
    else:
        yield ok("streams", f"{arrivals.count} events arrived over {arrivals.spread_s:.1f} s, each as it was sent")


def _streamed(visit: Visit, url: str) -> tuple[Arrivals, httpx.Response]:
    """Return when the events of one stream arrived through `url`, and the answer, with its body if it is an error."""
    body = {
        "model": visit.streaming_model,
        "stream": True,
        "max_completion_tokens": 8 if visit.is_sandbox else 60,
        "messages": [{"role": "user", "content": "Count from one to twenty, please, in words."}],
    }
    arrivals = Arrivals()
    with visit.client() as client, client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            answer.read()
            return arrivals, answer
        for part in answer.iter_bytes():
            arrivals.add(part.count(b"\n\n"))
    return arrivals, answer


def _stream_trouble(visit: Visit, arrivals: Arrivals) -> str:
    sent_s = _SANDBOX_PAUSE_S * (arrivals.count - 1) if visit.is_sandbox else None
    return arrivals.trouble(sent_s=sent_s, what="events")


def _where(visit: Visit) -> str:
    """Return where events are held back: the gateway itself, if it is on this machine, is asked for the same."""
    host, port = visit.own_address
    own_url = f"http://{_SELF.get(host, host)}:{port}"
    if own_url == visit.url:
        return "from the gateway itself: is the upstream slow to begin?"
    try:
        arrivals, answer = _streamed(visit, own_url)
    except httpx.HTTPError:
        answer = httpx.Response(502)
    if visit.is_limited("where streams are held back", answer):
        return "held back somewhere on the way"
    if answer.status_code != 200:
        return f"held back somewhere on the way: the gateway itself does not answer here, at {own_url}"
    if _stream_trouble(visit, arrivals):
        return f"and so from the gateway itself, at {own_url}: it is the upstream, or what stands before that"
    front = visit.front or "what stands in front"
    return f"held back by {front}: from the gateway itself, at {own_url}, they come one by one"


def _parts(visit: Visit) -> Iterator[Finding]:
    """Look at an answer in parts that is no event stream: speech, of which only the sandbox's pace is known."""
    if not visit.is_sandbox:
        return
    body = {"model": "sandbox-slow", "voice": "alloy", "input": "Hello!"}
    arrivals = Arrivals()
    with visit.client() as client, client.stream("POST", "/v1/audio/speech", json=body) as answer:
        if answer.status_code != 200:
            answer.read()
            if visit.is_limited("answers", answer):
                return
        else:
            for _ in answer.iter_raw():
                arrivals.add(1)
    sent_s = _SANDBOX_PAUSE_S * (SLOW_SPEECH_PARTS - 1)
    if trouble := arrivals.trouble(sent_s=sent_s, what="parts", count=SLOW_SPEECH_PARTS):
        yield warning("answers", f"of speech, {trouble}", visit.cure("body"))
    else:
        yield ok("answers", f"speech arrived over {arrivals.spread_s:.1f} s, as it was sent")


# Up


def _uploads(visit: Visit) -> Iterator[Finding]:
    """Send a body with a pause in it, and see in `Server-Timing` whether the gateway waited for its end."""
    body = json.dumps({"model": "proxysite-doctor", "messages": []}).encode()

    def in_two_halves() -> Iterator[bytes]:
        yield body[:10]
        time.sleep(_UPLOAD_PAUSE_S)
        yield body[10:]

    headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    with visit.client() as client:
        answer = client.post("/v1/chat/completions", content=in_two_halves(), headers=headers)
    if visit.is_limited("uploads", answer):
        return
    waited_ms = _proxy_ms(answer.headers.get("server-timing", ""))
    if waited_ms is None:
        cure = "Let the field Server-Timing pass."
        yield warning("uploads", "not measured: Server-Timing is taken out on the way", cure)
    elif waited_ms < _UPLOAD_PAUSE_S * 1000 / 2:
        said = "request bodies are held back until they are whole: uploads take twice as long"
        yield warning("uploads", said, visit.cure("upload"))
    else:
        yield ok("uploads", "request bodies arrive as they are sent")


def _proxy_ms(server_timing: str) -> float | None:
    for metric in server_timing.split(","):
        name, _, duration = metric.strip().partition(";dur=")
        if name == "proxy":
            with contextlib.suppress(ValueError):
                return float(duration)
    return None


def _size(visit: Visit) -> Iterator[Finding]:
    """Announce a large body, and see whether anybody refuses it by its head alone."""
    url = urlsplit(visit.url)
    head = (
        f"POST {url.path}/v1/files HTTP/1.1\r\nHost: {url.netloc}\r\nAuthorization: Bearer {visit.key}\r\n"
        f"Content-Type: application/octet-stream\r\nContent-Length: {_LARGE_BODY_BYTES}\r\n\r\n"
    )
    port = url.port or (443 if url.scheme == "https" else 80)
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(socket.create_connection((str(url.hostname), port), timeout=_SHORT_PATIENCE_S))
        if url.scheme == "https":
            sock = stack.enter_context(visit.context.wrap_socket(sock, server_hostname=url.hostname))
        sock.settimeout(2.0)
        sock.sendall(head.encode("latin-1"))
        status, headers, answer = _answer_on(sock)
    if visit.refusals.note("size", status, headers, answer):
        return
    mib = _LARGE_BODY_BYTES >> 20
    request_id = headers.get("x-proxy-request-id")
    if status != 413 or (request_id and request_id != headers.get("x-request-id")):
        # Refused by what lies behind all this, it was let in, too.
        yield ok("size", f"bodies of {mib} MiB are let in")
    elif request_id:
        yield warning("size", f"bodies of {mib} MiB are refused here", "Raise MAX_BODY_BYTES: OpenAI takes such files.")
    else:
        yield warning("size", f"bodies of {mib} MiB are refused on the way", visit.cure("size"))


def _answer_on(sock: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Return status, fields and body of what a server says, status 0 if it waits."""
    answer = http.client.HTTPResponse(sock)
    try:
        answer.begin()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read(65536)
    except TimeoutError:
        return 0, {}, b""


# WebSocket and errors


def _websocket(visit: Visit) -> Iterator[Finding]:
    url = f"ws{visit.url.removeprefix('http')}/v1/realtime?model=gpt-realtime"
    is_secure = visit.url.startswith("https")
    try:
        with connect(
            url,
            additional_headers={"Authorization": f"Bearer {visit.key}"},
            ssl=visit.context if is_secure else None,
            proxy=None,
            open_timeout=_PATIENCE_S,
        ) as websocket:
            first = str(websocket.recv(timeout=_SHORT_PATIENCE_S))
    except InvalidStatus as exc:
        response = exc.response
        if visit.refusals.note("websocket", response.status_code, response.headers, bytes(response.body)):
            return
        # Of what came as WebSocket the gateway says no Server-Timing.
        if "server-timing" in response.headers or "x-proxy-request-id" not in response.headers:
            said = f"WebSockets do not pass: the upgrade is answered with {response.status_code}"
            yield error("websocket", said, visit.cure("websocket"))
        else:
            yield ok("websocket", f"handshakes pass; the upstream answers with {response.status_code}")
    except (WebSocketException, OSError) as exc:
        yield error("websocket", f"WebSockets do not pass: {type(exc).__name__}", visit.cure("websocket"))
    else:
        said = "WebSockets pass" if "session.created" in first else "WebSockets pass; the first message is unexpected"
        yield ok("websocket", said)


def _errors(visit: Visit) -> Iterator[Finding]:
    """Ask for an error, and see whether clients get it as OpenAI's SDKs want it."""
    if not visit.is_sandbox:
        return
    body = {"model": "sandbox-503", "messages": [{"role": "user", "content": "x"}]}
    with visit.client() as client:
        answer = client.post("/v1/chat/completions", json=body)
    if visit.is_limited("errors", answer):
        return
    is_whole = answer.status_code == 503 and answer.headers.get("retry-after") == "1" and '"error"' in answer.text
    if is_whole:
        yield ok("errors", "errors pass with their body")
    else:
        yield error("errors", "errors are replaced on the way", visit.cure("errors"))


def _limits(visit: Visit) -> Iterator[Finding]:
    """Say once what the key's limits have kept from being looked at."""
    if visit.refusals:
        yield warning(
            "limits",
            f"this key, or this address, is limited here; not looked at: {visit.refusals.said}",
            visit.refusals.cure,
        )
