"""The pages that everybody may see: landing page, docs, errors. Rendered once per language and address."""

from __future__ import annotations

import functools

from django.conf import settings
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.template.loader import render_to_string
from django.urls import is_valid_path
from django.utils import translation
from django.utils.translation.trans_real import parse_accept_lang_header
from django.views.decorators.cache import cache_control
from django.views.decorators.http import conditional_page, require_safe

from gateway.endpoints import endpoint_of
from gateway.errors import GatewayError, UnknownUrlError
from proxysite.envelope import Message, ProError, failure

CHINESE, ENGLISH = "zh-hans", "en"
# Template's name and address below a language, in the order in which one reads them.
PAGES = {
    "landing": "",
    "start": "docs/",
    "chat": "docs/chat/",
    "conversations": "docs/conversations/",
    "balance": "docs/balance/",
    "apps": "docs/apps/",
    "errors": "docs/errors/",
    "privacy": "docs/privacy/",
}
# What to write into `lang` and `hreflang`.
TAGS = {CHINESE: "zh-Hans", ENGLISH: "en"}

# Of one address in both languages; served below this room.
_REFERENCE = "/docs/api/"
_FRESH_S = 300
_NOTHING_HERE = Message("这个地址什么都没有", "There is nothing at this address.")
_FAILED = Message("服务器内部错误", "Internal server error.")
_ROBOTS = "User-agent: *\nDisallow: /admin/\nDisallow: /pro/\nDisallow: /v1/\nDisallow: /dashboard/\n"


@require_safe
@conditional_page
@cache_control(public=True, max_age=_FRESH_S)
def page(request: HttpRequest, name: str, language: str | None = None) -> HttpResponse:
    """Answer one of PAGES, in the language of its address or, at an address without one, of the reader.

    Django's LocaleMiddleware says that this varies with Accept-Language.
    """
    chosen = language or preferred_language(request)
    render = _rendered.__wrapped__ if settings.DEBUG else _rendered
    response = HttpResponse(render(name, chosen, language is not None, address_of(request)))
    response["Content-Language"] = TAGS[chosen]
    return response


@require_safe
@cache_control(public=True, max_age=86400)
def robots(request: HttpRequest) -> HttpResponse:
    return HttpResponse(_ROBOTS, content_type="text/plain")


@require_safe
@cache_control(public=True, max_age=86400)
def favicon(request: HttpRequest) -> HttpResponse:
    """For whoever asks for /favicon.ico whatever the page says."""
    return HttpResponse((settings.BASE_DIR / "static/site/favicon.ico").read_bytes(), content_type="image/x-icon")


def not_found(request: HttpRequest, exception: Exception | None = None) -> HttpResponse:
    """Answer 404: a page to a browser, to any other client what it reads: /pro's envelope, or OpenAI's error object."""
    if _reads_html(request):
        return _error_page(request, 404)
    if _is_pro(request):
        return _pro_error(404, _NOTHING_HERE)
    return _openai_error(UnknownUrlError(_where_it_is(request)))


def forbidden(request: HttpRequest, exception: Exception | None = None, reason: str = "") -> HttpResponse:
    """Answer 403: to who may not do something, and where a form's token is missing or too old."""
    return _error_page(request, 403) if _reads_html(request) else HttpResponse(status=403)


def server_error(request: HttpRequest) -> HttpResponse:
    """Answer 500 in the same way, without the database, without what went wrong."""
    if _reads_html(request):
        return _error_page(request, 500)
    if _is_pro(request):
        return _pro_error(500, _FAILED)
    return _openai_error(GatewayError("Internal server error."))


def preferred_language(request: HttpRequest) -> str:
    """Return what the reader's Accept-Language asks for; Chinese for whoever asks for nothing.

    Whoever asks for neither of the two reads English more likely than Chinese.
    """
    asked = [code for code, _ in parse_accept_lang_header(request.headers.get("Accept-Language", "").lower()[:200])]
    for code in asked:
        for language in (CHINESE, ENGLISH):
            if code.partition("-")[0] == language.partition("-")[0]:
                return language
    return ENGLISH if asked and asked != ["*"] else CHINESE


def address_of(request: HttpRequest) -> str:
    """Return the address that clients are told to use: PUBLIC_URL, else the one this reader has used."""
    return settings.PUBLIC_URL or f"{request.scheme}://{request.get_host()}"


