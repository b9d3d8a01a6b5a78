"""The reference of /pro: an OpenAPI document, and a page that shows it and lets one try it, from files of our own."""

from __future__ import annotations

import functools
import json
from typing import Any

from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.template.loader import render_to_string
from django.urls import reverse
from django.utils import translation
from django.views.decorators.cache import cache_control
from django.views.decorators.http import conditional_page, require_safe
from drf_spectacular.generators import SchemaGenerator

# What to write into `lang`, by the language of the site.
_TAGS = {"zh-hans": "zh-Hans", "en": "en"}
_FRESH_S = 300


@require_safe
@conditional_page
@cache_control(public=True, max_age=_FRESH_S)
def page(request: HttpRequest) -> HttpResponse:
    """Answer Swagger UI, in the language of `?lang=` or of the reader."""
    language = _language(request)
    other = next(code for code in _TAGS if code != language)
    address = (settings.PUBLIC_URL or f"{request.scheme}://{request.get_host()}") + request.path
    with translation.override(language):
        body = render_to_string(
            "pages/api.html",
            {
                "tag": _TAGS[language],
                "other": other,
                "other_tag": _TAGS[other],
                "document": f"{reverse('api-schema')}?lang={language}",
                "pages": f"/{language}/" if "lang" in request.GET else "/",
                "address": f"{address}?lang={language}",
                "alternates": [
                    *((tag, f"{address}?lang={code}") for code, tag in _TAGS.items()),
                    ("x-default", address),
                ],
            },
        )
    return _in_language(HttpResponse(body), language)


@require_safe
@conditional_page
@cache_control(public=True, max_age=_FRESH_S)
def document(request: HttpRequest) -> HttpResponse:
    """Answer the OpenAPI document as JSON; any page may read it."""
    language = _language(request)
    response = HttpResponse(_written(language), content_type="application/json; charset=utf-8")
    response["Access-Control-Allow-Origin"] = "*"
    return _in_language(response, language)


def _language(request: HttpRequest) -> str:
    asked = request.GET.get("lang", "") or translation.get_language() or ""
    return "en" if asked.startswith("en") else "zh-hans"


def _in_language(response: HttpResponse, language: str) -> HttpResponse:
    response["Content-Language"] = _TAGS[language]
    return response


@functools.lru_cache(maxsize=len(_TAGS))
def _written(language: str) -> bytes:
    with translation.override(language):
        written: dict[str, Any] = SchemaGenerator().get_schema(request=None, public=True)  # type: ignore[no-untyped-call]
        return json.dumps(written, ensure_ascii=False).encode()
