"""A real browser for tests, and visits that fail on whatever a page should not do.

A module that uses `visit` must hold sync tests only, and no query of its own: while Playwright runs, its event loop
counts as running in this thread.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Response, expect, sync_playwright

from gateway.tests.live import LiveProxy

PHONE_PX, DESKTOP_PX = 390, 1440
_PATIENCE_MS = 60_000  # only a failing test waits so long
_NAMES = ("chromium", "chromium-browser", "google-chrome")
_HOW_TO_GET_IT = "no Chromium here: apt-get install chromium"

expect.set_options(timeout=_PATIENCE_MS)


def chromium_path() -> str:
    """Return where Chromium is. Without one the test is skipped, and fails under CI, saying how to get it."""
    found = next((path for path in map(shutil.which, _NAMES) if path), None)
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(_HOW_TO_GET_IT)
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = chromium_path()
    with sync_playwright() as playwright:
        # No sandbox: containers in which tests run as root have none to offer.
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=_PATIENCE_MS)
        yield started
        started.close()


@dataclass
class Watch:
    """What pages did that they should not, and the bodies that they loaded."""

    origin: str
    tolerated: tuple[str, ...] = ()
    problems: list[str] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    responses: list[Response] = field(default_factory=list)

    def on_request(self, request: Request) -> None:
        self.requests.append(request)
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob") and f"{parts.scheme}://{parts.netloc}" != self.origin:
            self.problems.append(f"a request to {request.url}")

    def on_response(self, response: Response) -> None:
        self.responses.append(response)

    def on_console(self, message: ConsoleMessage) -> None:
        # Violations of the policy of content come as errors, too.
        if message.type == "error" and not any(text in message.text for text in self.tolerated):
            self.problems.append(f"console: {message.text}")

    def on_error(self, error: Any) -> None:
        self.problems.append(f"script: {error}")

    def loaded_bytes(self) -> int:
        """Return the sizes of all bodies that the page needed, as they stand unpacked."""
        return sum(len(response.body()) for response in self.responses)


Visit = Callable[..., Page]


@pytest.fixture
def watches() -> list[Watch]:
    return []


@pytest.fixture
def visit(browser: Browser, watches: list[Watch]) -> Iterator[Visit]:
    """`visit(proxy, path, …)` opens a page in a fresh profile; at the end no page may have misbehaved.

    Errors in the console that are part of the test go into `tolerates`, as parts of their text.
    """
    contexts = []

    def open_page(
        proxy: LiveProxy,
        path: str,
        *,
        width_px: int = DESKTOP_PX,
        dark: bool = False,
        language: str = "zh-CN",
        javascript: bool = True,
        tolerates: tuple[str, ...] = (),
        **options: Any,
    ) -> Page:
        context = browser.new_context(
            viewport={"width": width_px, "height": 900},
            color_scheme="dark" if dark else "light",
            locale=language,
            java_script_enabled=javascript,
            reduced_motion="reduce",
            **options,
        )
        contexts.append(context)
        context.set_default_timeout(_PATIENCE_MS)
        watch = Watch(proxy.url, tolerates)
        watches.append(watch)
        context.on("request", watch.on_request)
        context.on("response", watch.on_response)
        page = context.new_page()
        page.on("console", watch.on_console)
        page.on("pageerror", watch.on_error)
        page.goto(proxy.url + path, wait_until="networkidle")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [problem for watch in watches for problem in watch.problems] == []
