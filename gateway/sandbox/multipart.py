"""A multipart/form-data body, read as a whole (RFC 7578). Pure."""

from __future__ import annotations

import re
from typing import Any

from gateway.sandbox.fields import SandboxError
from gateway.sandbox.wire import Upload

_MOST_PARTS = 128
_LONGEST_HEAD = 8192
_LONGEST_FILENAME = 255

_BOUNDARY = re.compile(rb'boundary="?([^";,\r\n]{1,70})"?', re.IGNORECASE)
_DISPOSITION = re.compile(rb"^content-disposition:[ \t]*form-data(.*)$", re.IGNORECASE | re.MULTILINE)
_PARAMETER = re.compile(rb';[ \t]*(name|filename)="((?:[^"\\\r\n]|\\.)*)"', re.IGNORECASE)
_CONTENT_TYPE = re.compile(rb"^content-type:[ \t]*([^\r\n]*)", re.IGNORECASE | re.MULTILINE)


def parse_form(content_type: bytes, body: bytes) -> tuple[dict[str, Any], tuple[Upload, ...]]:
    """Return the text fields and the files of a form. `name[]` collects a list under `name`.

    SandboxError 400 when the body is no such form, when it stops early, or has more than 128 parts.
    """
    found = _BOUNDARY.search(content_type)
    if found is None:
        raise _unreadable("the Content-Type names no boundary")
    fields: dict[str, Any] = {}
    uploads: list[Upload] = []
    for head, content in _parts(body, b"--" + found[1].rstrip()):
        name, filename = _names(head)
        field = name.removesuffix("[]")
        if filename is not None:
            uploads.append(Upload(field, filename[:_LONGEST_FILENAME], _content_type(head), content))
        elif name.endswith("[]"):
            fields.setdefault(field, [])
            if isinstance(fields[field], list):
                fields[field].append(_text(content))
        else:
            fields[name] = _text(content)
    return fields, tuple(uploads)


def _parts(body: bytes, dashes: bytes) -> list[tuple[bytes, bytes]]:
    start = 0 if body.startswith(dashes) else body.find(b"\r\n" + dashes) + 2
    if start == 1:
        raise _unreadable("its boundary is not in the body")
    delimiter = b"\r\n" + dashes
    position = start + len(dashes)
    parts: list[tuple[bytes, bytes]] = []
    while not body.startswith(b"--", position):
        head_end = body.find(b"\r\n\r\n", position, position + _LONGEST_HEAD)
        if head_end < 0:
            raise _unreadable("a part has no end of its headers")
        end = body.find(delimiter, head_end + 4)
        if end < 0:
            raise _unreadable("the body ends inside a part")
        if len(parts) == _MOST_PARTS:
            raise _unreadable(f"it has more than {_MOST_PARTS} parts")
        parts.append((body[position:head_end], body[head_end + 4 : end]))
        position = end + len(delimiter)
    return parts


def _names(head: bytes) -> tuple[str, str | None]:
    disposition = _DISPOSITION.search(head)
    found = dict(_PARAMETER.findall(disposition[1])) if disposition else {}
    names = {key.lower(): _unquoted(value) for key, value in found.items()}
    if b"name" not in names:
        raise _unreadable("a part has no name")
    return names[b"name"], names.get(b"filename")


def _unquoted(value: bytes) -> str:
    """Undo both ways in use to write a quote in a name: backslash (curl) and percent (browsers, httpx)."""
    return re.sub(r"\\(.)", r"\1", _text(value)).replace("%22", '"')


def _content_type(head: bytes) -> str:
    found = _CONTENT_TYPE.search(head)
    return _text(found[1]).strip() if found else "application/octet-stream"


def _text(value: bytes) -> str:
    return value.decode(errors="replace")


def _unreadable(why: str) -> SandboxError:
    return SandboxError(400, f"Could not parse multipart form: {why}.", code="invalid_multipart_form_data")
