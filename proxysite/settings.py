"""The one place that reads the environment. Each variable stands in the README's table; a test compares."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import environ
from django.core.exceptions import ImproperlyConfigured

from proxysite import env

BASE_DIR = Path(__file__).resolve().parent.parent
MIB = 1024 * 1024

# Where it runs
DEBUG = env.flag("DEBUG", False)
HOST = env.text("HOST", "127.0.0.1")
PORT = env.whole("PORT", 8000, least=1, most=65535)
WORKERS = env.whole("WORKERS", 1, least=1, most=256)
VAR_DIR = Path(env.text("VAR_DIR", str(BASE_DIR / "var"))).absolute()
PUBLIC_URL = env.url("PUBLIC_URL", schemes=("http", "https"))
TRUSTED_PROXIES = env.words("TRUSTED_PROXIES", ("127.0.0.1", "::1"))
LOG_LEVEL = env.choice("LOG_LEVEL", "INFO", choices=("DEBUG", "INFO", "WARNING", "ERROR"))

try:
    VAR_DIR.mkdir(mode=0o700, parents=True, exist_ok=True)
except OSError as exc:
    raise ImproperlyConfigured(f"VAR_DIR: {VAR_DIR} cannot be made ({exc.strerror}).") from exc

SECRET_KEY = env.secret("SECRET_KEY", VAR_DIR / "secret_key")
KEY_PEPPER = env.secret("KEY_PEPPER", VAR_DIR / "key_pepper")

# The upstream
UPSTREAM_URL = env.url("UPSTREAM_URL", "https://api.openai.com", schemes=("http", "https")).removesuffix("/v1")
UPSTREAM_PROXY = env.url("UPSTREAM_PROXY", schemes=("http", "socks5", "socks5h"))
UPSTREAM_CA_FILE = env.text("UPSTREAM_CA_FILE")
UPSTREAM_TRANSPORT = env.choice("UPSTREAM_TRANSPORT", "own", choices=("own", "httpx"))
CONNECT_TIMEOUT_SECONDS = env.seconds("CONNECT_TIMEOUT_SECONDS", 10)
FIRST_BYTE_TIMEOUT_SECONDS = env.seconds("FIRST_BYTE_TIMEOUT_SECONDS", 600)
SILENCE_TIMEOUT_SECONDS = env.seconds("SILENCE_TIMEOUT_SECONDS", 300)

# What is metered, and how
SPLICE_USAGE = env.flag("SPLICE_USAGE", True)
ON_CLIENT_DISCONNECT = env.choice("ON_CLIENT_DISCONNECT", "cancel", choices=("cancel", "drain"))
DRAIN_TIMEOUT_SECONDS = env.seconds("DRAIN_TIMEOUT_SECONDS", 60)
DRAIN_MAX_BYTES = env.whole("DRAIN_MAX_BYTES", 16 * MIB)

# Bounds of a request
MAX_HEADER_BYTES = env.whole("MAX_HEADER_BYTES", 64 * 1024, least=1024)
MAX_BODY_BYTES = env.whole("MAX_BODY_BYTES", 2048 * MIB, least=1024)
MAX_OPEN_STREAMS = env.whole("MAX_OPEN_STREAMS", 4096, least=1)
SSE_EVENT_MAX_BYTES = env.whole("SSE_EVENT_MAX_BYTES", MIB, least=1024)
WEBSOCKET_MAX_MESSAGE_BYTES = env.whole("WEBSOCKET_MAX_MESSAGE_BYTES", 16 * MIB, least=1024)
WEBSOCKET_PING_SECONDS = env.seconds("WEBSOCKET_PING_SECONDS", 20)
HEADER_TIMEOUT_SECONDS = env.seconds("HEADER_TIMEOUT_SECONDS", 15)
KEEPALIVE_SECONDS = env.seconds("KEEPALIVE_SECONDS", 75)
GRACEFUL_TIMEOUT_SECONDS = env.whole("GRACEFUL_TIMEOUT_SECONDS", 30, least=1)

# The sandbox
SANDBOX_ENABLED = env.flag("SANDBOX_ENABLED", DEBUG)
SANDBOX_KEY = env.text("SANDBOX_KEY", "sk-sandbox")

# Data
DATABASE_URL = env.text("DATABASE_URL")
JOURNAL_DIR = Path(env.text("JOURNAL_DIR", str(VAR_DIR / "journal"))).absolute()
JOURNAL_FLUSH_SECONDS = env.seconds("JOURNAL_FLUSH_SECONDS", 1)
JOURNAL_MAX_BYTES = env.whole("JOURNAL_MAX_BYTES", 1024 * MIB, least=MIB)
REDIS_KEY_PREFIX = env.text("REDIS_KEY_PREFIX", "proxysite")
REDIS_URL = env.url("REDIS_URL", schemes=("redis", "rediss", "unix"))


def _database() -> dict[str, object]:
    if not DATABASE_URL:
        return {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": VAR_DIR / "db.sqlite3",
            "OPTIONS": {
                "timeout": 20,
                "transaction_mode": "IMMEDIATE",
                "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
            },
            # A file, as in production: one in memory locks by other rules.
            "TEST": {"NAME": VAR_DIR / "test-db.sqlite3"},
        }
    try:
        config: dict[str, object] = environ.Env.db_url_config(DATABASE_URL)
    except ValueError:
        # Without the value: it holds a password.
        raise ImproperlyConfigured("DATABASE_URL: not a database address (is the password percent-encoded?).") from None
    if config.get("ENGINE") == "django.db.backends.postgresql":
        # Without a pool each concurrent query of the event loop would open a connection of its own.
        config["OPTIONS"] = {"pool": {"min_size": 0, "max_size": 8, "timeout": 10}}
    return config


DATABASES = {"default": _database()}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

CACHES = {
    "default": {
        "BACKEND": "django_redis.cache.RedisCache",
        "LOCATION": REDIS_URL,
        "KEY_PREFIX": REDIS_KEY_PREFIX,
        "OPTIONS": {"SOCKET_CONNECT_TIMEOUT": 2, "SOCKET_TIMEOUT": 2},
    }
    if REDIS_URL
    else {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}
}

# The ledger
DEFAULT_GRANT_USD = env.amount("DEFAULT_GRANT_USD", "0")
USAGE_WINDOW_DAYS = env.whole("USAGE_WINDOW_DAYS", 90, least=1, most=3660)
USAGE_RETENTION_DAYS = env.whole("USAGE_RETENTION_DAYS", 400, least=max(90, USAGE_WINDOW_DAYS))
BALANCE_SOURCE = env.choice("BALANCE_SOURCE", "ledger", choices=("ledger", "upstream"))
BALANCE_RATE_PER_MINUTE = env.whole("BALANCE_RATE_PER_MINUTE", 60, least=1)
REFRESH_LIST_PRICES = env.flag("REFRESH_LIST_PRICES", False)

# Django
ROOT_URLCONF = "proxysite.urls"
ASGI_APPLICATION = "proxysite.asgi.application"
INSTALLED_APPS = [
    "unfold",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "rest_framework",
    "proxysite",
    "gateway",
    "billing",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "servestatic.middleware.ServeStaticMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.locale.LocaleMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator", "OPTIONS": {"min_length": 12}},
    {"NAME": "django.contrib.auth.password_validation.CommonPasswordValidator"},
    {"NAME": "django.contrib.auth.password_validation.UserAttributeSimilarityValidator"},
]

LANGUAGE_CODE = "zh-hans"
LANGUAGES = [("zh-hans", "简体中文"), ("en", "English")]
LOCALE_PATHS = [BASE_DIR / "locale"]
USE_I18N = True
USE_TZ = True
TIME_ZONE = "UTC"

STATIC_URL = "/static/"
STATIC_ROOT = BASE_DIR / "staticfiles"
STATICFILES_DIRS = [BASE_DIR / "static"]
SERVESTATIC_USE_FINDERS = True

# Security. Without PUBLIC_URL nothing is known of the names under which operators reach the site.
ALLOWED_HOSTS = env.words("ALLOWED_HOSTS") or (
    [str(urlsplit(PUBLIC_URL).hostname), "localhost", "127.0.0.1", "[::1]"] if PUBLIC_URL else ["*"]
)
_IS_PUBLIC_HTTPS = PUBLIC_URL.startswith("https://")
CSRF_TRUSTED_ORIGINS = [PUBLIC_URL] if PUBLIC_URL else []
SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = _IS_PUBLIC_HTTPS
SESSION_COOKIE_HTTPONLY = True
SESSION_COOKIE_AGE = 12 * 3600
SECURE_CONTENT_TYPE_NOSNIFF = True
SECURE_REFERRER_POLICY = "same-origin"
X_FRAME_OPTIONS = "DENY"

UNFOLD = {"SITE_TITLE": "proxysite", "SITE_HEADER": "proxysite"}

REST_FRAMEWORK = {
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
    "DEFAULT_AUTHENTICATION_CLASSES": [],
    "DEFAULT_PERMISSION_CLASSES": [],
    "UNAUTHENTICATED_USER": None,
}

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "{asctime} {levelname} {name}: {message}", "style": "{"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"handlers": ["stderr"], "level": LOG_LEVEL},
    "loggers": {
        # Both would write full query strings, in which callers of /pro put keys.
        "django.request": {"level": "ERROR"},
        "django.server": {"level": "ERROR"},
        "httpx2": {"level": "WARNING"},
        "websockets": {"level": "CRITICAL"},
    },
}
