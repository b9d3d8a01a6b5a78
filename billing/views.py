"""What a developer asks with his key: balance and usage at /pro, and the routes that apps' balance boxes call."""

from __future__ import annotations

import csv
import datetime as dt
import functools
import io
import logging
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from decimal import Decimal
from typing import Any

import msgspec
from asgiref.sync import sync_to_async
from django.conf import settings
from django.db import DatabaseError
from django.http import HttpRequest, HttpResponse, HttpResponseBase, StreamingHttpResponse
from django.utils import timezone
from django.views.decorators.csrf import csrf_exempt

from billing import keys, rate, selectors
from billing.access import access_of
from billing.selectors import Balance, DailyCost, UsageRow
from billing.transactions import release_connection
from billing.upstream_balance import UpstreamBalanceError, fetch_balance
from proxysite.envelope import Message, ProError, encode_json, failure, success

logger = logging.getLogger(__name__)

MISSING_KEY = Message(
    "缺少 apiKey：请使用 Authorization: Bearer 请求头，或 apiKey 查询参数",
    "The API key is missing: send it as Authorization: Bearer, or as the query parameter apiKey.",
)
UNKNOWN_KEY = Message("该密钥没有使用记录", "This API key has never been used here.")
REFUSED_KEY = Message("上游不接受该密钥", "The upstream does not accept this API key.")
TOO_MANY_REQUESTS = Message("请求过于频繁，请稍后再试", "Too many requests from this address; try again later.")
WRONG_NETWORK = Message("不允许从您的网络地址使用该密钥", "This API key may not be used from your network address.")
NO_UPSTREAM_BALANCE = Message("上游没有返回余额", "The upstream does not report a balance")
NO_LEDGER = Message("账务数据暂时不可用，请稍后再试", "The ledger cannot be read at the moment; try again later.")
METHOD_NOT_ALLOWED = Message("只支持 GET 请求", "Only GET is answered here.")
WRONG_DATE = Message(
    "日期必须为 YYYY-MM-DD，start 不晚于 end，且不超过 400 天",
    "start and end are dates as YYYY-MM-DD, in this order and at most 400 days apart.",
)

_MOST_DAYS = 400
_RETRY_AFTER_S = 5
_CSV_ROWS_AT_ONCE = 2000
_NEVER_ENDS = 4_102_444_800  # 2100-01-01
_BEARER = re.compile(r"Bearer +(\S+) *\Z", re.IGNORECASE)
_ISO_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_DATE = re.compile(r"(\d{4})-(\d{1,2})-(\d{1,2})(?:[T ].*)?\Z", re.DOTALL)

View = Callable[[HttpRequest], Coroutine[Any, Any, HttpResponseBase]]


# What all of these routes have in common


def _answers(render: Callable[[ProError], HttpResponse]) -> Callable[[View], View]:
    """Make a view answer from any origin, only GET, at a limited rate, and its errors the way `render` does."""

    def decorate(view: View) -> View:
        @functools.wraps(view)
        async def answer(request: HttpRequest) -> HttpResponseBase:
            if request.method == "OPTIONS":
                return _preflight(request)
            try:
                if request.method not in ("GET", "HEAD"):
                    raise ProError(405, METHOD_NOT_ALLOWED)
                await _limit_rate(request)
                response = await view(request)
            except DatabaseError as exc:
                logger.error("the ledger cannot be read: %s", type(exc).__name__)
                response = render(ProError(503, NO_LEDGER, retry_after_s=_RETRY_AFTER_S))
            except ProError as error:
                response = render(error)
                if error.status == 405:
                    response["Allow"] = "GET, HEAD, OPTIONS"
            response["Access-Control-Allow-Origin"] = "*"
            response["Access-Control-Expose-Headers"] = "Retry-After"
            response["Cache-Control"] = "no-store"
            return response

        # Nothing here reads a cookie; another method gets the 405 above, not Django's page on forgery.
        return csrf_exempt(answer)

    return decorate


def _preflight(request: HttpRequest) -> HttpResponse:
    response = HttpResponse(status=204)
    response["Access-Control-Allow-Origin"] = "*"
    response["Access-Control-Allow-Methods"] = "GET, HEAD, OPTIONS"
    # Echoed: "*" does not cover Authorization (https://fetch.spec.whatwg.org/#cors-non-wildcard-request-header-name).
    asked = request.headers.get("Access-Control-Request-Headers")
    response["Access-Control-Allow-Headers"] = asked or "authorization, content-type"
    response["Access-Control-Max-Age"] = "86400"
    response["Vary"] = "Origin, Access-Control-Request-Method, Access-Control-Request-Headers"
    if request.headers.get("Access-Control-Request-Private-Network") == "true":
        response["Access-Control-Allow-Private-Network"] = "true"
    return response


