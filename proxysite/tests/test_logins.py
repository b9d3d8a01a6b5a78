"""Logging in against the live server: what locks, whom, and what a second factor asks for."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator

import httpx2 as httpx
import pytest
from django_otp.oath import TOTP

from gateway.tests.live import LiveProxy

PASSWORD = "correct-horse-battery"
LIMIT = 3
_NEW_USER = """
import sys
from django.contrib.auth import get_user_model
get_user_model().objects.create_superuser(sys.argv[1], password=sys.argv[2])
"""


@pytest.fixture(scope="module")
def site() -> Iterator[LiveProxy]:
    # This client is a trusted proxy to it, which 127.0.0.1 is by default, so that addresses can be chosen.
    with LiveProxy(LOGIN_FAILURE_LIMIT=str(LIMIT), TRUSTED_PROXIES="127.0.0.1, 10.0.0.0/8") as proxy:
        yield proxy


@pytest.fixture(scope="module")
def open_site() -> Iterator[LiveProxy]:
    """A site that trusts nobody's word about addresses."""
    with LiveProxy(LOGIN_FAILURE_LIMIT=str(LIMIT), TRUSTED_PROXIES="192.0.2.1") as proxy:
        yield proxy


class Browser:
    """As much of a browser as logging in takes."""

    def __init__(self, site: LiveProxy, *, address: str = "") -> None:
        headers = {"X-Forwarded-For": address, "Accept-Language": "en"} if address else {"Accept-Language": "en"}
        self.client = httpx.Client(base_url=site.url, headers=headers, trust_env=False, timeout=60)

    def post(self, path: str, **fields: str) -> httpx.Response:
        token = re.search(r'name="csrfmiddlewaretoken" value="([^"]+)"', self.client.get(path).text)
        assert token is not None
        return self.client.post(path, data={"csrfmiddlewaretoken": token[1], **fields})

    def log_in(self, name: str, password: str = PASSWORD, code: str = "") -> int:
        """Return 302 for one who is let in, 200 for one who may try again, 429 for one who must wait."""
        fields = {"username": name, "password": password, "second_factor": code, "next": "/admin/"}
        return self.post("/admin/login/", **fields).status_code

    def is_in(self) -> bool:
        return self.client.get("/admin/").status_code == 200


def new_user(site: LiveProxy, name: str) -> str:
    site.manage("shell", "-v", "0", "-c", f"import sys; sys.argv = ['', {name!r}, {PASSWORD!r}]\n{_NEW_USER}")
    return name


# Failures


def test_too_many_failures_lock_a_name_for_an_address_and_for_no_other(site: LiveProxy) -> None:
    name, other = new_user(site, "anna"), new_user(site, "bert")
    guesser = Browser(site, address="203.0.113.7")
    assert [guesser.log_in(name, "wrong") for _ in range(LIMIT)] == [200] * (LIMIT - 1) + [429]
    refused = guesser.post("/admin/login/", username=name, password=PASSWORD)
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "900")
    assert "Too many failed logins" in refused.text
    assert Browser(site, address="203.0.113.7").log_in(name) == 429
    assert Browser(site, address="203.0.113.8").log_in(name) == 302
    assert Browser(site, address="203.0.113.7").log_in(other) == 302


def test_addresses_that_an_untrusted_client_names_do_not_help_it(open_site: LiveProxy) -> None:
    name = new_user(open_site, "carl")
    tries = [Browser(open_site, address=f"203.0.113.{n}").log_in(name, "wrong") for n in range(LIMIT)]
    assert tries[-1] == 429
    assert Browser(open_site, address="198.51.100.1").log_in(name) == 429
    (address,) = set(open_site.rows("SELECT ip_address FROM axes_accessattempt"))
    assert str(address[0]) == "127.0.0.1"


def test_a_chain_of_trusted_proxies_is_followed_to_the_first_that_is_not(site: LiveProxy) -> None:
    name = new_user(site, "dora")
    for n in range(LIMIT):
        # What comes first in the field is what the client itself has made up.
        last = Browser(site, address=f"198.51.100.{n}, 203.0.113.50, 10.1.2.3").log_in(name, "wrong")
    assert last == 429
    assert Browser(site, address="203.0.113.50").log_in(name) == 429


def test_an_ipv6_client_is_its_network(site: LiveProxy) -> None:
    name = new_user(site, "emil")
    for n in range(LIMIT):
        last = Browser(site, address=f"2001:db8:1:2::{n + 1}").log_in(name, "wrong")
    assert last == 429
    assert Browser(site, address="2001:db8:1:3::1").log_in(name) == 302


def test_an_address_that_is_none_breaks_nothing(site: LiveProxy) -> None:
    name = new_user(site, "fred")
    assert Browser(site, address="unknown").log_in(name, "wrong") == 200
    assert Browser(site, address="unknown").log_in(name) == 302


def test_a_good_login_starts_the_count_anew(site: LiveProxy) -> None:
    name = new_user(site, "gabi")
    browser = Browser(site, address="203.0.113.20")
    for _ in range(2):
        assert [browser.log_in(name, "wrong") for _ in range(LIMIT - 1)] == [200] * (LIMIT - 1)
        assert Browser(site, address="203.0.113.20").log_in(name) == 302