# Bounded: without PUBLIC_URL addresses are what strangers write into Host.
@functools.lru_cache(maxsize=128)
def _rendered(name: str, language: str, is_fixed: bool, address: str) -> str:
    with translation.override(language):
        return render_to_string(f"pages/{language}/{name}.html", _context(name, language, is_fixed, address))


def _context(name: str, language: str, is_fixed: bool, address: str) -> dict[str, object]:
    prefix = f"/{language}/" if is_fixed else "/"
    return {"name": name, **_frame(PAGES[name], language, prefix, address), **_facts()}


def _facts() -> dict[str, object]:
    """Return what the docs say of the settings."""
    return {
        "is_sandbox": settings.SANDBOX_ENABLED,
        "key": settings.SANDBOX_KEY if settings.SANDBOX_ENABLED else "$OPENAI_API_KEY",
        "window_days": settings.USAGE_WINDOW_DAYS,
        "retention_days": settings.USAGE_RETENTION_DAYS,
        "balance_rate": settings.BALANCE_RATE_PER_MINUTE,
        "is_ledger": settings.BALANCE_SOURCE == "ledger",
        "body_mib": settings.MAX_BODY_BYTES >> 20,
        "header_kib": settings.MAX_HEADER_BYTES >> 10,
        "message_mib": settings.WEBSOCKET_MAX_MESSAGE_BYTES >> 20,
        "connect_s": settings.CONNECT_TIMEOUT_SECONDS,
        "first_byte_s": settings.FIRST_BYTE_TIMEOUT_SECONDS,
        "silence_s": settings.SILENCE_TIMEOUT_SECONDS,
        "session_minutes": settings.SESSION_TTL_SECONDS / 60,
        "content_chars": settings.SESSION_CONTENT_MAX_CHARS,
        "session_model": settings.SESSIONS_MODEL,
        "is_sealed": settings.SESSION_SEALED,
        "is_access_logged": settings.ACCESS_LOG,
    }


def _frame(path: str, language: str, prefix: str, address: str) -> dict[str, object]:
    """Return what the frame around every page needs; `path` is the page's below its language."""
    other = ENGLISH if language == CHINESE else CHINESE
    urls = {name: prefix + path for name, path in PAGES.items()}
    return {
        "address": address,
        "language": language,
        "tag": TAGS[language],
        "urls": urls | {"api": _REFERENCE if prefix == "/" else f"{_REFERENCE}?lang={language}"},
        "own_path": f"/{language}/{path}",
        "other_path": f"/{other}/{path}",
        "other_tag": TAGS[other],
        "alternates": [(tag, f"/{code}/{path}") for code, tag in TAGS.items()] + [("x-default", f"/{path}")],
    }


def _error_page(request: HttpRequest, status: int) -> HttpResponse:
    in_path = request.path_info.split("/", 2)[1] if request.path_info.startswith("/") else ""
    language = in_path if in_path in TAGS else preferred_language(request)
    prefix = f"/{language}/" if in_path in TAGS else "/"
    with translation.override(language):
        body = render_to_string(f"{status}.html", _frame("", language, prefix, address_of(request)))
    response = HttpResponse(body, status=status)
    response["Content-Language"] = TAGS[language]
    response["Cache-Control"] = "no-store"
    return response


def _reads_html(request: HttpRequest) -> bool:
    return "text/html" in request.headers.get("Accept", "")


def _is_pro(request: HttpRequest) -> bool:
    return request.path_info.startswith("/pro/")


def _pro_error(status: int, message: Message) -> HttpResponse:
    response = failure(ProError(status, message))
    response["Access-Control-Allow-Origin"] = "*"
    response["Cache-Control"] = "no-store"
    return response


def _openai_error(error: GatewayError) -> JsonResponse:
    response = JsonResponse({"error": error.fields()}, status=error.status)
    response["Access-Control-Allow-Origin"] = "*"
    response["Cache-Control"] = "no-store"
    return response


def _where_it_is(request: HttpRequest) -> str:
    """Return a message that finds the most frequent mistakes: a slash too many, a base address without /v1."""
    path = request.path_info
    if path.endswith("/") and is_valid_path(path.rstrip("/")):
        return f"There is nothing at {path}. Did you mean {path.rstrip('/')}?"
    route = endpoint_of(request.method or "", b"/v1" + path.encode("utf-8", "replace")).route
    if route.startswith("/v1/"):
        return f"There is nothing at {path}. Did you mean /v1{path}? The base address is {address_of(request)}/v1."
    return f"There is nothing at {path[:200]}."
