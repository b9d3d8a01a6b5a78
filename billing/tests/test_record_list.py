from __future__ import annotations

import datetime as dt
import re
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.test import Client
from django.utils import timezone

from billing.admin.record_list import Cursor
from billing.models import ApiKey, UsageRecord
from billing.services import record_events
from billing.tests.samples import event

pytestmark = pytest.mark.django_db
URL = "/admin/billing/usagerecord/"
MINUTE = dt.timedelta(minutes=1)


@pytest.fixture
def operator(client: Client) -> Client:
    client.force_login(get_user_model().objects.create_superuser("operator"))
    return client


def walk(client: Client, url: str = URL) -> list[list[str]]:
    """Return the ids on each page, following the link to what is older until there is none."""
    pages = []
    while url:
        change_list: Any = client.get(url).context["cl"]
        pages.append([record.pk for record in change_list.result_list])
        url = URL + change_list.older_url if change_list.older_url else ""
        assert len(pages) < 100
    return pages


def ids(**wanted: Any) -> list[str]:
    return list(UsageRecord.objects.filter(**wanted).order_by("-started_at", "-pk").values_list("pk", flat=True))


def test_pages_follow_each_other_without_a_gap_or_an_overlap(operator: Client) -> None:
    now = timezone.now()
    # Several at one moment, and hours with many and with none.
    times = [now - MINUTE * 7 * (n // 3) for n in range(70)] + [
        now - dt.timedelta(days=3, minutes=n) for n in range(30)
    ]
    record_events([event(at=at) for at in times])
    pages = walk(operator)
    assert [pk for page in pages for pk in page] == ids()
    assert {len(page) for page in pages[:-1]} == {20}


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ("?model=rare", {"model": "rare"}),
        ("?endpoint=/v1/embeddings", {"endpoint": "/v1/embeddings"}),
        ("?model=rare&trouble=timeout", {"model": "rare", "outcome": "timeout"}),
        ("?trouble=timeout", {"outcome": "timeout"}),
        ("?trouble=unpriced", {"pricing": "unpriced"}),
        ("?trouble=completed", {"outcome": "completed"}),
        ("?key=wxyz", {}),
        ("?q=wxyz&endpoint=/v1/embeddings", {"endpoint": "/v1/embeddings"}),
        ("?model=nobody-has-it", {"model": "nobody-has-it"}),
    ],
)
def test_filters_find_all_that_there_is_page_by_page(operator: Client, query: str, wanted: dict[str, str]) -> None:
    now = timezone.now()
    events = [event(at=now - MINUTE * 30 * n) for n in range(200)]
    events += [event(at=now - dt.timedelta(days=n), model="rare") for n in range(60)]
    events += [event(at=now - dt.timedelta(days=n), outcome="timeout", model="rare") for n in (1, 30)]
    events += [event(at=now - dt.timedelta(days=2 * n), endpoint="/v1/embeddings") for n in range(30)]
    record_events(events)
    assert [pk for page in walk(operator, URL + query) for pk in page] == ids(**wanted)


def many_keys(*, records_each: int = 2, every: dt.timedelta) -> None:
    """Let 120 keys be labelled "Team", among records of others."""
    now = timezone.now()
    events = [event(key=f"team-{n % 120}", at=now - every * n) for n in range(120 * records_each)]
    record_events([event(key="other", at=now - MINUTE * 20 * n) for n in range(200)] + events)
    ApiKey.objects.exclude(fingerprint=event(key="other").key_fingerprint).update(label="Team")


@pytest.mark.parametrize(
    "query", ["?key=team", "?q=team", "?key=team&model=gpt-4o-mini", "?key=team&trouble=completed"]
)
def test_the_records_of_many_keys_are_all_found(operator: Client, query: str) -> None:
    many_keys(every=MINUTE * 50)
    assert [pk for page in walk(operator, URL + query) for pk in page] == ids(key__label="Team")


def test_seldom_used_keys_are_found_on_their_days_at_once(operator: Client, django_assert_max_num_queries: Any) -> None:
    many_keys(records_each=1, every=dt.timedelta(hours=16))
    with django_assert_max_num_queries(12):
        page = operator.get(URL, {"key": "team"}).context["cl"].result_list
    assert [record.pk for record in page] == ids(key__label="Team")[:20]


def test_what_is_rarer_than_a_page_looks_for_is_found_behind_its_link(operator: Client) -> None:
    now = timezone.now()
    hours = [event(at=now - dt.timedelta(hours=n), model="rare") for n in range(600)]
    record_events([*hours, event(at=now - dt.timedelta(hours=601), model="rare", outcome="timeout")])
    pages = walk(operator, URL + "?model=rare&trouble=timeout")
    assert [pk for page in pages for pk in page] == ids(outcome="timeout")


@pytest.mark.parametrize("list_", ["usagerecord", "usageday"])
def test_the_last_day_there_is_is_none(operator: Client, list_: str) -> None:
    record_events([event(at=timezone.now())])
    url = f"/admin/billing/{list_}/"
    assert len(operator.get(url, {"day": "9999-12-31"}).context["cl"].result_list) == 1
    assert operator.get(f"{url}export/", {"day": "9999-12-31"}).status_code == 200


def test_a_day_has_its_own_records_alone(operator: Client) -> None:
    noon = timezone.now().replace(hour=12, minute=0, second=0, microsecond=0) - dt.timedelta(days=5)
    record_events([event(at=noon + dt.timedelta(hours=hours)) for hours in (-13, -12, 0, 11, 12)])
    found = [pk for page in walk(operator, f"{URL}?day={noon:%Y-%m-%d}") for pk in page]
    assert found == ids(day=noon.date())
    assert len(found) == 3


def test_a_busy_hour_is_read_in_parts(operator: Client, django_assert_max_num_queries: Any) -> None:
    hour = timezone.now().replace(minute=0, second=0, microsecond=0) - dt.timedelta(hours=2)
    record_events([event(at=hour + dt.timedelta(seconds=n * 0.7)) for n in range(5000)])
    with django_assert_max_num_queries(9):
        page = operator.get(URL).context["cl"].result_list
    assert [record.pk for record in page] == ids()[:20]
    second = Cursor(page[-1].started_at, page[-1].pk)
    assert [record.pk for record in operator.get(URL, {"before": str(second)}).context["cl"].result_list] == ids()[
        20:40
    ]


@pytest.mark.parametrize(
    "before",
    [
        "",
        "x",
        "2026-01-01",
        "2026-13-01T00:00:00+00:00~",
        "~~",
        "2026-01-01T00:00:00~a",
        "0001-01-01T00:00+14:00~",
        "9999-12-31T23:59:59.999999+00:00~",
    ],
)
def test_a_cursor_that_is_none_shows_the_newest(operator: Client, before: str) -> None:
    record_events([event(at=timezone.now())])
    assert len(operator.get(URL, {"before": before}).context["cl"].result_list) == 1


def test_links_of_a_page_forget_where_it_began(operator: Client) -> None:
    now = timezone.now()
    record_events([event(at=now - MINUTE * n) for n in range(30)])
    older = operator.get(URL + operator.get(URL).context["cl"].older_url)
    links = re.findall(r'href="(\?[^"]*)"', older.content.decode())
    assert links
    assert not [link for link in links if "before=" in link]
