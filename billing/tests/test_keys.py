from __future__ import annotations

import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.keys import Fingerprinter, fingerprint, hint


@given(st.binary(max_size=300), st.binary(min_size=1, max_size=150))
def test_a_fingerprint_is_an_hmac_by_either_way(api_key: bytes, pepper: bytes) -> None:
    expected = hmac.new(pepper, api_key, "sha256").hexdigest()
    assert fingerprint(api_key, pepper=pepper) == expected
    fingerprints = Fingerprinter(pepper)
    assert [fingerprints(api_key), fingerprints(api_key)] == [expected, expected]


@pytest.mark.parametrize(
    ("api_key", "shown"),
    [
        (b"sk-proj-0123456789abcdefWXYZ", "sk-…WXYZ"),
        (b"0123456789abcdef0123", "…0123"),
        (b"sk-short", "sk-…"),
        (b"", "…"),
    ],
)
def test_a_hint_shows_little_of_a_key_and_nothing_of_a_short_one(api_key: bytes, shown: str) -> None:
    assert hint(api_key) == shown