async def _limit_rate(request: HttpRequest) -> None:
    retry_after_s = await sync_to_async(rate.retry_after_s)(_address_of(request))
    if retry_after_s is not None:
        raise ProError(429, TOO_MANY_REQUESTS, retry_after_s=retry_after_s)


def _openai_error(error: ProError) -> HttpResponse:
    """Return OpenAI's error envelope: apps show its `error.message`."""
    codes = {401: "invalid_api_key", 403: "address_not_allowed", 405: "method_not_allowed", 429: "rate_limit_exceeded"}
    kind = {429: "rate_limit_error", 503: "server_error"}.get(error.status, "invalid_request_error")
    fields = {"message": error.message.en, "type": kind, "param": None, "code": codes.get(error.status)}
    response = _json({"error": fields}, status=error.status)
    if error.retry_after_s is not None:
        response["Retry-After"] = str(error.retry_after_s)
    return response


def _json(answer: Any, *, status: int = 200) -> HttpResponse:
    return HttpResponse(encode_json(answer), status=status, content_type="application/json")


def _bearer_key(request: HttpRequest) -> str:
    found = _BEARER.match(request.headers.get("Authorization", "").strip())
    return found[1] if found else ""


def _take_query_key(request: HttpRequest) -> str:
    """Return the query's `apiKey`, and take it out of the request: whatever is logged of it from here on is clean."""
    query = request.GET.copy()
    api_key = "".join(query.pop("apiKey", [""])[-1:]).strip()
    request.META["QUERY_STRING"] = query.urlencode()
    request.GET = query  # type: ignore[assignment]
    return api_key


def _address_of(request: HttpRequest) -> str:
    return request.META.get("REMOTE_ADDR") or ""


async def _checked_fingerprint(request: HttpRequest, api_key: str) -> str:
    """Return a key's fingerprint. Raises ProError 403 where the key may not be used from the client's address."""
    fingerprint = keys.fingerprint(api_key.encode("utf-8", "surrogateescape"), pepper=settings.KEY_PEPPER.encode())
    access = await sync_to_async(access_of)(fingerprint)
    if not access.allows(_address_of(request)):
        raise ProError(403, WRONG_NETWORK)
    return fingerprint


# /pro


@_answers(failure)
async def pro_balance(request: HttpRequest) -> HttpResponse:
    """`GET /pro/balance`, by Bearer or `?apiKey=`: `{"total", "balance", "used"}` in USD with two decimals."""
    api_key = _take_query_key(request) or _bearer_key(request)
    if not api_key:
        raise ProError(400, MISSING_KEY)
    fingerprint = await _checked_fingerprint(request, api_key)
    balance = (await _balance(api_key, fingerprint)).in_cents()
    return success({"total": balance.total, "balance": balance.balance, "used": balance.used})


async def _balance(api_key: str, fingerprint: str) -> Balance:
    now = timezone.now()
    if settings.BALANCE_SOURCE == "upstream":
        # There are few for the whole site, and an upstream may take half a minute.
        await sync_to_async(release_connection)()
        return await _balance_at_upstream(api_key, now)
    balance = await sync_to_async(selectors.balance_for_key)(fingerprint, now)
    if balance is None:
        raise ProError(404, UNKNOWN_KEY)
    return balance


async def _balance_at_upstream(api_key: str, now: dt.datetime) -> Balance:
    try:
        return await fetch_balance(api_key, now)
    except UpstreamBalanceError as exc:
        if exc.status == 401:
            raise ProError(401, REFUSED_KEY) from exc
        reason = Message(f"{NO_UPSTREAM_BALANCE.zh}（{exc}）", f"{NO_UPSTREAM_BALANCE.en} ({exc}).")
        raise ProError(502, reason) from exc


