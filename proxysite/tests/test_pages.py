"""The public pages as a client without a browser sees them."""

from __future__ import annotations

import re
from html import unescape
from html.parser import HTMLParser

import httpx2 as httpx
import pytest

from gateway import errors
from gateway.tests.live import ROOT, LiveProxy, instance
from proxysite.highlight import highlighted
from proxysite.pages import PAGES

HTML = {"Accept": "text/html"}
PATHS = [f"{prefix}{path}" for prefix in ("/", "/zh-hans/", "/en/") for path in PAGES.values()]


class Outline(HTMLParser):
    """The tags of a page that make its structure, and all of its links."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, str | None]] = []
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag in ("h1", "h2", "h3", "section", "aside", "table", "tr", "td", "li", "pre", "dt", "dd", "form", "input"):
            self.tags.append((tag, attributes.get("id")))
        if tag in ("a", "link") and attributes.get("href"):
            self.links.append(str(attributes["href"]))


@pytest.mark.parametrize("path", PATHS)
def test_every_page_is_served_and_may_be_cached(own_proxy: LiveProxy, path: str) -> None:
    answer = own_proxy.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["cache-control"] == "public, max-age=300"
    again = own_proxy.get(path, headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_pages_set_no_cookies(own_proxy: LiveProxy) -> None:
    assert not [path for path in PATHS if "set-cookie" in own_proxy.get(path).headers]


@pytest.mark.parametrize(
    ("accept", "language"),
    [
        (None, "zh-Hans"),
        ("*", "zh-Hans"),
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh-Hans"),
        ("zh-TW", "zh-Hans"),
        ("en-US,en;q=0.9,zh;q=0.8", "en"),
        ("zh;q=0.3,en;q=0.9", "en"),
        ("fr-FR,fr;q=0.9", "en"),
        ("fr,zh;q=0.5", "zh-Hans"),
        (";;q=,\x80", "zh-Hans"),
    ],
)
def test_the_readers_language_decides(own_proxy: LiveProxy, accept: str | None, language: str) -> None:
    headers = {} if accept is None else {"Accept-Language": accept.encode("latin-1")}
    answer = own_proxy.get("/docs/", headers=headers)
    assert f'<html lang="{language}">' in answer.text
    assert answer.headers["content-language"] == language
    assert "Accept-Language" in answer.headers["vary"]


@pytest.mark.parametrize(("path", "language"), [("/zh-hans/docs/", "zh-Hans"), ("/en/docs/", "en")])
def test_an_address_with_a_language_keeps_it(own_proxy: LiveProxy, path: str, language: str) -> None:
    for accept in ("zh-CN", "en"):
        assert f'<html lang="{language}">' in own_proxy.get(path, headers={"Accept-Language": accept}).text


def test_search_engines_find_both_languages(own_proxy: LiveProxy) -> None:
    page = own_proxy.get("/docs/chat/", headers={"Accept-Language": "en"}).text
    alternates = dict(re.findall(r'<link rel="alternate" hreflang="([^"]+)" href="([^"]+)">', page))
    assert alternates == {
        "zh-Hans": f"{own_proxy.url}/zh-hans/docs/chat/",
        "en": f"{own_proxy.url}/en/docs/chat/",
        "x-default": f"{own_proxy.url}/docs/chat/",
    }
    assert f'<link rel="canonical" href="{own_proxy.url}/en/docs/chat/">' in page
    assert f'property="og:image" content="{own_proxy.url}/static/site/og.png"' in page
    assert own_proxy.get("/static/site/og.png").headers["content-type"] == "image/png"


@pytest.mark.parametrize(("prefix", "reference"), [("/", "/docs/api/"), ("/en/", "/docs/api/?lang=en")])
@pytest.mark.parametrize("path", ["", "docs/conversations/", "nothing"])
def test_the_reference_is_linked_in_the_language_of_the_address(
    own_proxy: LiveProxy, prefix: str, path: str, reference: str
) -> None:
    page = own_proxy.get(f"{prefix}{path}", headers=HTML | {"Accept-Language": "zh-CN"}).text
    assert {link for link in Outline(page).links if "/docs/api/" in link} == {reference}


@pytest.mark.parametrize("name", PAGES)
def test_both_languages_say_the_same_in_the_same_order(own_proxy: LiveProxy, name: str) -> None:
    chinese, english = (
        Outline(own_proxy.get(f"/{language}/{PAGES[name]}").text).tags for language in ("zh-hans", "en")
    )
    assert chinese == english


def test_no_link_of_our_own_leads_nowhere(own_proxy: LiveProxy) -> None:
    targets = set()
    for path in PATHS:
        page = own_proxy.get(path).text
        for link in Outline(page).links:
            if link.startswith("/"):
                targets.add(link)
            elif link.startswith("#"):
                assert f'id="{link[1:]}"' in page, f"{path} {link}"
    for target in sorted(targets):
        path, _, anchor = target.partition("#")
        answer = own_proxy.get(path, follow_redirects=True)
        assert answer.status_code == 200, target
        assert not anchor or f'id="{anchor}"' in answer.text, target


def test_the_address_shown_is_the_public_one() -> None:
    with LiveProxy(PUBLIC_URL="https://api.example.com", SANDBOX_ENABLED="true", ALLOWED_HOSTS="*") as proxy:
        page = proxy.get("/", headers={"Host": "evil.example"}).text
    assert "https://api.example.com/v1" in page
    assert "evil.example" not in page


@pytest.mark.parametrize("host", ['"><script>alert(1)</script>', "a b", "a'b", "x/../y", "$(id)", "`id`"])
def test_a_hostile_host_is_refused(own_proxy: LiveProxy, host: str) -> None:
    answer = own_proxy.get("/", headers={"Host": host})
    assert answer.status_code == 400
    assert host not in answer.text


def test_a_page_for_one_host_is_not_shown_to_another(own_proxy: LiveProxy) -> None:
    assert "one.example" in own_proxy.get("/", headers={"Host": "one.example"}).text
    assert "one.example" not in own_proxy.get("/", headers={"Host": "two.example"}).text


def test_a_key_with_markup_is_escaped() -> None:
    with LiveProxy(SANDBOX_ENABLED="true", SANDBOX_KEY='sk"><img src=x>') as proxy:
        page = proxy.get("/").text + proxy.get("/docs/errors/").text
    assert "<img" not in page
    assert "sk&quot;&gt;&lt;img src=x&gt;" in page


def test_without_the_sandbox_no_page_offers_its_key() -> None:
    with LiveProxy(SANDBOX_ENABLED="false") as proxy:
        pages = [proxy.get(path).text for path in PATHS]
    assert not [page for page in pages if "sk-sandbox" in page]
    assert "$OPENAI_API_KEY" in unescape(pages[0])


def test_public_pages_carry_a_strict_policy_and_v1_carries_none(own_proxy: LiveProxy) -> None:
    for path in ("/", "/docs/", "/nothing"):
        policy = own_proxy.get(path, headers=HTML).headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in f"{policy};"
        assert "form-action 'none'" in policy
        assert "unsafe" not in policy
    assert "'unsafe-eval'" in own_proxy.get("/admin/login/").headers["content-security-policy"]
    assert "content-security-policy" not in own_proxy.get("/v1/models").headers


def test_robots_are_told_what_is_for_them(own_proxy: LiveProxy) -> None:
    answer = own_proxy.get("/robots.txt")
    assert answer.headers["content-type"].startswith("text/plain")
    assert "Disallow: /admin/" in answer.text


def test_there_is_an_icon_for_those_who_ask_in_the_old_way(own_proxy: LiveProxy) -> None:
    answer = own_proxy.get("/favicon.ico")
    assert answer.headers["content-type"] == "image/x-icon"
    assert answer.content[:4] == b"\0\0\1\0"


# Errors


@pytest.mark.parametrize(
    ("path", "language", "sentence"),
    [
        ("/zh-hans/nothing", "en", "这个地址什么都没有"),
        ("/en/nothing", "zh-CN", "There is nothing at this address"),
        ("/nothing", "zh-CN", "这个地址什么都没有"),
        ("/<script>", "en", "There is nothing at this address"),
    ],
)
def test_a_browser_gets_a_page_for_an_unknown_address(
    own_proxy: LiveProxy, path: str, language: str, sentence: str
) -> None:
    answer = own_proxy.get(path, headers=HTML | {"Accept-Language": language})
    assert answer.status_code == 404
    assert sentence in answer.text
    assert "<script>" not in answer.text


def test_another_client_gets_an_error_that_sdks_understand_and_the_way(own_proxy: LiveProxy) -> None:
    answer = own_proxy.post("/chat/completions", json={"model": "gpt-4o-mini"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (404, "unknown_url")
    assert f"{own_proxy.url}/v1" in error["message"]
    assert answer.headers["access-control-allow-origin"] == "*"
    assert own_proxy.get("/nothing").json()["error"]["message"] == "There is nothing at /nothing."
    told = own_proxy.get("/dashboard/billing/usage/").json()["error"]["message"]
    assert told == "There is nothing at /dashboard/billing/usage/. Did you mean /dashboard/billing/usage?"


@pytest.mark.parametrize(
    ("language", "sentence"), [("", "这个地址什么都没有"), ("en", "There is nothing at this address.")]
)
def test_nothing_below_pro_is_said_in_its_envelope(own_proxy: LiveProxy, language: str, sentence: str) -> None:
    answer = own_proxy.post("/pro/chat/completions/", json={}, headers={"Accept-Language": language})
    assert answer.status_code == 404
    assert answer.json() == {"code": 404, "message": sentence, "data": None}
    assert answer.headers["access-control-allow-origin"] == "*"


def test_a_failure_has_its_page_without_a_database() -> None:
    with instance() as proxy:
        proxy.environment["DATABASE_URL"] = "postgres://nobody:secret@127.0.0.1:9/none"
        proxy.start()
        cookie = {"Cookie": "sessionid=abcdefgh"}
        page = proxy.get("/admin/", headers=HTML | cookie | {"Accept-Language": "en"})
        other = proxy.get("/admin/", headers=cookie)
        balance = proxy.get("/pro/balance", headers={"Authorization": "Bearer sk-abcdefgh"})
    assert (page.status_code, other.status_code) == (500, 500)
    assert "Something failed on our side" in page.text
    assert other.json()["error"]["code"] == "internal_error"
    said = {"code": 503, "message": "账务数据暂时不可用，请稍后再试", "data": None}
    assert (balance.status_code, balance.json()) == (503, said)
    assert not [text for text in (page.text, other.text) if "Traceback" in text or "secret" in text]


# What the docs say is what the code does


def _codes(kind: type[errors.GatewayError]) -> set[tuple[int, str]]:
    return {(kind.status, kind.code)}.union(*(_codes(child) for child in kind.__subclasses__()))


def test_the_docs_list_every_error_of_the_gateway(own_proxy: LiveProxy) -> None:
    page = own_proxy.get("/en/docs/errors/").text
    listed = {(int(status), code) for status, code in re.findall(r"<td>(\d+)</td><td><code>(\w+)</code>", page)}
    assert listed == _codes(errors.GatewayError)


def test_the_docs_list_every_refusal_of_a_conversation(own_proxy: LiveProxy) -> None:
    page = own_proxy.get("/en/docs/conversations/").text
    source = "".join((ROOT / "sessions_api" / name).read_text() for name in ("chat.py", "chat_request.py"))
    assert {"401", "403", "404", *re.findall(r"ProError\((4\d\d)", source)} <= set(re.findall(r"<td>(\d+)</td>", page))


def test_the_limits_in_the_docs_are_those_of_the_settings() -> None:
    changed = {"MAX_BODY_BYTES": str(7 << 20), "FIRST_BYTE_TIMEOUT_SECONDS": "77", "USAGE_WINDOW_DAYS": "33"}
    with LiveProxy(**changed, SESSION_TTL_SECONDS="5400", SESSION_CONTENT_MAX_CHARS="444") as proxy:
        conversations = proxy.get("/en/docs/conversations/").text
        limits, balance = proxy.get("/en/docs/errors/").text, proxy.get("/en/docs/balance/").text
    assert "7 MiB" in limits
    assert "77 s" in limits
    assert "last 33 days" in balance
    assert "ends 90 minutes after" in conversations
    assert "1–444 characters" in conversations


def test_the_balance_pages_example_is_that_of_the_readme(own_proxy: LiveProxy) -> None:
    page: httpx.Response = own_proxy.get("/zh-hans/docs/balance/")
    text = unescape(re.sub(r"<[^>]+>", "", page.text))
    assert '{"code": 200, "message": "执行成功", "data": {"total": 18.00, "balance": 17.92, "used": 0.08}}' in text


@pytest.mark.parametrize("language", ["bash", "python", "javascript", "json", "http", "text"])
@pytest.mark.parametrize("path", ["proxysite/pages.py", "static/site/site.js", "Makefile", "README.md"])
def test_highlighting_changes_no_character(language: str, path: str) -> None:
    code = (ROOT / path).read_text()
    marked = highlighted(code, language)
    assert unescape(re.sub(r'</?span(?: class="[bis]")?>', "", marked)) == code
    assert not re.search(r"<(?!/?span)", marked)


def test_both_readmes_have_the_same_chapters_and_commands() -> None:
    def shape(name: str) -> list[str]:
        lines = (ROOT / name).read_text().splitlines()
        kept = [re.match(r"## |```|curl|make \w+|!\[|- |\| `\w+`|client =", line) for line in lines]
        return [found[0] for found in kept if found]

    assert shape("README.zh-CN.md") == shape("README.md")
