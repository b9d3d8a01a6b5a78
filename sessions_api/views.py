"""What developers do with the sessions of their key: list, read, delete, import, export."""

from __future__ import annotations

import hmac
import logging
from typing import Any
from urllib.parse import unquote_to_bytes

from django.conf import settings
from django.db import Error
from django.http import HttpResponse
from django.http.response import HttpResponseBase
from django.utils import timezone
from rest_framework.parsers import JSONParser
from rest_framework.request import Request
from rest_framework.views import APIView

from billing import keys, rate
from billing.access import access_of
from billing.views import TOO_MANY_REQUESTS
from gateway import headers as wire
from proxysite.envelope import ProError, failure, success
from sessions_api import paging, schema, selectors, services, wording
from sessions_api.chat_request import checked_api_key, checked_session_id, json_fields, model_in
from sessions_api.models import ChatSession
from sessions_api.sealing import UnreadableError
from sessions_api.selectors import Remembered
from sessions_api.serializers import HistorySerializer, SessionPageSerializer, SessionSerializer, said_in
from sessions_api.turns import Caller, SessionBusyError

logger = logging.getLogger(__name__)

_BUSY_RETRY_AFTER_S = 2


class SessionsView(APIView):
    """What all of these routes have in common: for whom, how often, from which origin, and how they fail.

    Every answer is the envelope, whatever `Accept` says. `caller` is who asks; `is_used_key` whether the upstream has
    ever taken his key.
    """

    # What the reference says of a body; nothing is read by it.
    parser_classes = (JSONParser,)
    caller: Caller
    is_used_key: bool

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """Let a request pass, or raise ProError 400, 403, 405 or 429. Nothing here looks at any session."""
        if request.method == "OPTIONS":
            return
        if request.method not in self.allowed_methods:
            raise ProError(405, wording.methods(", ".join(self.allowed_methods)))
        self.caller = _caller_of(request)
        access = access_of(self.caller.fingerprint)
        if access.is_blocked:
            raise ProError(403, wording.GATEWAY["key_blocked"])
        if not access.allows(_address_of(request)):
            raise ProError(403, wording.GATEWAY["address_not_allowed"])
        self.is_used_key = access.is_used
        if not self.is_used_key:  # it may be a guess
            _limit_rate(request)

    def options(self, request: Request, *args: Any, **kwargs: Any) -> HttpResponse:  # type: ignore[override]
        """Answer a CORS preflight."""
        response = HttpResponse(status=204)
        for name, value in wire.preflight(_raw_headers(request)):
            response[name.decode()] = value.decode("latin-1")
        return response

    def handle_exception(self, exc: Exception) -> HttpResponseBase:  # type: ignore[override]
        if isinstance(exc, ProError):
            return failure(exc)
        if isinstance(exc, SessionBusyError):
            return failure(ProError(409, wording.SESSION_BUSY, retry_after_s=_BUSY_RETRY_AFTER_S))
        if isinstance(exc, UnreadableError):
            logger.error("a session cannot be decrypted: %s", exc)
            return failure(ProError(500, wording.UNREADABLE))
        if isinstance(exc, Error):
            # By name: the text of a database's error may hold a row's values.
            logger.error("a request about sessions failed in the database: %s", type(exc).__name__)
            return failure(ProError(503, wording.STORE_AWAY, retry_after_s=1))
        return super().handle_exception(exc)

    def finalize_response(  # type: ignore[override]
        self, request: Request, response: HttpResponseBase, *args: Any, **kwargs: Any
    ) -> HttpResponseBase:
        finished: HttpResponseBase = super().finalize_response(request, response, *args, **kwargs)  # type: ignore[arg-type]
        finished["Access-Control-Allow-Origin"] = "*"
        finished["Access-Control-Expose-Headers"] = "Retry-After"
        finished["Cache-Control"] = "no-store"
        return finished


class SessionList(SessionsView):
    """`/pro/sessions`: all sessions of the caller's key."""

    @schema.LIST
    def get(self, request: Request) -> HttpResponse:
        """Answer one page, the session with the newest message first."""
        query = request.query_params
        limit, after = paging.limit_in(query.get("limit")), paging.place_in(query.get("cursor"))
        sessions, last = selectors.page_of_sessions(self.caller.fingerprint, timezone.now(), after=after, limit=limit)
        page = {"sessions": sessions, "next": paging.cursor_of(last) if last else None}
        return success(SessionPageSerializer(page).data)

    @schema.DELETE_ALL
    def delete(self, request: Request) -> HttpResponse:
        """Forget all of them, those in which a message is being answered included."""
        count = selectors.sessions_of_key(self.caller.fingerprint, timezone.now()).count()
        services.delete_sessions_of_key(self.caller.fingerprint)
        return success({"deleted": count})


