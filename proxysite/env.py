"""Typed readers of the environment: a wrong value stops the start and names the variable."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import socket
import ssl
from decimal import Decimal, InvalidOperation
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from urllib.parse import urlsplit

from django.core.exceptions import ImproperlyConfigured

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}
# By the names of the variables whose values stood in them.
files_read: dict[str, Path] = {}


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
    files_read[name] = Path(path)
    try:
        return files_read[name].read_text(encoding="utf-8").strip()
    except OSError as exc:
        raise ImproperlyConfigured(f"{name}_FILE: {path} cannot be read ({exc.strerror}).") from exc
    except UnicodeDecodeError:
        # Without its cause, which shows what stands in the file: perhaps a secret.
        raise ImproperlyConfigured(f"{name}_FILE: {path} is no text in UTF-8.") from None


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
    """Return an amount of money of 0 or more, exactly as written: with 7 decimals at most, as the ledger keeps it."""
    value = text(name, default)
    try:
        number = Decimal(value)
    except InvalidOperation:
        raise ImproperlyConfigured(f"{name}: {value!r} is not an amount.") from None
    if not number.is_finite() or not 0 <= number < 10**9:
        raise ImproperlyConfigured(f"{name}: {value} is not an amount between 0 and a billion.")
    if number != round(number, 7):
        raise ImproperlyConfigured(f"{name}: {value} has more than 7 decimals.")
    return number


def url(name: str, default: str = "", *, schemes: tuple[str, ...], is_base: bool = False) -> str:
    """Return an absolute URL without its closing slash, or "" where the default is empty.

    `is_base`: paths are put behind it, so it has neither query nor fragment, nor a user who would be left out.
    """
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
    if not value.isprintable() or " " in value:
        raise ImproperlyConfigured(f"{name}: a URL has no blanks.")
    if is_base and ("?" in value or "#" in value or "@" in parts.netloc):
        raise ImproperlyConfigured(f"{name}: a base URL has no user, no query and no fragment.")
    return value


def words(name: str, default: tuple[str, ...] = ()) -> list[str]:
    """Return a comma-separated list, blanks around its parts removed."""
    value = text(name)
    return [part.strip() for part in value.split(",") if part.strip()] if value else list(default)


def secrets_in(name: str, value: str) -> list[str]:
    """Return the secrets of a list, separated by commas or blanks; each is long enough to be one."""
    found = value.replace(",", " ").split()
    if not found or any(len(part) < 32 for part in found):
        raise ImproperlyConfigured(f"{name}: each secret needs 32 characters or more.")
    return found


def networks(name: str) -> list[IPv4Network | IPv6Network]:
    """Return a comma-separated list of networks in CIDR notation; a single address is a network of one."""
    try:
        return [ip_network(word) for word in words(name)]
    except ValueError as exc:
        raise ImproperlyConfigured(f"{name}: {exc}.") from exc


def host(name: str, default: str) -> str:
    """Return an address to listen on, or a name that leads to one."""
    value = text(name, default)
    try:
        socket.getaddrinfo(value, None)
    except (OSError, UnicodeError) as exc:
        raise ImproperlyConfigured(f"{name}: {value!r} is no address to listen on.") from exc
    return value


def proxies(name: str, default: tuple[str, ...]) -> list[str]:
    """Return a comma-separated list of addresses and networks in CIDR notation; `*` is everybody."""
    found = words(name, default)
    try:
        for word in found:
            if word != "*":
                ip_network(word)
    except ValueError as exc:
        raise ImproperlyConfigured(f"{name}: {exc}.") from exc
    return found


def certificates(name: str) -> str:
    """Return the path of a file with certificates, PEM, or ""."""
    path = text(name)
    try:
        if path:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=path)
    except OSError as exc:
        # ssl.SSLError is one too, with a text of its own.
        raise ImproperlyConfigured(f"{name}: {path} holds no certificates that can be read ({exc.strerror}).") from exc
    return path


def require(name: str, *, packages: str, module: str) -> None:
    """Raise ImproperlyConfigured unless the module that a setting needs, of a lock file of its own, is installed."""
    try:
        is_there = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even what it stands in
        is_there = False
    if not is_there:
        raise ImproperlyConfigured(f"{name}: {module} is not installed: pip install -r {packages}, or unset {name}.")


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
    try:
        kept = path.read_text(encoding="ascii").strip()
    except OSError as exc:
        raise ImproperlyConfigured(f"{name}: {path} cannot be read ({exc.strerror}).") from exc
    except UnicodeDecodeError:
        kept = ""
    if len(kept) < 32:
        raise ImproperlyConfigured(f"{name}: {path} holds no usable secret; remove it to have one made.")
    return kept
