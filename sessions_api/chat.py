"""`POST /pro/chat/completions`: one turn of a conversation, history to upstream to answer to stored.

Raw ASGI, because a turn waits for its upstream and shall hold no thread meanwhile. The call goes through the gateway's
own relay, in process: its transport, limits, metering and journal are those of /v1.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from django.conf import settings
from django.db import Error
from django.utils import timezone

from billing import keys
from gateway import headers as wire
from gateway.asgi import Message, Receive, Scope, Send
from gateway.endings import ClientLeftError
from gateway.errors import ResponseCutError
from gateway.relay import Relay
from proxysite.envelope import ProError, encode_json
from sessions_api import services, wording
from sessions_api.answers import Answer, Collector
from sessions_api.chat_request import ChatRequest, read_request
from sessions_api.context import Said, estimated_tokens, messages_for
from sessions_api.leases import Abandonment, LeaseKeeper, Queues
from sessions_api.replies import Reply
from sessions_api.sealing import UnreadableError
from sessions_api.threads import Threads
from sessions_api.turns import Caller, SessionBusyError, Turn, TurnLostError, new_token

logger = logging.getLogger("sessions_api.chat")

PATH = b"/pro/chat/completions"
_UPSTREAM_PATH = b"/v1/chat/completions"
# What of the caller's own head concerns the upstream, or the gateway: whom proxies name goes no further than there.
_PASSED = (b"user-agent", b"openai-organization", b"openai-project", b"x-forwarded-for")
_BUSY_RETRY_AFTER_S = 2
_POLL_LEAST_S, _POLL_MOST_S = 0.05, 0.5


class Chat:
    """The ASGI application behind PATH, of one worker."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._threads = Threads()
        self._keeper = LeaseKeeper(self._threads)
        self._queues = Queues()
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(scope, send)
        client = _Client(scope)
        self._open += 1
        try:
            await self._answer(scope, receive, reply, client)
        except (ClientLeftError, asyncio.CancelledError) as exc:
            await client.settle(exc, reply)
        except ProError as error:
            await reply.fail(error)
        except Error as exc:
            # By name: the text of a database's error may hold a row's values.
            logger.error("a turn failed in the database: %s", type(exc).__name__)
            await reply.fail(ProError(503, wording.STORE_AWAY, retry_after_s=1))
        finally:
            self._open -= 1

    def close(self) -> None:
        """End the threads and the keeping of leases; those still held end by themselves."""
        self._keeper.close()
        self._threads.close()

    async def _answer(self, scope: Scope, receive: Receive, reply: Reply, client: _Client) -> None:
        if scope["method"] == "OPTIONS" and wire.is_preflight(scope["headers"]):
            await reply.allow(scope["headers"])
            return
        if scope["method"] != "POST":
            raise ProError(405, wording.METHOD_NOT_ALLOWED)
        if self._open > settings.MAX_OPEN_STREAMS:
            raise ProError(503, wording.OVERLOADED, retry_after_s=1)
        request = await read_request(scope, receive)
        client.watch()
        fingerprint = self._relay.metering.fingerprint(request.api_key)
        caller = Caller(request.api_key, fingerprint, keys.hint(request.api_key))
        collector = Collector((lambda piece: reply.piece(piece, collector.headers)) if request.is_stream else None)
        async with self._turn(caller, request) as (turn, abandonment):
            with client.leaving(abandonment.begin):
                answer = await self._ask_upstream(turn, request, client, collector)
            await self._store(turn, caller, request, answer)
        if request.is_stream:
            if answer.text and not collector.is_stream:
                await reply.piece(answer.text, collector.headers)
            await reply.done(collector.headers)
        else:
            await reply.succeed(answer.text, collector.headers)

    # The session

    @contextlib.asynccontextmanager
    async def _turn(self, caller: Caller, request: ChatRequest) -> AsyncIterator[tuple[Turn, Abandonment]]:
        """Enter with the session taken, and leave with it free. Raises ProError 409 after SESSION_WAIT_SECONDS.

        A turn whose abandonment has begun is to be left by an exception.
        """
        token = new_token()
        deadline_s = time.monotonic() + settings.SESSION_WAIT_SECONDS
        session = (caller.fingerprint, request.session_id)
        try:
            async with self._queues.first_of(session, timeout_s=settings.SESSION_WAIT_SECONDS) as let_next:
                abandonment = Abandonment(lambda: self._abandon(caller, request, token, let_next))
                try:
                    turn = await self._begun(caller, request, token, deadline_s)
                    self._keeper.hold(turn)
                    yield turn, abandonment
                except BaseException:
                    await abandonment.complete()
                    raise
                finally:
                    self._keeper.let_go(token)
        except SessionBusyError:
            raise ProError(409, wording.SESSION_BUSY, retry_after_s=_BUSY_RETRY_AFTER_S) from None

    async def _begun(self, caller: Caller, request: ChatRequest, token: str, deadline_s: float) -> Turn:
        """Return the turn once the session is free, wherever it was taken. Raises SessionBusyError."""
        pause_s = _POLL_LEAST_S
        while True:
            try:
                return await self._threads.run(lambda: _begin(caller, request, token))
            except SessionBusyError:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    raise
            await asyncio.sleep(min(left_s, pause_s * random.uniform(0.5, 1)))  # noqa: S311 - no secret
            pause_s = min(_POLL_MOST_S, pause_s * 1.5)

    async def _abandon(self, caller: Caller, request: ChatRequest, token: str, let_next: Callable[[], None]) -> None:
        self._keeper.let_go(token)
        try:
            with contextlib.suppress(Error):  # then the lease ends by itself
                await self._threads.run(lambda: services.abandon_turn(caller, request.session_id, token=token))
        finally:
            let_next()

    async def _store(self, turn: Turn, caller: Caller, request: ChatRequest, answer: Answer) -> None:
        said = [
            Said("user", request.content, estimated_tokens(request.content)),
            Said("assistant", answer.text, answer.tokens),
        ]
        try:
            await self._threads.run(
                lambda: services.store_turn(turn, said, caller=caller, model=request.model, now=timezone.now())
            )
        except TurnLostError:
            raise ProError(409, wording.SESSION_LOST) from None

    # The upstream

    async def _ask_upstream(self, turn: Turn, request: ChatRequest, client: _Client, collector: Collector) -> Answer:
        """Return the whole answer. Raises ProError, ClientLeftError."""
        body = _completion_request(turn, request)
        try:
            await self._relay(client.upstream_scope(request, len(body)), _receive(body), collector.send)
        except ResponseCutError:
            collector.was_cut = True
        if client.has_left or not collector.status:
            raise ClientLeftError
        return collector.answer()