class SessionDetail(SessionsView):
    """`/pro/sessions/{sessionId}`"""

    @schema.READ
    def get(self, request: Request, session_id: str) -> HttpResponse:
        """Answer what was said, and when it will be forgotten."""
        return success(HistorySerializer(_history(self.caller, session_id)).data)

    @schema.DELETE_ONE
    def delete(self, request: Request, session_id: str) -> HttpResponse:
        """Forget it. A message that is being answered in it is not stored; the answer to it is then a 409."""
        name, now = _decoded(session_id), timezone.now()
        is_begun = selectors.has_turn_under_way(self.caller.fingerprint, name, now)
        was_live = services.delete_session(self.caller.fingerprint, name, now=now)
        if not (was_live or is_begun):
            raise ProError(404, wording.NOT_FOUND)
        return success({"deleted": 1})


class SessionImport(SessionsView):
    """`/pro/sessions/{sessionId}/import`"""

    @schema.IMPORT
    def post(self, request: Request, session_id: str) -> HttpResponse:
        """Put `messages` in the place of whatever the session holds."""
        name = _decoded(session_id)
        # Else whoever invents keys could fill what all keys share: nothing here asks an upstream about a key.
        if not (self.is_used_key or _has_conversed(self.caller) or _is_sandbox_key(self.caller)):
            raise ProError(403, wording.UNUSED_KEY)
        fields = json_fields(_json_body(request))
        session = services.import_session(
            self.caller, name, said_in(fields), model=model_in(fields), now=timezone.now()
        )
        return success(SessionSerializer(session).data)


class SessionExport(SessionsView):
    """`/pro/sessions/{sessionId}/export`"""

    @schema.EXPORT
    def get(self, request: Request, session_id: str) -> HttpResponse:
        """Answer the body of a request to /v1/chat/completions."""
        session, messages = _history(self.caller, session_id)
        said = [{"role": message.said.role, "content": message.said.content} for message in messages]
        return success({"model": session.model, "messages": said})


@schema.HIDDEN
class NoSuchRoute(SessionsView):
    """Whatever else is asked for below `/pro/sessions`."""

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        raise ProError(404, wording.NOT_FOUND)


def _caller_of(request: Request) -> Caller:
    given = wire.bearer_key(_raw_headers(request))
    if not given:
        raise ProError(400, wording.MISSING_KEY)
    api_key = checked_api_key(given)
    fingerprint = keys.fingerprint(api_key, pepper=settings.KEY_PEPPER.encode())
    return Caller(api_key, fingerprint, keys.hint(api_key))


def _has_conversed(caller: Caller) -> bool:
    """Return whether a turn of this key has been stored: the ledger hears of its first use a moment later."""
    return selectors.sessions_of_key(caller.fingerprint, timezone.now()).exists()


def _is_sandbox_key(caller: Caller) -> bool:
    return settings.SANDBOX_ENABLED and hmac.compare_digest(caller.api_key, settings.SANDBOX_KEY.encode())


def _limit_rate(request: Request) -> None:
    retry_after_s = rate.retry_after_s(_address_of(request))
    if retry_after_s is not None:
        raise ProError(429, TOO_MANY_REQUESTS, retry_after_s=retry_after_s)


def _address_of(request: Request) -> str:
    return request.META.get("REMOTE_ADDR") or ""


def _raw_headers(request: Request) -> wire.RawHeaders:
    return [(name.lower().encode(), value.encode("latin-1", "replace")) for name, value in request.headers.items()]


def _decoded(segment: str) -> str:
    """Return the sessionId of a path's segment, which is still percent-encoded. Raises ProError 400."""
    try:
        return checked_session_id(unquote_to_bytes(segment).decode())
    except UnicodeDecodeError:
        raise ProError(400, wording.field_characters("sessionId")) from None


def _history(caller: Caller, segment: str) -> tuple[ChatSession, list[Remembered]]:
    found = selectors.history_of(caller.fingerprint, _decoded(segment), api_key=caller.api_key, now=timezone.now())
    if found is None:
        raise ProError(404, wording.NOT_FOUND)
    return found


def _json_body(request: Request) -> bytes:
    content_type = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if not (content_type in ("application/json", "") or content_type.endswith("+json")):
        raise ProError(415, wording.NOT_JSON_TYPE)
    # Not `request.data`: without a Content-Length that is nothing at all.
    return request._request.read()
