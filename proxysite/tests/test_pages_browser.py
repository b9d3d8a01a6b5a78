"""The public pages in a real browser: what a reader sees and does. `visit` fails on any misbehaviour of a page."""

from __future__ import annotations

from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from gateway.tests.live import LiveProxy
from proxysite.pages import PAGES
from proxysite.tests.browser import PHONE_PX, Visit, Watch

_MOST_BYTES = 100_000
_SMALLEST_PHONE_PX = 320
_SANDBOX_KEY = "sk-sandbox"
_LANGUAGES = ("zh-hans", "en")
_DARK, _LIGHT = "rgb(14, 19, 17)", "rgb(250, 250, 247)"


def _use_sandbox_key(proxy: LiveProxy) -> None:
    headers = {"Authorization": f"Bearer {_SANDBOX_KEY}"}
    body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello! " * 200}]}
    assert proxy.post("/v1/chat/completions", headers=headers, json=body).status_code == 200
    proxy.wait_for_rows("SELECT 1 FROM billing_usageday WHERE model = 'gpt-4o-mini' AND cost_usd > 0", 1)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("locale", "language", "sentence"), [("zh-CN", "zh-Hans", "换一个地址"), ("en-GB", "en", "Change one address.")]
)
def test_the_landing_page_in_the_readers_language_and_theme(
    own_proxy: LiveProxy, visit: Visit, locale: str, language: str, sentence: str, dark: bool
) -> None:
    page = visit(own_proxy, "/", language=locale, dark=dark)
    assert page.get_attribute("html", "lang") == language
    expect(page.locator("h1")).to_contain_text(sentence)
    expect(page.locator(".address")).to_have_text(own_proxy.url)
    expect(page.locator(".status")).to_have_class("status good")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == (_DARK if dark else _LIGHT)


