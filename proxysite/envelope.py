"""The answer of /pro: `{"code", "message", "data"}`, with the HTTP status as its code, in the reader's language."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
from django.http import HttpResponse
from django.utils.translation import get_language

# Decimals as they are written, 18.00 and not 18.0: they are JSON numbers all the same.
encode_json = msgspec.json.Encoder(decimal_format="number").encode


class Message(NamedTuple):
    """One sentence in the languages of the site; Chinese is the language of whoever asks for neither."""

    zh: str
    en: str

    def __str__(self) -> str:
        return self.en if (get_language() or "").startswith("en") else self.zh


SUCCESS = Message("执行成功", "Success")


class ProError(Exception):
    """An answer of /pro that is none of success: its HTTP status and what the caller is told."""

    def __init__(self, status: int, message: Message, *, retry_after_s: int | None = None) -> None:
        super().__init__(message.en)
        self.status = status
        self.message = message
        self.retry_after_s = retry_after_s


def success(data: Any) -> HttpResponse:
    return _answer(200, SUCCESS, data)


def failure(error: ProError) -> HttpResponse:
    response = _answer(error.status, error.message, None)
    if error.retry_after_s is not None:
        response["Retry-After"] = str(error.retry_after_s)
    return response


def _answer(status: int, message: Message, data: Any) -> HttpResponse:
    body = encode_json({"code": status, "message": str(message), "data": data})
    return HttpResponse(body, status=status, content_type="application/json; charset=utf-8")
