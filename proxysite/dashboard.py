"""The admin's first page: what was used, what it cost, and whether all is well."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from django.conf import settings
from django.http import HttpRequest
from django.utils import timezone
from django.utils.formats import date_format, number_format
from django.utils.translation import gettext as _

from billing import dashboard
from billing.dashboard import PERIODS, Period, Point, Total
from gateway.workers import live_workers
from proxysite import health

_PERIOD_NAMES = {"24h": "24 h", "7d": "7 d", "90d": "90 d"}
_SUFFIXES = ((10**12, "T"), (10**9, "B"), (10**6, "M"))
# Of the theme: the columns of a chart, and what of them went wrong.
_COLOR = "var(--color-primary-600)"
_SECOND_COLOR = "var(--color-base-400)"
_ERROR_COLOR = "#ef4444"


@dataclass(frozen=True, slots=True)
class Card:
    """One figure of today. `change` is that against yesterday at this time; None where there is nothing to compare."""

    title: str
    value: str
    change: str | None
    is_worse: bool
    yesterday: str


def context(request: HttpRequest) -> dict[str, Any]:
    """Return what the page shows this operator; without the right to see usage, nothing of it."""
    if not request.user.has_perm("billing.view_usageday"):
        return {"shows_usage": False}
    now = timezone.now()
    asked = request.GET.get("period")
    period = next((known for known in PERIODS if known.name == asked), PERIODS[0])
    workers = live_workers(now)
    points = dashboard.series(period, now)
    return {
        "shows_usage": True,
        "now": now,
        "period": period.name,
        "periods": [(known.name, _period_name(known)) for known in PERIODS],
        "cards": _cards(dashboard.today(now)),
        "totals": _totals(points),
        "charts": _charts(points, is_hourly=bool(period.hours)),
        "top_models": _ranked(dashboard.top_models(period, now), lambda model: model or _("(none)")),
        "top_keys": _ranked(dashboard.top_keys(period, now), lambda key: key),
        "unpriced": dashboard.unpriced_models(now, days=settings.USAGE_WINDOW_DAYS),
        "window_days": settings.USAGE_WINDOW_DAYS,
        "open_streams": number(workers.open_streams),
        "health": health.items(workers, now),
    }


def _period_name(period: Period) -> str:
    return {
        "24h": _("24 hours"),
        "7d": _("7 days"),
        "90d": _("90 days"),
    }[period.name]


def _cards(today: dashboard.Today) -> list[Card]:
    rows: tuple[tuple[str, Callable[[Total], Any], Callable[[Any], str], bool], ...] = (
        (_("Requests"), lambda total: total.requests, number, False),
        (_("Tokens"), lambda total: total.tokens, number, False),
        (_("Spend"), lambda total: total.cost_usd, usd, False),
        (_("Error rate"), lambda total: total.error_rate, percent, True),
        (_("Added latency"), lambda total: total.added_ms, milliseconds, True),
        (_("Time to first token"), lambda total: total.first_byte_ms, milliseconds, True),
    )
    cards = []
    for title, figure, written, is_bad in rows:
        value, before = figure(today.so_far), figure(today.yesterday_so_far)
        change = None if value is None or not before else float(value) / float(before) - 1
        cards.append(
            Card(
                title=title,
                value=written(value),
                change=None if change is None else f"{round(change, 2) + 0.0:+.0%}",
                is_worse=is_bad and change is not None and change > 0,
                yesterday=written(figure(today.yesterday)),
            )
        )
    return cards


def _totals(points: list[Point]) -> list[tuple[str, str]]:
    total = sum((point.total for point in points), Total())
    return [
        (_("Requests"), number(total.requests)),
        (_("Tokens"), number(total.tokens)),
        (_("Spend"), usd(total.cost_usd)),
        (_("Error rate"), percent(total.error_rate)),
        (_("Added latency"), milliseconds(total.added_ms)),
        (_("Time to first token"), milliseconds(total.first_byte_ms)),
    ]


def _charts(points: list[Point], *, is_hourly: bool) -> list[dict[str, str]]:
    labels = [f"{point.at:%H:%M}" if is_hourly else date_format(point.at, "MONTH_DAY_FORMAT") for point in points]
    totals = [point.total for point in points]
    bars = {"maxBarThickness": 24, "borderRadius": 2, "displayYAxis": True, "maxTicksXLimit": 6}
    line = {"borderColor": _COLOR, "pointRadius": 0, "tension": 0.3, "spanGaps": True, **bars}

    def chart(title: str, kind: str, *datasets: dict[str, Any]) -> dict[str, str]:
        return {"title": title, "kind": kind, "data": json.dumps({"labels": labels, "datasets": datasets})}

    def column(label: str, values: list[Any], color: str = _COLOR) -> dict[str, Any]:
        return {"label": label, "data": values, "backgroundColor": color, "stack": "all", **bars}

    return [
        chart(
            _("Requests"),
            "bar",
            column(_("successful"), [total.requests - total.errors for total in totals]),
            column(_("failed"), [total.errors for total in totals], _ERROR_COLOR),
        ),
        chart(_("Tokens"), "bar", column(_("tokens"), [total.tokens for total in totals])),
        chart(_("Spend (USD)"), "bar", column(_("USD"), [round(float(total.cost_usd), 4) for total in totals])),
        chart(
            _("Error rate (%)"),
            "line",
            {
                **line,
                "label": "%",
                "data": [None if total.error_rate is None else round(total.error_rate * 100, 2) for total in totals],
                "borderColor": _ERROR_COLOR,
            },
        ),
        chart(
            _("Time to first token (ms)"),
            "line",
            {**line, "label": "ms", "data": [_rounded(total.first_byte_ms) for total in totals]},
        ),
        chart(
            _("Added latency (ms)"),
            "line",
            {**line, "label": "ms", "data": [_rounded(total.added_ms) for total in totals]},
        ),
    ]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def _ranked(found: list[tuple[Any, Total]], name: Callable[[Any], Any]) -> list[dict[str, Any]]:
    most = max((total.cost_usd for _what, total in found), default=Decimal(0))
    return [
        {
            "what": name(what),
            "requests": number(total.requests),
            "tokens": number(total.tokens),
            "spend": usd(total.cost_usd),
            "share": round(total.cost_usd / most * 100) if most else 0,
        }
        for what, total in found
    ]


def number(value: float) -> str:
    """Return a count that fits a card: 12,345 and 1.23 M."""
    for size, suffix in _SUFFIXES:
        if abs(value) >= size:
            return f"{value / size:.2f} {suffix}"
    return number_format(value, use_l10n=False, force_grouping=True) if value < 1000 else f"{value:,.0f}"


def usd(value: Decimal) -> str:
    return f"${value:,.2f}" if value == 0 or abs(value) >= Decimal("0.01") else f"${value:.4f}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2%}"


def milliseconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.1f} ms"