class _Client:
    """The connection of whoever asks: when it ends, so does the work."""

    def __init__(self, scope: Scope) -> None:
        self.has_left = False
        self._on_leave: Callable[[], None] | None = None
        self._scope = scope
        self._task: Any = asyncio.current_task()

    def watch(self) -> None:
        """Cancel this task when the client leaves; the request's body must have been received."""
        self._on_disconnect(self._task.cancel)

    def _on_disconnect(self, callback: Callable[[], Any]) -> None:
        def leave() -> None:
            self.has_left = True
            if self._on_leave is not None:
                self._on_leave()
            callback()

        self._scope["on_disconnect"](leave)

    @contextlib.contextmanager
    def leaving(self, on_leave: Callable[[], None]) -> Iterator[None]:
        """Call `on_leave` if the client leaves within the block, whose work may go on for the upstream's usage."""
        self._on_leave = on_leave
        try:
            yield
        finally:
            self._on_leave = None

    def upstream_scope(self, request: ChatRequest, body_bytes: int) -> Scope:
        """Return the ASGI scope of the upstream call, as if this client had made it on /v1."""
        headers = [
            (b"authorization", b"Bearer " + request.api_key),
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % body_bytes),
            (b"accept", b"text/event-stream" if request.is_stream else b"application/json"),
            (b"accept-encoding", b"identity"),
            *(pair for pair in self._scope["headers"] if pair[0] in _PASSED),
        ]
        return {
            "type": "http",
            "method": "POST",
            "raw_path": _UPSTREAM_PATH,
            "target": _UPSTREAM_PATH,
            "headers": headers,
            "client": self._scope.get("client"),
            "on_disconnect": self._on_disconnect,
        }

    async def settle(self, exc: BaseException, reply: Reply) -> None:
        """End a cancelled request: nobody is there to answer, or the server stops and says so."""
        if isinstance(exc, asyncio.CancelledError):
            self._task.uncancel()
            if not self.has_left:
                await reply.fail(ProError(503, wording.RESTARTING, retry_after_s=1))


def _begin(caller: Caller, request: ChatRequest, token: str) -> Turn:
    try:
        return services.begin_turn(caller, request.session_id, model=request.model, token=token, now=timezone.now())
    except UnreadableError as exc:
        logger.error("a session cannot be decrypted: %s", exc)
        raise ProError(500, wording.UNREADABLE) from exc


def _completion_request(turn: Turn, request: ChatRequest) -> bytes:
    messages = messages_for(
        turn.history,
        request.content,
        system_prompt=settings.SESSION_SYSTEM_PROMPT,
        most_tokens=settings.SESSION_CONTEXT_TOKENS,
        most_messages=settings.SESSION_CONTEXT_MESSAGES,
    )
    fields: dict[str, Any] = {"model": request.model, "messages": messages}
    if request.is_stream:
        fields["stream"] = True
        if settings.SPLICE_USAGE:
            fields["stream_options"] = {"include_usage": True}
    return encode_json(fields)


def _receive(body: bytes) -> Receive:
    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive
