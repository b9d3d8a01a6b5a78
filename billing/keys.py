"""What is known of an API key: never the key."""

from __future__ import annotations

import hmac


def fingerprint(api_key: bytes, *, pepper: bytes) -> str:
    """Return HMAC-SHA256(pepper, key) in hex: 64 characters, the same for the same key on every machine."""
    return hmac.digest(pepper, api_key, "sha256").hex()


def hint(api_key: bytes) -> str:
    """Return what an owner recognises a key by and nobody can use: `sk-…last4`; less of short keys."""
    text = api_key.decode("latin-1")
    shown = 4 if len(text) >= 20 else 0
    prefix = "sk-" if text.startswith("sk-") else ""
    return f"{prefix}…{text[-shown:] if shown else ''}"
