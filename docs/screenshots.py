"""`make screenshots`: the pictures in docs/images, from a live instance with invented use."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from gateway.tests.fake_upstream import FakeUpstream
from gateway.tests.live import LiveProxy

_IMAGES = Path(__file__).parent / "images"
_RECORDS = 20_000
# One of the invented keys becomes the sandbox's, so that "Check your key" has something to show.
_GIVE_USE_TO_SANDBOX = """
from django.conf import settings
from billing.keys import fingerprint
from billing.models import ApiKey
own = fingerprint(settings.SANDBOX_KEY.encode(), pepper=settings.KEY_PEPPER.encode())
ApiKey.objects.filter(hint="sk-…0000").update(fingerprint=own)
"""


def _run(page: Page) -> None:
    page.click(".run")
    page.wait_for_selector(".run:not([disabled])")
    page.evaluate("window.scrollTo(0, 0)")


def _show_key(page: Page) -> None:
    page.click(".use-sample")
    page.wait_for_selector(".key-result:not([hidden])")
    page.locator("#key").evaluate("section => window.scrollTo(0, section.offsetTop - 61)")


@dataclass(frozen=True)
class Shot:
    """One picture: `prepare` gets the page once it is loaded; `signs_in` asks for an operator's session first."""

    name: str
    path: str
    prepare: Callable[[Page], None] = lambda page: None
    dark: bool = False
    signs_in: bool = False
    language: str = "en-GB"
    height_px: int = 760


SHOTS = (
    Shot("landing", "/en/", _run),
    Shot("landing.zh-CN", "/zh-hans/", _run, language="zh-CN"),
    Shot("key", "/en/", _show_key, dark=True, height_px=1000),
    Shot("key.zh-CN", "/zh-hans/", _show_key, dark=True, height_px=1000, language="zh-CN"),
    Shot("dashboard", "/admin/", signs_in=True, height_px=1000),
    Shot("dashboard.zh-CN", "/admin/", signs_in=True, height_px=1000, language="zh-CN"),
)


def main() -> None:
    """Take every picture anew."""
    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("no Chromium here: apt-get install chromium fonts-noto-cjk pngquant")
    _IMAGES.mkdir(exist_ok=True)
    with (
        FakeUpstream() as upstream,
        LiveProxy(
            UPSTREAM_URL=upstream.url, SANDBOX_ENABLED="true", CELERY_EMBEDDED="true", HEARTBEAT_SECONDS="2"
        ) as proxy,
    ):
        proxy.manage("seed_usage", str(_RECORDS))
        proxy.manage("shell", "-c", _GIVE_USE_TO_SANDBOX)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            for shot in SHOTS:
                _take(shot, browser, proxy)
            browser.close()


def _take(shot: Shot, browser: Browser, proxy: LiveProxy) -> None:
    context = browser.new_context(
        viewport={"width": 1280, "height": shot.height_px},
        color_scheme="dark" if shot.dark else "light",
        locale=shot.language,
        reduced_motion="reduce",
    )
    page = context.new_page()
    if shot.signs_in:
        _sign_in(page, proxy)
    page.goto(proxy.url + shot.path, wait_until="networkidle")
    shot.prepare(page)
    target = _IMAGES / f"{shot.name}.png"
    page.screenshot(path=target)
    context.close()
    if pngquant := shutil.which("pngquant"):
        subprocess.run([pngquant, "--force", "--skip-if-larger", "--ext", ".png", "64", str(target)], check=False)
    print(f"{target} {target.stat().st_size // 1024} KiB")


def _sign_in(page: Page, proxy: LiveProxy) -> None:
    found = re.search(r"First operator: (\S+) / (\S+)", proxy.setup_output)
    if found is None:
        raise SystemExit("`manage.py setup` printed no password")
    page.goto(proxy.url + "/admin/")
    page.fill("[name=username]", found[1])
    page.fill("[name=password]", found[2])
    page.click("[type=submit]")
    page.wait_for_url(proxy.url + "/admin/")


if __name__ == "__main__":
    main()