@_answers(failure)
async def pro_usage(request: HttpRequest) -> HttpResponseBase:
    """`GET /pro/usage?start=&end=&format=`: the key's own use by day, model and endpoint, as JSON or CSV."""
    api_key = _bearer_key(request)
    if not api_key:
        raise ProError(400, MISSING_KEY)
    start, end = _dates(request)
    fingerprint = await _checked_fingerprint(request, api_key)
    if request.GET.get("format") == "csv":
        if not await sync_to_async(selectors.is_known_key)(fingerprint):
            raise ProError(404, UNKNOWN_KEY)
        return _csv_response(fingerprint, start, end)
    is_known, rows = await sync_to_async(_known_rows)(fingerprint, start, end)
    if not is_known:
        raise ProError(404, UNKNOWN_KEY)
    return success(
        {
            "cost": _plain(sum((row.cost for row in rows), Decimal("0E-7"))),
            "unpriced_requests": sum(row.unpriced_requests for row in rows),
            "rows": [{**_columns(row), "cost": _plain(row.cost)} for row in rows],
        }
    )


def _columns(row: UsageRow) -> dict[str, Any]:
    return {name: getattr(row, name) for name in UsageRow.__slots__}


def _plain(amount: Decimal) -> msgspec.Raw:
    """Return an amount as a JSON number without an exponent."""
    return msgspec.Raw(f"{amount:f}")


def _known_rows(fingerprint: str, start: dt.date, end: dt.date) -> tuple[bool, list[UsageRow]]:
    # Both whatever the first says: how long an answer takes does not tell whether a key exists.
    return selectors.is_known_key(fingerprint), list(selectors.usage_rows(fingerprint, start, end))


def _dates(request: HttpRequest) -> tuple[dt.date, dt.date]:
    now = timezone.now()
    end = _date(request, "end") or now.date()
    window = now.date() - selectors.window_start(now)
    # As many days as a balance looks at, up to `end`, which may lie in the past.
    start = _date(request, "start") or min(now.date(), end) - min(window, end - dt.date.min)
    if not dt.timedelta() <= end - start <= dt.timedelta(days=_MOST_DAYS):
        raise ProError(400, WRONG_DATE)
    return start, end


def _date(request: HttpRequest, name: str) -> dt.date | None:
    """Return the date that the query names, None if it names none; ProError for anything but YYYY-MM-DD."""
    text = request.GET.get(name)
    if not text:
        return None
    try:
        # fromisoformat() by itself also takes weeks, and dates without hyphens.
        return dt.date.fromisoformat(text if _ISO_DATE.fullmatch(text) else "")
    except ValueError as exc:
        raise ProError(400, WRONG_DATE) from exc


def _csv_response(fingerprint: str, start: dt.date, end: dt.date) -> StreamingHttpResponse:
    response = StreamingHttpResponse(_csv(fingerprint, start, end), content_type="text/csv; charset=utf-8")
    response["Content-Disposition"] = f'attachment; filename="usage-{start}-{end}.csv"'
    return response


async def _csv(fingerprint: str, start: dt.date, end: dt.date) -> AsyncIterator[str]:
    yield _csv_lines([UsageRow.__slots__])
    last: UsageRow | None = None
    while rows := await sync_to_async(_rows_and_release)(fingerprint, start, end, last):
        yield _csv_lines([map(_cell, _columns(row).values()) for row in rows])
        last = rows[-1]


def _rows_and_release(fingerprint: str, start: dt.date, end: dt.date, behind: UsageRow | None) -> list[UsageRow]:
    """Return rows and hold no connection to the database while a slow client reads them."""
    rows = list(selectors.usage_rows(fingerprint, start, end, behind=behind, most=_CSV_ROWS_AT_ONCE))
    release_connection()
    return rows


def _csv_lines(rows: Any) -> str:
    buffer = io.StringIO()
    csv.writer(buffer).writerows(rows)
    return buffer.getvalue()


def _cell(value: object) -> object:
    # A model's name comes from a client, and spreadsheets run what begins like a formula.
    if isinstance(value, str) and value.startswith(tuple("=+-@＝＋－＠")):
        return f"'{value}"
    return f"{value:f}" if isinstance(value, Decimal) else value


# /dashboard/billing and /v1/dashboard/billing


@_answers(_openai_error)
async def subscription(request: HttpRequest) -> HttpResponse:
    """What the key was granted, as OpenAI's `billing_subscription`."""
    fingerprint = await _required_fingerprint(request)
    balance, grants = await sync_to_async(_balance_and_grants)(fingerprint)
    if balance is None:
        raise ProError(401, _INCORRECT_KEY)
    ends = [_epoch(grant.valid_until) if grant.valid_until else _NEVER_ENDS for grant in grants]
    return _json(
        {
            "object": "billing_subscription",
            "has_payment_method": True,
            "canceled": False,
            "canceled_at": None,
            "delinquent": None,
            "access_until": max(ends, default=_NEVER_ENDS),
            "soft_limit_usd": balance.total,
            "hard_limit_usd": balance.total,
            "system_hard_limit_usd": balance.total,
            "plan": {"title": "Pay-as-you-go", "id": "payg"},
        }
    )


