"""What is said, encrypted at rest: AES-256-GCM, each session with keys of its own.

A sealed text is an id of the key (4 bytes), a random nonce (12), the ciphertext and its tag. Its place in its session
is associated data, so that a row works nowhere but where it was written.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from django.conf import settings

from sessions_api.models import ChatSession

_ID_BYTES = 4
_NONCE_BYTES = 12
_CALLERS_KEY_ID = b"\0" * _ID_BYTES
_MESSAGES = b"sessions_api messages"


class UnreadableError(Exception):
    """A text cannot be decrypted: it was written elsewhere or tampered with, or its key is gone."""


class SealedError(UnreadableError):
    """Only the caller's API key opens this session."""


class Keyring:
    """The operator's secrets: the first encrypts, all decrypt."""

    def __init__(self, secrets: Sequence[str]) -> None:
        self._secrets = {_key_id(secret): secret.encode() for secret in reversed(secrets)}
        self.newest_id = _key_id(secrets[0])

    def secret(self, key_id: bytes) -> bytes:
        """Return a secret. Raises UnreadableError if it is not among SESSION_KEYS."""
        try:
            return self._secrets[key_id]
        except KeyError:
            raise UnreadableError("SESSION_KEYS does not hold the key of this text") from None


class Sealer:
    """Encrypts and decrypts what is said in one session."""

    def __init__(self, session: ChatSession, *, secrets: Keyring | None, api_key: bytes | None = None) -> None:
        self._place = _lengths_and_texts(session.key_fingerprint, session.session_id, session.incarnation)
        self._incarnation = bytes.fromhex(session.incarnation)
        self._secrets = secrets
        self._api_key = api_key
        self._ciphers: dict[bytes, AESGCM] = {}

    def seal(self, text: str, *, position: int, role: str) -> bytes:
        """Return the text for the message at that position."""
        key_id = self._secrets.newest_id if self._secrets is not None else _CALLERS_KEY_ID
        nonce = os.urandom(_NONCE_BYTES)
        return key_id + nonce + self._cipher(key_id).encrypt(nonce, text.encode(), self._bound_to(position, role))

    def open(self, sealed: bytes | memoryview[int], *, position: int, role: str) -> str:
        """Return what was said there. Raises UnreadableError."""
        sealed = bytes(sealed)
        key_id, nonce = sealed[:_ID_BYTES], sealed[_ID_BYTES : _ID_BYTES + _NONCE_BYTES]
        try:
            text = self._cipher(key_id).decrypt(
                nonce, sealed[_ID_BYTES + _NONCE_BYTES :], self._bound_to(position, role)
            )
        except (InvalidTag, ValueError) as exc:
            raise UnreadableError("a text was not written here") from exc
        return text.decode()

    def is_current(self, sealed: bytes | memoryview[int]) -> bool:
        """Return whether the newest secret encrypted it."""
        return self._secrets is None or bytes(sealed[:_ID_BYTES]) == self._secrets.newest_id

    def _cipher(self, key_id: bytes) -> AESGCM:
        cipher = self._ciphers.get(key_id)
        if cipher is None:
            cipher = self._ciphers[key_id] = AESGCM(self._session_key(key_id))
        return cipher

    def _session_key(self, key_id: bytes) -> bytes:
        # A key for each session: random nonces of one key would have to be counted, those of a session are few.
        if self._secrets is not None:
            return _derived(self._secrets.secret(key_id), salt=self._incarnation, info=_MESSAGES)
        if self._api_key is None:
            raise SealedError("only the caller's API key opens this session")
        # HKDF begins with HMAC(salt, key): the pepper alone for a salt would make that the fingerprint, which is known.
        salt = b"sessions_api sealed\0" + settings.KEY_PEPPER.encode()
        return _derived(self._api_key, salt=salt, info=_MESSAGES + self._incarnation)

    def _bound_to(self, position: int, role: str) -> bytes:
        return self._place + _lengths_and_texts(str(position), role)


def sealer_for(session: ChatSession, *, api_key: bytes | None = None) -> Sealer:
    """Return what opens a session: the operator's secrets, or for a sealed one its caller's API key."""
    if session.is_sealed:
        return Sealer(session, secrets=None, api_key=api_key)
    return Sealer(session, secrets=_keyring(tuple(settings.SESSION_KEYS)))


@functools.lru_cache(maxsize=4)
def _keyring(secrets: tuple[str, ...]) -> Keyring:
    return Keyring(secrets)


def _key_id(secret: str) -> bytes:
    return _derived(secret.encode(), salt=b"", info=b"sessions_api key id")[:_ID_BYTES]


def _derived(secret: bytes, *, salt: bytes, info: bytes) -> bytes:
    return HKDF(hashes.SHA256(), length=32, salt=salt, info=info).derive(secret)


def _lengths_and_texts(*texts: str) -> bytes:
    """Return the texts so that no two lists of them look the same."""
    encoded = [text.encode() for text in texts]
    return b"".join(len(text).to_bytes(4, "big") + text for text in encoded)