def test_an_unlocked_login_may_try_again(site: LiveProxy) -> None:
    name, admin = new_user(site, "hans"), new_user(site, "ilse")
    for _ in range(LIMIT):
        Browser(site, address="203.0.113.30").log_in(name, "wrong")
    operator = Browser(site, address="203.0.113.31")
    operator.log_in(admin)
    ((attempt,),) = site.rows(f"SELECT id FROM axes_accessattempt WHERE username = '{name}'")
    assert operator.post(f"/admin/axes/accessattempt/{attempt}/delete/", post="yes").status_code == 302
    assert Browser(site, address="203.0.113.30").log_in(name) == 302


def test_no_password_and_no_code_is_written_down(site: LiveProxy) -> None:
    name = new_user(site, "jana")
    Browser(site, address="203.0.113.40").log_in(name, "secret-but-wrong-password", "987654")
    stored = repr(site.rows("SELECT * FROM axes_accessattempt")) + repr(
        site.rows("SELECT * FROM axes_accessfailurelog")
    )
    for secret in ("secret-but-wrong-password", "987654"):
        assert secret not in stored + site.log


# The second factor


def code_of(secret: str, *, ahead: int = 0) -> str:
    """Return the code that an app shows now, or some steps later; a code is good once."""
    totp = TOTP(base64.b32decode(secret))
    totp.time = totp.time + 30 * ahead
    return f"{totp.token():06}"


def set_up(browser: Browser) -> tuple[str, list[str]]:
    """Set up a second factor and return its secret and the recovery codes."""
    page = browser.client.get("/admin/second-factor/").text
    assert 'src="data:image/svg+xml;base64,' in page
    secret = re.search(r'id="secret">([A-Z2-7 ]+)<', page)
    assert secret is not None
    key = secret[1].replace(" ", "")
    done = browser.post("/admin/second-factor/", act="confirm", code=code_of(key), password=PASSWORD)
    codes = re.findall(r"<li>([a-z2-7]{8})</li>", done.text)
    assert len(codes) == 10
    return key, codes


def test_who_has_set_up_a_second_factor_needs_it(site: LiveProxy) -> None:
    name = new_user(site, "kurt")
    before, browser = Browser(site, address="203.0.113.60"), Browser(site, address="203.0.113.60")
    assert (before.log_in(name), browser.log_in(name)) == (302, 302)
    secret, codes = set_up(browser)
    assert browser.is_in()
    assert not before.is_in()  # was let in by the password alone
    assert Browser(site, address="203.0.113.61").log_in(name) == 200
    assert Browser(site, address="203.0.113.63").log_in(name, code=code_of(secret, ahead=1)) == 302
    assert Browser(site, address="203.0.113.62").log_in(name, code="000000") == 200
    assert Browser(site, address="203.0.113.64").log_in(name, code=codes[0]) == 302
    assert Browser(site, address="203.0.113.65").log_in(name, code=codes[0]) == 200  # used up


def test_the_answer_does_not_tell_which_of_the_three_was_wrong(site: LiveProxy) -> None:
    name = new_user(site, "lena")
    browser = Browser(site, address="203.0.113.70")
    browser.log_in(name)
    set_up(browser)

    def answer(password: str, code: str, address: str) -> str:
        page = Browser(site, address=address).post(
            "/admin/login/", username=name, password=password, second_factor=code
        )
        return re.sub(r'value="[^"]*"', "", page.text)

    wrong_code = answer(PASSWORD, "123123", "203.0.113.71")
    assert "authentication code is wrong" in wrong_code
    assert wrong_code == answer("wrong", "123123", "203.0.113.72")


def test_wrong_codes_lock_like_wrong_passwords(site: LiveProxy) -> None:
    name = new_user(site, "mona")
    browser = Browser(site, address="203.0.113.80")
    browser.log_in(name)
    _, codes = set_up(browser)
    guesser = Browser(site, address="203.0.113.81")
    assert [guesser.log_in(name, code="111111") for _ in range(LIMIT)][-1] == 429
    assert Browser(site, address="203.0.113.81").log_in(name, code=codes[0]) == 429


def test_a_second_factor_is_changed_only_with_the_password(site: LiveProxy) -> None:
    name = new_user(site, "nils")
    browser = Browser(site, address="203.0.113.90")
    browser.log_in(name)
    _, codes = set_up(browser)
    browser.post("/admin/second-factor/", act="remove", password="wrong")
    assert Browser(site, address="203.0.113.91").log_in(name) == 200
    renewed = browser.post("/admin/second-factor/", act="renew", password=PASSWORD)
    assert set(re.findall(r"<li>([a-z2-7]{8})</li>", renewed.text)).isdisjoint(codes)
    assert Browser(site, address="203.0.113.92").log_in(name, code=codes[1]) == 200
    assert browser.post("/admin/second-factor/", act="remove", password=PASSWORD).status_code == 302
    assert Browser(site, address="203.0.113.93").log_in(name) == 302


def test_an_operator_removes_the_second_factor_of_who_has_lost_it(site: LiveProxy) -> None:
    name, admin = new_user(site, "olaf"), new_user(site, "petra")
    browser, operator = Browser(site, address="203.0.113.95"), Browser(site, address="203.0.113.96")
    browser.log_in(name)
    set_up(browser)
    operator.log_in(admin)
    ((user,),) = site.rows(f"SELECT id FROM auth_user WHERE username = '{name}'")
    fields = {"action": "remove_second_factor", "_selected_action": str(user), "confirmed": "yes"}
    assert operator.post("/admin/auth/user/", **fields).status_code == 302
    assert Browser(site, address="203.0.113.97").log_in(name) == 302
    assert site.rows(f"SELECT count(*) FROM django_admin_log WHERE object_id = '{user}' AND action_flag = 2") == [(2,)]