@_answers(_openai_error)
async def usage(request: HttpRequest) -> HttpResponse:
    """What the key used, in US cents, as OpenAI's usage list.

    Dates that are missing or make no sense mean the last USAGE_WINDOW_DAYS. The end is inclusive: of the apps that
    send one, some mean tomorrow and some the last day of the month, and neither may lose today.
    """
    fingerprint = await _required_fingerprint(request)
    now = timezone.now()
    start = _tolerant_date(request.GET.get("start_date")) or selectors.window_start(now)
    end = _tolerant_date(request.GET.get("end_date")) or now.date() + dt.timedelta(days=1)
    is_known, costs = await sync_to_async(_known_costs)(fingerprint, start, end)
    if not is_known:
        raise ProError(401, _INCORRECT_KEY)
    total = sum((cost.cost_usd for cost in costs), Decimal(0))
    return _json({"object": "list", "daily_costs": _daily_costs(costs), "total_usage": _cents(total)})


@_answers(_openai_error)
async def credit_grants(request: HttpRequest) -> HttpResponse:
    """What the key was granted, used and has left, as OpenAI's `credit_summary`."""
    fingerprint = await _required_fingerprint(request)
    balance, grants = await sync_to_async(_balance_and_grants)(fingerprint)
    if balance is None:
        raise ProError(401, _INCORRECT_KEY)
    return _json(
        {
            "object": "credit_summary",
            "total_granted": balance.total,
            "total_used": balance.used,
            "total_available": balance.balance,
            "grants": {"object": "list", "data": _credit_grants(grants, balance.used)},
        }
    )


_NO_KEY = Message(
    "缺少密钥：请使用 Authorization: Bearer 请求头",
    "You didn't provide an API key. Send it in an Authorization header, as Bearer YOUR_KEY.",
)
_INCORRECT_KEY = Message("密钥不正确", "Incorrect API key provided: it has never been used here.")


async def _required_fingerprint(request: HttpRequest) -> str:
    api_key = _bearer_key(request)
    if not api_key:
        raise ProError(401, _NO_KEY)
    return await _checked_fingerprint(request, api_key)


def _balance_and_grants(fingerprint: str) -> tuple[Balance | None, list[Any]]:
    now = timezone.now()
    return selectors.balance_for_key(fingerprint, now), selectors.grants_of_key(fingerprint, now)


def _known_costs(fingerprint: str, start: dt.date, end: dt.date) -> tuple[bool, list[DailyCost]]:
    return selectors.is_known_key(fingerprint), selectors.daily_costs(fingerprint, start, end)


def _tolerant_date(text: str | None) -> dt.date | None:
    found = _DATE.match((text or "").strip())
    try:
        return dt.date(*map(int, found.groups())) if found else None
    except ValueError:
        return None


def _daily_costs(costs: list[DailyCost]) -> list[dict[str, Any]]:
    days: dict[dt.date, list[dict[str, Any]]] = {}
    for cost in costs:
        days.setdefault(cost.day, []).append({"name": cost.model or "other", "cost": _cents(cost.cost_usd)})
    return [
        {"timestamp": _epoch(dt.datetime.combine(day, dt.time(), dt.UTC)), "line_items": items}
        for day, items in days.items()
    ]


def _credit_grants(grants: list[Any], used_usd: Decimal) -> list[dict[str, Any]]:
    """Return OpenAI's list of grants, the use taken from those that end first."""
    listed = []
    for grant in grants:
        used_here = min(grant.amount_usd, used_usd)
        used_usd -= used_here
        listed.append(
            {
                "object": "credit_grant",
                "id": str(grant.pk),
                "grant_amount": grant.amount_usd,
                "used_amount": used_here,
                "effective_at": _epoch(grant.valid_from),
                "expires_at": _epoch(grant.valid_until) if grant.valid_until else _NEVER_ENDS,
            }
        )
    return listed


def _cents(amount_usd: Decimal) -> Decimal:
    return (amount_usd * 100).quantize(Decimal("0.00001"))


def _epoch(moment: dt.datetime) -> int:
    return int(moment.timestamp())
