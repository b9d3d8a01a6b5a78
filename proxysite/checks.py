"""Rules between settings: no command runs against an error among them, and `manage.py serve` says the warnings."""

from __future__ import annotations

import re
from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Error, Tags, Warning, register

from proxysite import limiting

_SETTINGS = "settings"
# What an operator can have set wrongly. The others look for mistakes in code, and load all of the admin to do so.
OF_SETTINGS = (_SETTINGS, Tags.caches, Tags.compatibility, Tags.security, Tags.translation)
_CURE = "Set REDIS_URL, or WORKERS=1."
# Of an upstream's address: `settings` has already taken off the /v1 of a base URL as clients have it.
_ROUTE = re.compile(r"/v1(/(chat/completions|completions|responses|embeddings|models))?$", re.IGNORECASE)


@register(_SETTINGS)
def workers_count_together(app_configs: Any, **kwargs: Any) -> list[CheckMessage]:
    """What is counted in a process's memory holds for one process."""
    if settings.WORKERS == 1 or settings.REDIS_URL:
        return []
    if trouble := limiting.uncountable_settings():
        return [Error(trouble, hint=_CURE, id="gateway.E001")]
    said = f"{settings.WORKERS} workers without Redis: each counts for itself what BALANCE_RATE_PER_MINUTE allows"
    return [Warning(said, hint=_CURE, id="billing.W001")]


@register(_SETTINGS)
def upstream_is_a_base(app_configs: Any, **kwargs: Any) -> list[CheckMessage]:
    """Routes are put behind the upstream's address, from /v1 on."""
    route = _ROUTE.search(settings.UPSTREAM_URL)
    if route is None:
        return []
    base = settings.UPSTREAM_URL[: route.start()]
    said = f"UPSTREAM_URL ends in {route[0]}: requests would go to {settings.UPSTREAM_URL}/v1/…"
    return [Warning(said, hint=f"Set UPSTREAM_URL={base}", id="gateway.W001")]
