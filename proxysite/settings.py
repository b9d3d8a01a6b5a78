"""The one place that reads the environment. Each variable stands in the README's table; a test compares."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import environ
from django.core.exceptions import ImproperlyConfigured
from django.templatetags.static import static

from proxysite import env, logs

BASE_DIR = Path(__file__).resolve().parent.parent
MIB = 1024 * 1024

# Where it runs
DEBUG = env.flag("DEBUG", False)
HOST = env.host("HOST", "127.0.0.1")
PORT = env.whole("PORT", 8000, least=1, most=65535)
WORKERS = env.whole("WORKERS", 1, least=1, most=256)
VAR_DIR = Path(env.text("VAR_DIR", str(BASE_DIR / "var"))).absolute()
PUBLIC_URL = env.url("PUBLIC_URL", schemes=("http", "https"), is_base=True)
TRUSTED_PROXIES = env.proxies("TRUSTED_PROXIES", ("127.0.0.1", "::1"))

# What is seen of it
LOG_LEVEL = env.choice("LOG_LEVEL", "INFO", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
LOG_FORMAT = env.choice("LOG_FORMAT", "line", choices=("line", "json"))
ACCESS_LOG = env.flag("ACCESS_LOG", False)
METRICS_TOKEN = env.text("METRICS_TOKEN")
METRICS_NETWORKS = env.networks("METRICS_NETWORKS")
METRICS_DIR = VAR_DIR / "metrics"
OTEL_ENABLED = env.flag("OTEL_ENABLED", False)
if OTEL_ENABLED:
    # Where to, under which name, how many: OpenTelemetry's own variables, which its SDK reads.
    env.require("OTEL_ENABLED", packages="requirements-otel.txt", module="opentelemetry.exporter.otlp.proto.http")

try:
    VAR_DIR.mkdir(mode=0o700, parents=True, exist_ok=True)
except OSError as exc:
    raise ImproperlyConfigured(f"VAR_DIR: {VAR_DIR} cannot be made ({exc.strerror}).") from exc

SECRET_KEY = env.secret("SECRET_KEY", VAR_DIR / "secret_key")
KEY_PEPPER = env.secret("KEY_PEPPER", VAR_DIR / "key_pepper")

# The upstream
UPSTREAM_URL = env.url("UPSTREAM_URL", "https://api.openai.com", schemes=("http", "https"), is_base=True)
UPSTREAM_URL = UPSTREAM_URL.removesuffix("/v1")
UPSTREAM_PROXY = env.url("UPSTREAM_PROXY", schemes=("http", "socks5", "socks5h"))
UPSTREAM_CA_FILE = env.certificates("UPSTREAM_CA_FILE")
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
MAX_INTERIM_RESPONSES = env.whole("MAX_INTERIM_RESPONSES", 64, least=0)
SSE_EVENT_MAX_BYTES = env.whole("SSE_EVENT_MAX_BYTES", MIB, least=1024)
WEBSOCKET_MAX_MESSAGE_BYTES = env.whole("WEBSOCKET_MAX_MESSAGE_BYTES", 16 * MIB, least=1024)
WEBSOCKET_PING_SECONDS = env.seconds("WEBSOCKET_PING_SECONDS", 20)
HEADER_TIMEOUT_SECONDS = env.seconds("HEADER_TIMEOUT_SECONDS", 15)
KEEPALIVE_SECONDS = env.seconds("KEEPALIVE_SECONDS", 75)
GRACEFUL_TIMEOUT_SECONDS = env.whole("GRACEFUL_TIMEOUT_SECONDS", 30, least=1)

# Who may do how much. 0, or nothing, is no limit; keys may have limits of their own in the admin.
GATEWAY_MODE = env.choice("GATEWAY_MODE", "open", choices=("open", "known"))
KEY_REQUESTS_PER_MINUTE = env.whole("KEY_REQUESTS_PER_MINUTE", 0, most=1_000_000)
KEY_TOKENS_PER_MINUTE = env.whole("KEY_TOKENS_PER_MINUTE", 0, most=10**10)
KEY_CONCURRENT_STREAMS = env.whole("KEY_CONCURRENT_STREAMS", 0, most=1_000_000)
KEY_MONTHLY_USD = env.amount("KEY_MONTHLY_USD", "0")
ADDRESS_REQUESTS_PER_MINUTE = env.whole("ADDRESS_REQUESTS_PER_MINUTE", 0, most=1_000_000)
ADDRESS_TOKENS_PER_MINUTE = env.whole("ADDRESS_TOKENS_PER_MINUTE", 0, most=10**10)
ADDRESS_CONCURRENT_STREAMS = env.whole("ADDRESS_CONCURRENT_STREAMS", 0, most=1_000_000)
ADDRESS_MONTHLY_USD = env.amount("ADDRESS_MONTHLY_USD", "0")
ALLOWED_MODELS = [name for name in env.words("ALLOWED_MODELS") if name != "*"]
ALLOWED_NETWORKS = env.networks("ALLOWED_NETWORKS")
LIMITS_TIMEOUT_SECONDS = env.seconds("LIMITS_TIMEOUT_SECONDS", 0.05)
ON_LIMITS_UNAVAILABLE = env.choice("ON_LIMITS_UNAVAILABLE", "allow", choices=("allow", "refuse"))
CUT_AT_SPEND_LIMIT = env.flag("CUT_AT_SPEND_LIMIT", True)
RESERVE_OUTPUT_TOKENS = env.whole("RESERVE_OUTPUT_TOKENS", 16_384, least=1, most=10_000_000)
RESERVE_REASONING_TOKENS = env.whole("RESERVE_REASONING_TOKENS", 128_000, most=10_000_000)
RESERVE_REFERENCE_TOKENS = env.whole("RESERVE_REFERENCE_TOKENS", 50_000, most=10_000_000)

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


def _sqlite(path: Path | str) -> dict[str, Any]:
    return {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": path,
        "OPTIONS": {
            "timeout": 20,
            "transaction_mode": "IMMEDIATE",
            "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
        },
        # A file, as in production: one in memory locks by other rules.
        "TEST": {"NAME": VAR_DIR / "test-db.sqlite3"},
    }


# A server's machine that is gone says nothing: without these a query waits for it for a quarter of an hour.
_DEAD_LINES = {
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,  # milliseconds
}


def _database() -> dict[str, Any]:
    if not DATABASE_URL:
        return _sqlite(VAR_DIR / "db.sqlite3")
    scheme = DATABASE_URL.partition(":")[0]
    if scheme not in ("postgres", "postgresql", "psql", "pgsql", "sqlite"):
        raise ImproperlyConfigured("DATABASE_URL: neither PostgreSQL (postgres://…) nor SQLite (sqlite:////path).")
    try:
        config: dict[str, Any] = environ.Env.db_url_config(DATABASE_URL)
    except ValueError:
        # Without the value: it holds a password.
        raise ImproperlyConfigured("DATABASE_URL: not a database address (is the password percent-encoded?).") from None
    name = str(config.get("NAME") or "")
    if name in ("", ":memory:"):
        raise ImproperlyConfigured("DATABASE_URL: it names no database that several processes can share.")
    if scheme == "sqlite":
        return _sqlite(name)
    # Without a pool each concurrent query of the event loop would open a connection of its own. A server that is away
    # is asked again by whoever needs it next: psycopg's own attempts come more and more seldom for 5 minutes, also
    # once it is back.
    pool = {"min_size": 0, "max_size": 8, "timeout": 3, "reconnect_timeout": 2}
    config["OPTIONS"] = _DEAD_LINES | config.get("OPTIONS", {}) | {"pool": pool}
    # Nobody is given a connection that a restart of the server has broken.
    config["CONN_HEALTH_CHECKS"] = True
    return config


DATABASES = {"default": _database()}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"


def _cache(timeout_s: float) -> dict[str, Any]:
    if not REDIS_URL:
        return {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}
    # In the address: django-redis keeps one pool of connections for each, whatever else the caches say.
    mark = "&" if "?" in REDIS_URL else "?"
    timeouts = f"{mark}socket_timeout={timeout_s}&socket_connect_timeout={timeout_s}"
    return {
        "BACKEND": "django_redis.cache.RedisCache",
        "LOCATION": REDIS_URL + timeouts,
        "KEY_PREFIX": REDIS_KEY_PREFIX,
    }


# `rates` is asked before each question about a balance, which must not wait for it.
CACHES = {"default": _cache(2), "rates": _cache(0.1)}

# The ledger
DEFAULT_GRANT_USD = env.amount("DEFAULT_GRANT_USD", "0")
USAGE_WINDOW_DAYS = env.whole("USAGE_WINDOW_DAYS", 90, least=1, most=3660)
USAGE_RETENTION_DAYS = env.whole("USAGE_RETENTION_DAYS", 400, least=max(90, USAGE_WINDOW_DAYS))
BALANCE_SOURCE = env.choice("BALANCE_SOURCE", "ledger", choices=("ledger", "upstream"))
BALANCE_RATE_PER_MINUTE = env.whole("BALANCE_RATE_PER_MINUTE", 60, least=1)
REFRESH_LIST_PRICES = env.flag("REFRESH_LIST_PRICES", False)
LIST_PRICES_URL = env.url("LIST_PRICES_URL", schemes=("http", "https"))

# Conversations
SESSIONS_MODEL = env.text("SESSIONS_MODEL", "gpt-3.5-turbo")
SESSION_TTL_SECONDS = env.seconds("SESSION_TTL_SECONDS", 1800)
SESSION_CONTENT_MAX_CHARS = env.whole("SESSION_CONTENT_MAX_CHARS", 1000, least=1, most=1_000_000)
SESSION_CONTEXT_TOKENS = env.whole("SESSION_CONTEXT_TOKENS", 3000)
SESSION_CONTEXT_MESSAGES = env.whole("SESSION_CONTEXT_MESSAGES", 40, most=10_000)
SESSION_SYSTEM_PROMPT = env.text("SESSION_SYSTEM_PROMPT")
SESSION_WAIT_SECONDS = env.seconds("SESSION_WAIT_SECONDS", 10)
SESSION_LEASE_SECONDS = env.seconds("SESSION_LEASE_SECONDS", 30)
SESSION_SEALED = env.flag("SESSION_SEALED", False)
SESSION_KEYS = env.secrets_in("SESSION_KEYS", env.secret("SESSION_KEYS", VAR_DIR / "session_keys"))
SESSION_MAX_MESSAGES = env.whole("SESSION_MAX_MESSAGES", 1000, least=2, most=10_000)
SESSION_KEY_MAX_SESSIONS = env.whole("SESSION_KEY_MAX_SESSIONS", 1000, least=1)
SESSION_KEY_MAX_MESSAGES = env.whole("SESSION_KEY_MAX_MESSAGES", 20_000, least=2)
SESSION_KEY_MAX_BYTES = env.whole("SESSION_KEY_MAX_BYTES", 64 * MIB, least=1024)
SESSION_ALL_MAX_SESSIONS = env.whole("SESSION_ALL_MAX_SESSIONS", 500_000, least=1)
SESSION_ALL_MAX_MESSAGES = env.whole("SESSION_ALL_MAX_MESSAGES", 10_000_000, least=2)
SESSION_ALL_MAX_BYTES = env.whole("SESSION_ALL_MAX_BYTES", 4096 * MIB, least=1024)

# Periodic work. Without a broker server its messages are files, and the master of `manage.py serve` runs it.
_EMBEDDED_BROKER = "filesystem://localhost"
CELERY_BROKER_URL = env.url("CELERY_BROKER_URL", schemes=("redis", "rediss", "amqp", "amqps")) or _EMBEDDED_BROKER
CELERY_EMBEDDED = env.flag("CELERY_EMBEDDED", CELERY_BROKER_URL == _EMBEDDED_BROKER)
HEARTBEAT_SECONDS = env.whole("HEARTBEAT_SECONDS", 60, least=1)
SESSION_PURGE_SECONDS = env.whole("SESSION_PURGE_SECONDS", 60, least=1)
CELERY_DIR = VAR_DIR / "celery"
CELERY_BROKER_TRANSPORT_OPTIONS: dict[str, str] = {}
if CELERY_BROKER_URL == _EMBEDDED_BROKER:
    CELERY_BROKER_TRANSPORT_OPTIONS = {
        "data_folder_in": str(CELERY_DIR / "messages"),
        "data_folder_out": str(CELERY_DIR / "messages"),
        "control_folder": str(CELERY_DIR / "control"),
    }
elif CELERY_BROKER_URL.startswith("redis"):
    CELERY_BROKER_TRANSPORT_OPTIONS = {"global_keyprefix": f"{REDIS_KEY_PREFIX}:celery:"}
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
# Between processes on files, control messages and events would pile up with every start.
CELERY_WORKER_ENABLE_REMOTE_CONTROL = CELERY_BROKER_URL != _EMBEDDED_BROKER
CELERY_TASK_DEFAULT_QUEUE = REDIS_KEY_PREFIX
CELERY_TASK_IGNORE_RESULT = True
CELERY_RESULT_EXPIRES = None
CELERY_ACCEPT_CONTENT = ["json"]
CELERY_TASK_SERIALIZER = CELERY_RESULT_SERIALIZER = "json"
CELERY_TASK_SOFT_TIME_LIMIT = 840
CELERY_TASK_TIME_LIMIT = 900
CELERY_WORKER_PREFETCH_MULTIPLIER = 1
CELERY_WORKER_HIJACK_ROOT_LOGGER = False
CELERY_WORKER_REDIRECT_STDOUTS = False
CELERY_BEAT_SCHEDULER = "proxysite.scheduler:Scheduler"
CELERY_BEAT_SYNC_EVERY = 1
CELERY_TIMEZONE = "UTC"

# Bodies stay in memory, up to what the front door lets in: a conversation that is imported shall touch no disk.
FILE_UPLOAD_MAX_MEMORY_SIZE = 8 * MIB

# Django
ROOT_URLCONF = "proxysite.urls"
ASGI_APPLICATION = "proxysite.asgi.application"
INSTALLED_APPS = [
    "unfold.apps.BasicAppConfig",
    "unfold.contrib.filters",
    "proxysite.admin_app.OperatorAdminConfig",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "proxysite.admin_app.LoginsConfig",
    "django_otp",
    "django_otp.plugins.otp_totp",
    "django_otp.plugins.otp_static",
    "proxysite",
    "gateway",
    "billing",
    "sessions_api",
    # Behind ours, whose translations go before its own.
    "rest_framework",
    "django_celery_beat",
    "drf_spectacular",
    "drf_spectacular_sidecar",
]
MIDDLEWARE = [
    "proxysite.connections.ReleasedConnectionMiddleware",
    "django.middleware.security.SecurityMiddleware",
    "proxysite.security.PermissionsPolicyMiddleware",
    "proxysite.csp.PolicyMiddleware",
    "servestatic.middleware.ServeStaticMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.locale.LocaleMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django_otp.middleware.OTPMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "axes.middleware.AxesMiddleware",
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

LOGIN_REDIRECT_URL = "admin:index"

LANGUAGE_CODE = "zh-hans"
LANGUAGES = [("zh-hans", "简体中文"), ("en", "English")]
LOCALE_PATHS = [BASE_DIR / "locale"]
FORMAT_MODULE_PATH = ["proxysite.formats"]
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
CSRF_FAILURE_VIEW = "proxysite.pages.forbidden"
CSRF_TRUSTED_ORIGINS = [PUBLIC_URL] if PUBLIC_URL else []
SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = _IS_PUBLIC_HTTPS
SESSION_COOKIE_HTTPONLY = True
SESSION_COOKIE_AGE = 12 * 3600
SECURE_CONTENT_TYPE_NOSNIFF = True
SECURE_REFERRER_POLICY = "same-origin"
SECURE_CROSS_ORIGIN_OPENER_POLICY = "same-origin"
SECURE_HSTS_SECONDS = 365 * 24 * 3600 if _IS_PUBLIC_HTTPS else 0
X_FRAME_OPTIONS = "DENY"
# Public pages: nothing inline, nothing from elsewhere, no form that goes anywhere.
CONTENT_SECURITY_POLICY = {
    "DIRECTIVES": {
        "default-src": ["'none'"],
        "script-src": ["'self'"],
        "style-src": ["'self'"],
        "img-src": ["'self'"],
        "connect-src": ["'self'"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
        "frame-ancestors": ["'none'"],
    }
}
# Where that cannot be: whole policies, by the beginning of the path.
CONTENT_SECURITY_POLICY_BELOW = {
    # unfold's Alpine evaluates expressions and its templates carry styles.
    "/admin/": {
        **CONTENT_SECURITY_POLICY["DIRECTIVES"],
        "script-src": ["'self'", "'unsafe-eval'"],
        "style-src": ["'self'", "'unsafe-inline'"],
        "img-src": ["'self'", "data:"],
        "font-src": ["'self'"],
        "form-action": ["'self'"],
    },
    # Swagger UI: its style sheet holds pictures.
    "/docs/api/": {**CONTENT_SECURITY_POLICY["DIRECTIVES"], "img-src": ["'self'", "data:"]},
}

# Logging in. After LOGIN_FAILURE_LIMIT failures of a name from an address, both together wait.
AUTHENTICATION_BACKENDS = ["axes.backends.AxesStandaloneBackend", "django.contrib.auth.backends.ModelBackend"]
AXES_FAILURE_LIMIT = env.whole("LOGIN_FAILURE_LIMIT", 5, least=1, most=1000)
AXES_COOLOFF_TIME = dt.timedelta(seconds=env.seconds("LOGIN_LOCK_SECONDS", 900))
AXES_LOCKOUT_PARAMETERS = [["username", "ip_address"]]
AXES_CLIENT_IP_CALLABLE = "proxysite.logins.client_address"
AXES_LOCKOUT_CALLABLE = "proxysite.logins.locked_out"
AXES_RESET_ON_SUCCESS = True
AXES_RESET_COOL_OFF_ON_FAILURE_DURING_LOCKOUT = False
AXES_ENABLE_ACCESS_FAILURE_LOG = True
AXES_ENABLE_ADMIN = False
AXES_SENSITIVE_PARAMETERS = ["username", "ip_address", "second_factor"]
AXES_VERBOSE = False
# One step of 30 s early or late is let pass, as RFC 6238 §5.2 advises; who was late once is not expected late for good.
OTP_TOTP_SYNC = False
OTP_TOTP_ISSUER = str(urlsplit(PUBLIC_URL).hostname) if PUBLIC_URL else "proxysite"

UNFOLD = {
    "SITE_TITLE": "proxysite",
    "SITE_HEADER": "proxysite",
    "SITE_SYMBOL": "swap_horiz",
    "SITE_FAVICONS": [{"rel": "icon", "type": "image/svg+xml", "href": lambda request: static("operator/icon.svg")}],
    "STYLES": [lambda request: static("operator/admin.css")],
    "SHOW_LANGUAGES": True,
    "SHOW_VIEW_ON_SITE": False,
    "ACCOUNT": {"navigation": "proxysite.navigation.account_links"},
    "SIDEBAR": {"show_search": True, "navigation": "proxysite.navigation.sidebar"},
    "COLORS": {
        "primary": {
            "50": "oklch(98.4% .014 180.7)",
            "100": "oklch(95.3% .051 180.8)",
            "200": "oklch(91% .096 180.4)",
            "300": "oklch(85.5% .138 181.1)",
            "400": "oklch(77.7% .152 181.9)",
            "500": "oklch(70.4% .14 182.5)",
            "600": "oklch(51.1% .096 186.4)",
            "700": "oklch(43.7% .078 188.2)",
            "800": "oklch(38.6% .063 188.4)",
            "900": "oklch(27.7% .046 192.5)",
            "950": "oklch(22% .035 195)",
        }
    },
}

REST_FRAMEWORK = {
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
    "DEFAULT_AUTHENTICATION_CLASSES": [],
    "DEFAULT_PERMISSION_CLASSES": [],
    "UNAUTHENTICATED_USER": None,
    "DEFAULT_SCHEMA_CLASS": "drf_spectacular.openapi.AutoSchema",
    "LIST_SERIALIZER_ERRORS_AS_DICT": True,
}
SPECTACULAR_SETTINGS = {
    "TITLE": "proxysite",
    "VERSION": "1.0.0",
    "OAS_VERSION": "3.1.0",
    "CAMELIZE_NAMES": True,
    "ENUM_GENERATE_CHOICE_DESCRIPTION": False,
    # Docstrings are for whoever reads the code.
    "DISABLE_DOCSTRING_DESCRIPTIONS": True,
    "APPEND_COMPONENTS": {"securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}},
    "SECURITY": [{"bearer": []}],
    "POSTPROCESSING_HOOKS": ["sessions_api.described.add_described_routes"],
}

LOGGING = logs.configuration(form=LOG_FORMAT, level=LOG_LEVEL, logs_access=ACCESS_LOG)
