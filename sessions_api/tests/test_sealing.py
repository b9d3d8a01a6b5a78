"""A text opens where it was written, with the keys it was written with, and nowhere else."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand
from hypothesis import given
from hypothesis import strategies as st
from pytest_django import Settings

from sessions_api.models import ChatSession
from sessions_api.sealing import SealedError, UnreadableError, sealer_for
from sessions_api.tests.conversations import API_KEY, caller

OLD, NEW = "old-secret-" * 4, "new-secret-" * 4


def session(**changed: Any) -> ChatSession:
    fields = {"key_fingerprint": "f" * 64, "session_id": "s", "incarnation": "0" * 32, "is_sealed": False}
    return ChatSession(**fields | changed)


@pytest.fixture(autouse=True)
def _keys(settings: Settings) -> None:
    settings.SESSION_KEYS = [OLD]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_what_is_sealed_opens_again(text: str) -> None:
    for place in (session(), session(is_sealed=True)):
        sealer = sealer_for(place, api_key=b"sk-x")
        sealed = sealer.seal(text, position=3, role="user")
        assert sealer_for(place, api_key=b"sk-x").open(sealed, position=3, role="user") == text


def test_the_same_text_never_looks_the_same() -> None:
    sealer = sealer_for(session())
    assert len({sealer.seal("text", position=0, role="user") for _ in range(100)}) == 100


@dataclasses.dataclass
class Elsewhere:
    session: ChatSession
    position: int = 3
    role: str = "user"


@pytest.mark.parametrize(
    "place",
    [
        Elsewhere(session(), position=4),
        Elsewhere(session(), role="assistant"),
        Elsewhere(session(session_id="t")),
        Elsewhere(session(key_fingerprint="e" * 64)),
        Elsewhere(session(incarnation="1" * 32)),
        # The parts of a place do not run into each other.
        Elsewhere(session(key_fingerprint="f" * 63, session_id="fs")),
    ],
)
def test_a_text_opens_nowhere_else(place: Elsewhere) -> None:
    sealed = sealer_for(session()).seal("text", position=3, role="user")
    with pytest.raises(UnreadableError):
        sealer_for(place.session).open(sealed, position=place.position, role=place.role)


def test_a_changed_text_does_not_open() -> None:
    sealer = sealer_for(session())
    sealed = sealer.seal("text", position=0, role="user")
    for at in range(len(sealed)):
        changed = sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :]
        with pytest.raises(UnreadableError):
            sealer.open(changed, position=0, role="user")
    for size in range(len(sealed)):
        with pytest.raises(UnreadableError):
            sealer.open(sealed[:size], position=0, role="user")


def test_the_first_secret_encrypts_and_all_decrypt(settings: Settings) -> None:
    old = sealer_for(session()).seal("text", position=0, role="user")
    settings.SESSION_KEYS = [NEW, OLD]
    both = sealer_for(session())
    assert both.open(old, position=0, role="user") == "text"
    assert not both.is_current(old)
    new = both.seal("text", position=0, role="user")
    assert both.is_current(new)
    settings.SESSION_KEYS = [NEW]
    assert sealer_for(session()).open(new, position=0, role="user") == "text"
    with pytest.raises(UnreadableError):
        sealer_for(session()).open(old, position=0, role="user")


def test_a_sealed_session_opens_with_its_callers_key_only(settings: Settings) -> None:
    sealed = sealer_for(session(is_sealed=True), api_key=b"sk-mine").seal("text", position=0, role="user")
    settings.SESSION_KEYS = [NEW]  # which have nothing to do with it
    assert sealer_for(session(is_sealed=True), api_key=b"sk-mine").open(sealed, position=0, role="user") == "text"
    with pytest.raises(SealedError):
        sealer_for(session(is_sealed=True)).open(sealed, position=0, role="user")
    with pytest.raises(UnreadableError):
        sealer_for(session(is_sealed=True), api_key=b"sk-yours").open(sealed, position=0, role="user")
    with pytest.raises(UnreadableError):
        sealer_for(session()).open(sealed, position=0, role="user")


def test_the_fingerprint_does_not_open_a_sealed_session(settings: Settings) -> None:
    """The fingerprint is HMAC(pepper, key), which is what HKDF with the pepper for a salt would go on from."""
    who = caller()
    place = session(is_sealed=True, key_fingerprint=who.fingerprint)
    sealed = sealer_for(place, api_key=who.api_key).seal("text", position=0, role="user")
    info = b"sessions_api messages" + bytes.fromhex(place.incarnation)
    bound = b"".join(
        len(part).to_bytes(4, "big") + part
        for part in (place.key_fingerprint.encode(), b"s", place.incarnation.encode(), b"0", b"user")
    )

    def opened_with(key: bytes) -> bytes | None:
        try:
            return AESGCM(key).decrypt(sealed[4:16], sealed[16:], bound)
        except Exception:
            return None

    pepper = settings.KEY_PEPPER.encode()
    right = HKDF(hashes.SHA256(), 32, b"sessions_api sealed\0" + pepper, info).derive(API_KEY.encode())
    assert opened_with(right) == b"text"
    assert opened_with(HKDFExpand(hashes.SHA256(), 32, info).derive(bytes.fromhex(who.fingerprint))) is None
