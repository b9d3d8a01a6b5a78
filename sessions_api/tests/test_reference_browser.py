"""The reference in a real browser: nothing from elsewhere, nothing that its policy forbids, and it works."""

from __future__ import annotations

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from gateway.tests.live import LiveProxy
from proxysite.tests.browser import PHONE_PX, Visit, Watch

PAGE = "/docs/api/"


@pytest.mark.parametrize(
    ("language", "tag", "title"),
    [("zh-CN", "zh-Hans", "proxysite 的 /pro 接口"), ("en-GB", "en", "The /pro routes of proxysite")],
)
def test_the_reference_is_shown_in_the_readers_language(
    own_proxy: LiveProxy, visit: Visit, language: str, tag: str, title: str
) -> None:
    page = visit(own_proxy, PAGE, language=language)
    assert page.get_attribute("html", "lang") == tag
    expect(page.locator(".info .title")).to_contain_text(title)
    expect(page.locator(".opblock")).to_have_count(9)
    page.locator("a.language").click()
    expect(page.locator("html")).not_to_have_attribute("lang", tag)
    expect(page.locator(".opblock")).to_have_count(9)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_no_serious_fault(own_proxy: LiveProxy, visit: Visit, dark: bool) -> None:
    page = visit(own_proxy, PAGE, dark=dark)
    expect(page.locator(".opblock")).to_have_count(9)
    found = Axe().run(page).response["violations"]
    assert [
        (fault["id"], [node["html"] for node in fault["nodes"]])
        for fault in found
        if fault["impact"] in ("serious", "critical")
    ] == []


@pytest.mark.parametrize(("dark", "color"), [(False, "rgb(250, 250, 247)"), (True, "rgb(28, 32, 34)")])
def test_the_reference_is_dark_where_its_reader_is(own_proxy: LiveProxy, visit: Visit, dark: bool, color: str) -> None:
    page = visit(own_proxy, PAGE, dark=dark)
    expect(page.locator(".opblock")).to_have_count(9)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == color
    is_dark = "document.documentElement.classList.contains('dark-mode')"
    assert page.evaluate(is_dark) is dark


def test_every_operation_opens(own_proxy: LiveProxy, visit: Visit) -> None:
    page = visit(own_proxy, PAGE)
    expect(page.locator(".opblock")).to_have_count(9)
    for operation in page.locator(".opblock-summary-control").all():
        operation.click()
    expect(page.locator(".opblock-body")).to_have_count(9)
    for schema in page.locator(".opblock .model-example button", has_text="Schema").all():
        schema.click()
    page.locator(".models button").first.click()


def test_a_request_is_tried_with_a_key_that_stays_in_the_page(
    own_proxy: LiveProxy, visit: Visit, watches: list[Watch]
) -> None:
    headers = {"Authorization": "Bearer sk-sandbox"}
    said = {"messages": [{"role": "user", "content": "Hello!"}]}
    assert own_proxy.post("/pro/sessions/my-first/import", json=said, headers=headers).status_code == 200
    page = visit(own_proxy, PAGE, language="en-GB")
    page.get_by_role("button", name="Authorize").first.click()
    page.locator(".auth-container input").fill("sk-sandbox")
    page.locator(".auth-btn-wrapper .authorize").click()
    page.locator(".auth-btn-wrapper .btn-done").click()
    operation = page.locator("#operations-sessions-readSession")
    operation.locator(".opblock-summary-control").click()
    operation.get_by_placeholder("sessionId").fill("my-first")
    operation.get_by_role("button", name="Execute").click()
    expect(operation.locator(".live-responses-table .response-col_status").last).to_contain_text("200")
    expect(operation.locator(".live-responses-table .microlight").first).to_contain_text('"message": "Success"')
    sent = [request for request in watches[0].requests if "authorization" in request.all_headers()]
    assert [request.url for request in sent] == [f"{own_proxy.url}/pro/sessions/my-first"]
    kept = page.evaluate("JSON.stringify([localStorage, sessionStorage, document.cookie, location.href])")
    assert "sk-" not in kept
    assert page.context.storage_state()["cookies"] == []


def test_it_fits_a_phone(own_proxy: LiveProxy, visit: Visit) -> None:
    page = visit(own_proxy, PAGE, width_px=PHONE_PX)
    expect(page.locator(".opblock").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE_PX


def test_without_javascript_the_document_is_there(own_proxy: LiveProxy, visit: Visit) -> None:
    page = visit(own_proxy, PAGE, javascript=False)
    page.get_by_role("link", name="OpenAPI (JSON)").click()
    assert "/docs/api/openapi.json" in page.url
    assert '"openapi": "3.1.0"' in (page.text_content("body") or "")


def test_the_docs_lead_here(own_proxy: LiveProxy, visit: Visit) -> None:
    page = visit(own_proxy, "/en/docs/conversations/")
    page.locator("article").get_by_role("link", name="API reference").click()
    page.wait_for_url(f"**{PAGE}?lang=en")
    expect(page.locator(".opblock").first).to_be_visible()
