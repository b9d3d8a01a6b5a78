"""An operator who reads Chinese sees no English."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import polib
import pytest
from axes.models import AccessAttempt, AccessFailureLog, AccessLog
from django.contrib import admin
from django.contrib.auth.models import User
from django.test import Client
from django.utils import timezone
from django.utils.translation import trans_real
from django_celery_beat.models import CrontabSchedule, IntervalSchedule, PeriodicTask

from billing.models import ApiKey, Grant, ModelPrice, Purge, UsageDay, UsageRecord
from billing.services import record_events
from billing.tests.samples import event
from proxysite.tests.messages import CATALOGUE, FOLDERS, below, translated

# Names, units, and what people write in Latin letters in Chinese too.
_NOT_ENGLISH = re.compile(
    r"(?<![A-Za-z])(API|Accept|CSV|Celery|Command|Control|DNS|English|GATEWAY_MODE|LDAP|Mac|GET|HTTP|ID|IP|JOURNAL_DIR|POST|QR|REDIS_URL|Redis|SQLite|PostgreSQL|TOTP|URL|USD|WORKERS"
    r"|UTC|UPSTREAM_PROXY|UPSTREAM_URL|app|beat|bytes|en|esc|hans|journal|manage|ms|proxysite|purge_usage|py|reprice"
    r"|serve|sha|status|tokens?|Tokens?|worker|zh)(?![A-Za-z])"
)
_DATA = re.compile(
    r"gpt-4o-mini|/v1/[\w/]+|sk-…wxyz|[0-9a-f]{8,}|operator|Anna|mine|Mozilla|<unknown>"
    r"|genai-prices|proxysite\.tasks\.heartbeat|\(m/h/dM/MY/d\)|[A-Z2-7]{4}( [A-Z2-7]{4})+|pbkdf2_sha256|[\w+/=]+\*+",
    re.IGNORECASE,
)
_SHOWN = ("title", "placeholder", "aria-label", "alt", "data-label")
_WORD = re.compile(r"[A-Za-z]{2,}")


class _Texts(HTMLParser):
    """What a reader sees: texts, and the attributes that are shown or read aloud."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.texts: list[str] = []
        self._hidden: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        is_icon = "material-symbols-outlined" in (given.get("class") or "").split()
        if self._hidden:
            self._hidden += [tag] if tag == self._hidden[0] else []
        elif tag in ("script", "style") or is_icon:
            self._hidden = [tag]
        self.texts += [
            given[name] or "" for name in ("title", "placeholder", "aria-label", "alt", "data-label") if name in given
        ]

    def handle_endtag(self, tag: str) -> None:
        if self._hidden and tag == self._hidden[0]:
            self._hidden.pop()

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.texts.append(data)


def english_in(page: str) -> set[str]:
    parser = _Texts()
    parser.feed(page)
    found = set()
    for text in parser.texts:
        rest = _NOT_ENGLISH.sub(" ", _DATA.sub(" ", text))
        if _WORD.search(rest):
            found.add(" ".join(text.split()))
    return found


def test_every_text_has_a_translation_with_the_same_places() -> None:
    found = below(*FOLDERS)
    assert len(found) > 300
    assert [message for message in found if not translated(message)] == []
    place = re.compile(r"%\(\w+\)[sd]|%[sd]|{}")
    for entry in polib.pofile(str(CATALOGUE)):
        for text in entry.msgstr_plural.values() or [entry.msgstr]:
            assert sorted(place.findall(text)) == sorted(place.findall(entry.msgid_plural or entry.msgid)), entry.msgid


def test_our_words_go_before_those_of_libraries() -> None:
    catalogue = trans_real.translation("zh-hans")._catalog
    other = [
        entry.msgid
        for entry in polib.pofile(str(CATALOGUE))
        if entry.msgstr and catalogue.get(entry.msgid) != entry.msgstr
    ]
    assert other == []


def test_the_compiled_catalogue_is_that_of_its_source() -> None:
    compiled = polib.mofile(str(CATALOGUE.with_suffix(".mo")))
    source = polib.pofile(str(CATALOGUE))
    assert not source.untranslated_entries() + source.fuzzy_entries() + source.obsolete_entries()

    def texts(entries: Any) -> set[Any]:
        return {(entry.msgid, entry.msgstr, *entry.msgstr_plural.values()) for entry in entries}

    assert texts(compiled) == texts(source)