@pytest.mark.parametrize("path", [f"/{language}/{path}" for language in _LANGUAGES for path in PAGES.values()])
def test_a_page_is_light_and_no_wider_than_a_phone(
    own_proxy: LiveProxy, visit: Visit, watches: list[Watch], path: str
) -> None:
    page = visit(own_proxy, path, width_px=PHONE_PX)
    assert 10_000 < watches[0].loaded_bytes() < _MOST_BYTES
    for width_px in (PHONE_PX, _SMALLEST_PHONE_PX):
        page.set_viewport_size({"width": width_px, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width_px


@pytest.mark.parametrize("language", _LANGUAGES)
@pytest.mark.parametrize("name", [*PAGES, "nothing"])
def test_axe_finds_no_serious_fault(own_proxy: LiveProxy, visit: Visit, name: str, language: str) -> None:
    if name == "landing":
        _use_sandbox_key(own_proxy)
    page = visit(own_proxy, f"/{language}/{PAGES.get(name, name)}", tolerates=("404",))
    if name == "landing":
        page.click(".use-sample")
        expect(page.locator(".key-result")).to_be_visible()
    assert _serious_faults(page) == []
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == _DARK
    # Of what axe looks at, a theme changes the colours.
    assert _serious_faults(page, runOnly=["color-contrast"]) == []


def _serious_faults(page: Page, **options: Any) -> list[tuple[str, list[str]]]:
    """Return the rules that the page breaks, each with the markup that does."""
    found = Axe().run(page, options=options).response["violations"]
    return [
        (fault["id"], [node["html"] for node in fault["nodes"]])
        for fault in found
        if fault["impact"] in ("serious", "critical")
    ]


def test_copying_puts_the_code_into_the_clipboard(own_proxy: LiveProxy, visit: Visit) -> None:
    page = visit(own_proxy, "/en/", permissions=["clipboard-read", "clipboard-write"])
    button = page.locator("#connect-title ~ .tabs .copy").first
    button.click()
    expect(button).to_have_text("Copied")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith(f"curl -N {own_proxy.url}/v1/chat/completions")
    assert copied == page.locator("#connect-title ~ .tabs code").first.text_content()
    page.locator(".swap .copy").click()
    has_copied = "url => navigator.clipboard.readText().then(text => text === url)"
    page.wait_for_function(has_copied, arg=own_proxy.url)


def test_tabs_are_moved_through_with_the_arrows(own_proxy: LiveProxy, visit: Visit) -> None:
    page = visit(own_proxy, "/en/docs/")
    first = page.locator(".tabs").first
    expect(first.get_by_role("tab")).to_have_text(["curl", "Python", "Node", "LangChain", "Environment"])
    first.get_by_role("tab", name="curl").focus()
    page.keyboard.press("ArrowRight")
    expect(first.get_by_role("tab", name="Python")).to_be_focused()
    expect(first.get_by_role("tab", name="Python")).to_have_attribute("aria-selected", "true")
    expect(first.get_by_role("tabpanel")).to_have_count(1)
    expect(first.get_by_role("tabpanel")).to_contain_text("from openai import OpenAI")
    # Who reads Python here reads it below, too.
    expect(page.locator(".tabs").nth(1).get_by_role("tab", name="Python")).to_have_attribute("aria-selected", "true")
    page.keyboard.press("End")
    expect(first.get_by_role("tab", name="Environment")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(first.get_by_role("tab", name="curl")).to_be_focused()


def test_the_first_stop_of_the_keyboard_skips_the_navigation(own_proxy: LiveProxy, visit: Visit) -> None:
    page = visit(own_proxy, "/en/docs/")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#content")).to_be_focused()


def test_a_chosen_theme_stays(own_proxy: LiveProxy, visit: Visit) -> None:
    page = visit(own_proxy, "/en/", dark=True)
    page.locator("button.theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == _LIGHT
    page.goto(f"{own_proxy.url}/en/docs/")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == _LIGHT


def test_the_language_is_switched_in_place(own_proxy: LiveProxy, visit: Visit) -> None:
    page = visit(own_proxy, "/docs/balance/", language="zh-CN")
    page.locator("a.language").click()
    page.wait_for_url("**/en/docs/balance/")
    expect(page.locator("h1")).to_have_text("Balance and usage")
    page.locator("a.language").click()
    page.wait_for_url("**/zh-hans/docs/balance/")
    expect(page.locator("h1")).to_have_text("余额与用量")


def test_the_line_runs_on_the_page_and_streams(own_proxy: LiveProxy, visit: Visit) -> None:
    page = visit(own_proxy, "/en/")
    page.locator(".run").click()
    expect(page.locator(".try-output")).to_contain_text("This is the sandbox")
    expect(page.locator(".run")).to_be_enabled()


# "Check your key"


def test_a_pasted_key_shows_balance_chart_and_models(own_proxy: LiveProxy, visit: Visit) -> None:
    _use_sandbox_key(own_proxy)
    page = visit(own_proxy, "/en/")
    page.get_by_label("API key").fill(_SANDBOX_KEY)
    page.keyboard.press("Enter")
    expect(page.locator(".key-result")).to_be_visible()
    balance = own_proxy.get("/pro/balance", headers={"Authorization": f"Bearer {_SANDBOX_KEY}"}).json()["data"]
    shown = page.locator('[data-sum="total"]').text_content() or ""
    assert float(shown.strip("$")) == balance["total"]
    assert page.locator(".chart svg .slot").count() == 90
    assert page.locator(".chart svg .bar").last.evaluate("bar => Number(bar.getAttribute('height'))") > 0
    expect(page.locator(".key-result tbody")).to_contain_text("gpt-4o-mini")
    page.locator(".chart svg g").first.hover()
    expect(page.locator(".chart-reading")).to_contain_text("$0.00 · 0 requests")


def test_the_key_is_in_one_header_and_nowhere_else(own_proxy: LiveProxy, visit: Visit, watches: list[Watch]) -> None:
    _use_sandbox_key(own_proxy)
    page = visit(own_proxy, "/en/")
    page.get_by_label("API key").fill(_SANDBOX_KEY)
    page.get_by_role("button", name="Check").click()
    expect(page.locator(".key-result")).to_be_visible()
    sent = [request for request in watches[0].requests if "authorization" in request.all_headers()]
    assert sorted(request.url for request in sent) == [f"{own_proxy.url}/pro/balance", f"{own_proxy.url}/pro/usage"]
    assert not [request.url for request in watches[0].requests if _SANDBOX_KEY in request.url]
    assert not [request for request in watches[0].requests if _SANDBOX_KEY in (request.post_data or "")]
    assert (
        page.evaluate("JSON.stringify([localStorage, sessionStorage, document.cookie, location.href])").count("sk-")
        == 0
    )
    assert page.context.storage_state()["cookies"] == []
    assert _SANDBOX_KEY not in own_proxy.log.split("Try it:")[-1].split("\n", 3)[-1]
    # Said by the browser when it lays a page aside, perhaps for "back".
    page.evaluate("window.dispatchEvent(new Event('pagehide'))")
    assert page.get_by_label("API key").input_value() == ""


@pytest.mark.parametrize(
    ("language", "sentence"), [("zh-hans", "该密钥没有使用记录"), ("en", "This API key has never been used here.")]
)
def test_an_unknown_key_is_answered_in_the_pages_language(
    own_proxy: LiveProxy, visit: Visit, language: str, sentence: str
) -> None:
    page = visit(own_proxy, f"/{language}/", language="en-GB" if language == "zh-hans" else "zh-CN", tolerates=("404",))
    page.locator("#api-key").fill("sk-never-used")
    page.keyboard.press("Enter")
    expect(page.locator(".key-message")).to_have_text(sentence)
    expect(page.locator(".key-result")).to_be_hidden()


def test_what_no_key_can_be_is_not_sent(own_proxy: LiveProxy, visit: Visit, watches: list[Watch]) -> None:
    page = visit(own_proxy, "/en/")
    page.get_by_label("API key").fill("密钥 with spaces")
    page.keyboard.press("Enter")
    expect(page.locator(".key-message")).to_have_text("That is not what a key looks like.")
    assert not [request for request in watches[0].requests if "/pro/" in request.url]


def test_a_models_name_with_markup_stays_text(own_proxy: LiveProxy, visit: Visit) -> None:
    _use_sandbox_key(own_proxy)
    page = visit(own_proxy, "/en/")
    hostile = '<img src=x onerror="document.title=1">'
    rows = [{"date": "2026-01-01", "model": hostile, "endpoint": "/v1/x", "requests": 1, "cost": 1}]
    rows[0] |= {"input_tokens": 1, "cached_input_tokens": 0, "output_tokens": 1}
    answer = {"code": 200, "message": "Success", "data": {"cost": 1, "rows": rows}}
    page.route("**/pro/usage", lambda route: route.fulfill(json=answer))
    page.click(".use-sample")
    expect(page.locator(".key-result tbody th")).to_have_text(hostile)
    assert page.locator(".key-result img").count() == 0


@pytest.mark.parametrize(("language", "word"), [("zh-hans", "未定价"), ("en", "unpriced")])
def test_what_has_no_known_price_is_not_shown_as_free(
    own_proxy: LiveProxy, visit: Visit, language: str, word: str
) -> None:
    _use_sandbox_key(own_proxy)
    page = visit(own_proxy, f"/{language}/")
    row = {"date": "2026-01-01", "model": "priced", "endpoint": "/v1/x", "requests": 1, "cost": 2.5}
    row |= {"input_tokens": 1, "cached_input_tokens": 0, "output_tokens": 1, "unpriced_requests": 0}
    rows = [
        row,
        row | {"model": "both", "unpriced_requests": 1},
        row | {"model": "b", "cost": 0, "unpriced_requests": 1},
    ]
    answer = {"code": 200, "message": "Success", "data": {"cost": 5, "unpriced_requests": 2, "rows": rows}}
    page.route("**/pro/usage", lambda route: route.fulfill(json=answer))
    page.click(".use-sample")
    expect(page.locator(".key-result tbody td:last-child")).to_have_text(["$2.50", f"$2.50 + {word}", word])


# Without JavaScript


def test_without_javascript_everything_is_there_and_the_form_is_shut(own_proxy: LiveProxy, visit: Visit) -> None:
    page = visit(own_proxy, "/en/", javascript=False)
    for name in ("curl", "Python", "Node", "LangChain", "Environment"):
        expect(page.locator(".tabs h3", has_text=name)).to_be_visible()
    expect(page.locator(".tabs pre").last).to_be_visible()
    expect(page.locator(".copy").first).to_be_hidden()
    expect(page.locator("#api-key")).to_be_disabled()
    expect(page.get_by_role("button", name="Check")).to_be_disabled()
    expect(page.locator(".key-form .note")).to_contain_text("needs JavaScript")
    assert page.get_attribute(".key-form", "method") == "post"
    assert page.get_attribute("#api-key", "name") is None


# Errors


def _lost(page: Page) -> str:
    return page.locator("h1").text_content() or ""


def test_a_lost_reader_finds_the_way_back(own_proxy: LiveProxy, visit: Visit) -> None:
    page = visit(own_proxy, "/en/nothing/here", tolerates=("404",))
    assert _lost(page) == "There is nothing at this address"
    page.get_by_role("link", name="To the first page").click()
    page.wait_for_url("**/en/")


def test_an_upstream_that_is_away_is_shown(visit: Visit) -> None:
    with LiveProxy(UPSTREAM_URL="http://127.0.0.1:9") as proxy:
        page = visit(proxy, "/en/")
        expect(page.locator(".status")).to_have_class("status bad")
        expect(page.locator(".status")).to_contain_text("The upstream does not answer")
        page.goto("about:blank")
