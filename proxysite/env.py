"""Typed readers of the environment: a wrong value stops the start and names the variable."""

from __future__ import annotations

import contextlib
import os
import secrets
from decimal import Decimal, InvalidOperation
from pathlib import Path
from urllib.parse import urlsplit

from django.core.exceptions import ImproperlyConfigured

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}


def text(name: str, default: str = "") -> str:
    """Return the variable, or the content of the file that `NAME_FILE` names, or the default.

    An empty variable counts as not set, so that `NAME= command` means the default.
    """
    value = os.environ.get(name, "")
    if value:
        return value
    path = os.environ.get(f"{name}_FILE", "")
    if not path:
        return default
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError as exc:
        raise ImproperlyConfigured(f"{name}_FILE: {path} cannot be read ({exc.strerror}).") from exc


def choice(name: str, default: str, *, choices: tuple[str, ...]) -> str:
    value = text(name, default)
    if value not in choices:
        raise ImproperlyConfigured(f"{name}: {value!r} is not one of {', '.join(choices)}.")
    return value


def flag(name: str, default: bool) -> bool:
    value = text(name).lower()
    if not value:
        return default
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise ImproperlyConfigured(f"{name}: {value!r} is neither true nor false.")


def whole(name: str, default: int, *, least: int = 0, most: int = 2**63 - 1) -> int:
    value = text(name)
    try:
        number = int(value) if value else default
    except ValueError as exc:
        raise ImproperlyConfigured(f"{name}: {value!r} is not a whole number.") from exc
    if not least <= number <= most:
        raise ImproperlyConfigured(f"{name}: {number} is not between {least} and {most}.")
    return number


def seconds(name: str, default: float) -> float:
    """Return a length of time in seconds, more than zero."""
    value = text(name)
    try:
        number = float(value) if value else default
    except ValueError as exc:
        raise ImproperlyConfigured(f"{name}: {value!r} is not a number of seconds.") from exc
    if not 0 < number < 1e9:
        raise ImproperlyConfigured(f"{name}: {number} is not a length of time in seconds.")
    return number


def amount(name: str, default: str) -> Decimal:
    """Return an amount of money of 0 or more, exactly as written."""
    value = text(name, default)
    try:
        number = Decimal(value)
    except InvalidOperation:
        raise ImproperlyConfigured(f"{name}: {value!r} is not an amount.") from None
    if not number.is_finite() or not 0 <= number < 10**9:
        raise ImproperlyConfigured(f"{name}: {value} is not an amount between 0 and a billion.")
    return number


def url(name: str, default: str = "", *, schemes: tuple[str, ...]) -> str:
    """Return an absolute URL without its closing slash, or "" where the default is empty."""
    value = text(name, default).rstrip("/")
    if not value:
        return ""
    try:
        parts = urlsplit(value)
        port_is_valid = parts.port is None or parts.port > 0
    except ValueError:
        raise ImproperlyConfigured(f"{name}: not a URL.") from None
    # The value itself is not shown: an address may hold a password.
    if parts.scheme not in schemes or not parts.hostname or not port_is_valid:
        raise ImproperlyConfigured(f"{name}: not an absolute URL with one of the schemes {', '.join(schemes)}.")
    return value


def words(name: str, default: tuple[str, ...] = ()) -> list[str]:
    """Return a comma-separated list, blanks around its parts removed."""
    value = text(name)
    return [part.strip() for part in value.split(",") if part.strip()] if value else list(default)


def secret(name: str, path: Path) -> str:
    """Return the variable, or the secret kept in `path`, generated there on first use with mode 0600.

    Two processes that start together agree on one secret.
    """
    value = text(name)
    if value:
        return value
    if not path.exists():
        # Written aside and linked into place: nobody ever reads a half-written secret, and of two
        # processes that start together only one can create the name.
        aside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(secrets.token_urlsafe(48))
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        except OSError as exc:
            raise ImproperlyConfigured(f"{name}: {path} cannot be written ({exc.strerror}).") from exc
        finally:
            aside.unlink(missing_ok=True)
    kept = path.read_text(encoding="ascii").strip()
    if len(kept) < 32:
        raise ImproperlyConfigured(f"{name}: {path} holds no usable secret; remove it to have one made.")
    return kept
