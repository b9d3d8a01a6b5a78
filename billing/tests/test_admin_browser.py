"""The admin in a browser, against the live proxy: nothing from another host, no error, no violation of the policy."""

from __future__ import annotations

import base64
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from django_otp.oath import TOTP
from playwright.sync_api import Browser, Page, expect, sync_playwright

from gateway.tests.fake_upstream import FakeUpstream
from gateway.tests.live import LiveProxy

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
PASSWORD = "correct-horse-battery"
API_KEY = "sk-browser-0123456789abcdefghijklmnop"
_SEED = "seed_usage", "3000", "--keys", "30", "--days", "100"
_PATIENCE_MS = 60_000

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="Chromium is missing: apt-get install chromium")


@pytest.fixture(scope="module")
def site() -> Iterator[LiveProxy]:
    with FakeUpstream() as upstream, LiveProxy(UPSTREAM_URL=upstream.url) as proxy:
        proxy.manage(*_SEED)
        proxy.manage("shell", "-v", "0", "-c", _user("admin"))
        yield proxy


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=_PATIENCE_MS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(site: LiveProxy, browser: Browser) -> Iterator[Page]:
    """A page in English, logged in nowhere; whatever it complains of or asks of others fails the test."""
    context = browser.new_context(base_url=site.url, locale="en", viewport={"width": 1440, "height": 900})
    page = context.new_page()
    troubles: list[str] = []
    page.on("console", lambda said: troubles.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda sent: None if sent.url.startswith((site.url, "data:")) else troubles.append(sent.url))
    page.set_default_timeout(_PATIENCE_MS)
    yield page
    context.close()
    # A violation of the policy is an error on the console.
    assert troubles == []


def _user(name: str) -> str:
    return (
        "from django.contrib.auth.models import User\n"
        f"user, _ = User.objects.get_or_create(username={name!r}, is_staff=True, is_superuser=True)\n"
        f"user.set_password({PASSWORD!r})\nuser.save()"
    )


def log_in(page: Page, name: str = "admin", code: str = "") -> None:
    page.goto("/admin/")
    page.get_by_label("Username").fill(name)
    page.locator("#id_password").fill(PASSWORD)
    page.get_by_label("Authentication code").fill(code)
    page.get_by_role("button", name="Log in").click()


def test_an_operator_logs_in_and_sees_the_first_page(page: Page) -> None:
    log_in(page)
    expect(page.get_by_role("heading", name="Health")).to_be_visible()
    upstream = page.locator("#health li").filter(has_text="Upstream")
    expect(upstream).to_have_attribute("data-state", "good")
    expect(page.locator("canvas.chart")).to_have_count(6)
    drawn = "Array.from(document.querySelectorAll('canvas.chart')).every(canvas => Chart.getChart(canvas))"
    page.wait_for_function(drawn)
    page.get_by_role("link", name="90 days").click()
    expect(page.get_by_role("link", name="90 days")).to_have_attribute("aria-current", "page")
    expect(page.get_by_role("link", name="Seed 0000")).to_be_visible()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
def test_pages_fit_their_screens(page: Page, theme: str, width: int) -> None:
    page.emulate_media(color_scheme=theme)  # type: ignore[arg-type]
    page.set_viewport_size({"width": width, "height": 900})
    log_in(page)
    lists = ("apikey", "grant", "usagerecord", "usageday", "modelprice", "purge")
    for address in ("", *(f"billing/{name}/" for name in lists), "billing/apikey/1/change/", "billing/grant/add/"):
        page.goto(f"/admin/{address}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, address


def test_a_second_factor_is_set_up_and_asked_for(site: LiveProxy, page: Page, browser: Browser) -> None:
    site.manage("shell", "-v", "0", "-c", _user("careful"))
    log_in(page, "careful")
    page.goto("/admin/second-factor/")
    expect(page.get_by_alt_text("QR code for an authenticator app")).to_be_visible()
    secret = page.locator("#secret").inner_text().replace(" ", "")
    totp = TOTP(base64.b32decode(secret))
    page.get_by_label("Code of the app").fill(f"{totp.token():06}")
    page.get_by_label("Your password").fill(PASSWORD)
    page.get_by_role("button", name="Switch it on").click()
    codes = page.locator("#recovery-codes li")
    expect(codes).to_have_count(10)
    code = codes.first.inner_text()
    page.context.clear_cookies()
    log_in(page, "careful")
    expect(page.get_by_text("authentication code is wrong")).to_be_visible()
    log_in(page, "careful", code)
    expect(page.get_by_role("heading", name="Health")).to_be_visible()


def test_a_grant_is_given_by_pasting_a_key(site: LiveProxy, page: Page) -> None:
    log_in(page)
    page.goto("/admin/billing/grant/add/")
    page.get_by_label("API key", exact=True).fill(API_KEY)
    page.get_by_label("Amount in USD").fill("12.50")
    page.get_by_label("Reason").fill("paid")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.locator("#result_list").get_by_text("12.50")).to_be_visible()
    assert API_KEY not in page.content()
    balance = site.get("/pro/balance", headers={"Authorization": f"Bearer {API_KEY}"}).json()["data"]
    assert balance == {"total": 12.5, "balance": 12.5, "used": 0.0}
    page.goto("/admin/admin/logentry/")
    expect(page.get_by_text("amount in USD:").first).to_be_visible()
    assert API_KEY not in page.content()


def test_a_blocked_key_is_refused_by_the_gateway(site: LiveProxy, page: Page) -> None:
    key = "sk-to-be-blocked-0123456789abcdef"
    authorized = {"Authorization": f"Bearer {key}"}
    assert site.get("/v1/models", headers=authorized).status_code == 200
    site.wait_for_rows("SELECT id FROM billing_apikey WHERE hint LIKE '%cdef'", 1)
    log_in(page)
    page.goto("/admin/billing/apikey/?q=cdef")
    page.locator("#result_list input.action-select").first.check()
    page.locator("select[name=action]").select_option("block")
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_text("Every gateway will refuse these keys")).to_be_visible()
    page.get_by_role("button", name="Yes, I’m sure").click()
    expect(page.get_by_text("1 key blocked.")).to_be_visible()
    deadline = time.monotonic() + 60
    while (answer := site.get("/v1/models", headers=authorized)).status_code == 200 and time.monotonic() < deadline:
        page.wait_for_timeout(200)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "key_blocked")


def test_a_list_is_downloaded_as_it_is_filtered(page: Page, tmp_path: Path) -> None:
    log_in(page)
    page.goto("/admin/billing/usagerecord/?model=gpt-4o")
    with page.expect_download() as waiting:
        page.get_by_role("link", name="Export CSV").click()
    path = tmp_path / "records.csv"
    waiting.value.save_as(path)
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    assert lines[0].startswith("input_tokens,")
    assert len(lines) > 21
    assert all(",gpt-4o," in line for line in lines[1:])


def test_older_records_are_one_click_away(page: Page) -> None:
    log_in(page)
    page.goto("/admin/billing/usagerecord/")
    newest = page.locator("#result_list tbody tr").first.inner_text()
    page.get_by_role("link", name="Older").click()
    expect(page.get_by_role("link", name="Newest")).to_have_attribute("href", "?")
    assert page.locator("#result_list tbody tr").first.inner_text() != newest


def test_the_language_is_switched_in_the_menu(page: Page) -> None:
    log_in(page)
    page.locator("#nav-sidebar").get_by_text("admin", exact=True).click()
    page.get_by_role("button", name="简体中文").click()
    expect(page.get_by_role("heading", name="健康状况")).to_be_visible()