@pytest.fixture
def operator(client: Client) -> Client:
    user = User.objects.create_superuser("operator")
    record_events([event(at=timezone.now()), event(at=timezone.now(), outcome="timeout", status=0, model="mine")])
    key = ApiKey.objects.get()
    Grant.objects.create(key=key, amount_usd=1, given_by=user, reason="Anna")
    interval = IntervalSchedule.objects.create(every=1, period="days")
    PeriodicTask.objects.create(name="mine", task="proxysite.tasks.heartbeat", interval=interval)
    PeriodicTask.objects.create(name="Anna", task="mine", crontab=CrontabSchedule.objects.create(hour="4"))
    ModelPrice.objects.create(model="mine", valid_from=timezone.now(), input=1)
    Purge.objects.create(before=timezone.now().date())
    seen = {"username": "operator", "ip_address": "127.0.0.1", "user_agent": "Mozilla", "path_info": "/admin/login/"}
    AccessAttempt.objects.create(**seen, failures_since_start=9, get_data="", post_data="", attempt_time=timezone.now())
    AccessLog.objects.create(**seen)
    AccessFailureLog.objects.create(**seen, locked_out=True)
    client.force_login(user)
    client.defaults["HTTP_ACCEPT_LANGUAGE"] = "zh-CN"
    client.post("/admin/billing/apikey/", {"action": "block", "_selected_action": [key.pk], "confirmed": "yes"})
    client.post(
        "/admin/billing/modelprice/add/", {"model": "mine", "valid_from_0": "2026-01-01", "valid_from_1": "00:00:00"}
    )
    return client


def pages() -> list[str]:
    admin.autodiscover()
    lists = [f"/admin/{model._meta.app_label}/{model._meta.model_name}/" for model in admin.site._registry]
    return ["/admin/", "/admin/?period=7d", "/admin/second-factor/", "/admin/password_change/", *sorted(lists)]


@pytest.mark.django_db
@pytest.mark.parametrize("url", pages())
def test_no_english_is_left_on_a_page(operator: Client, url: str) -> None:
    page = operator.get(url)
    assert page.status_code == 200
    assert english_in(page.content.decode()) == set()


@pytest.mark.django_db
@pytest.mark.parametrize("model", [ApiKey, Grant, ModelPrice, UsageRecord, UsageDay, Purge, User])
def test_no_english_is_left_on_a_form(operator: Client, model: Any) -> None:
    url = f"/admin/{model._meta.app_label}/{model._meta.model_name}"
    row = model.objects.first()
    found = english_in(operator.get(f"{url}/{row.pk}/change/").content.decode())
    found |= english_in(operator.get(f"{url}/{row.pk}/history/").content.decode())
    added = operator.get(f"{url}/add/")
    found |= english_in(added.content.decode()) if added.status_code == 200 else set()
    assert found == set()


@pytest.mark.django_db
def test_no_english_is_left_where_one_is_asked_or_refused(operator: Client) -> None:
    selected = {"_selected_action": [ApiKey.objects.get().pk]}
    found: set[str] = set()
    for action in ("block", "unblock", "grant"):
        answer = operator.post("/admin/billing/apikey/", {"action": action, **selected})
        found |= english_in(answer.content.decode())
    done = {"action": "unblock", "confirmed": "yes", **selected}
    found |= english_in(operator.post("/admin/billing/apikey/", done, follow=True).content.decode())
    wrong = {"api_key": "short", "amount_usd": "x", "valid_from_0": "x", "valid_from_1": "x"}
    found |= english_in(operator.post("/admin/billing/grant/add/", wrong).content.decode())
    operator.logout()
    found |= english_in(operator.get("/admin/login/").content.decode())
    for _ in range(6):
        answer = operator.post("/admin/login/", {"username": "nobody", "password": "wrong"})
        found |= english_in(answer.content.decode())
    assert answer.status_code == 429
    assert found == set()


def test_english_is_found_where_it_is() -> None:
    assert english_in('<p title="No data">x</p><b>密钥</b><i class="material-symbols-outlined">arrow_back</i>') == {
        "No data"
    }
    assert english_in("<td>Run</td>") == {"Run"}
