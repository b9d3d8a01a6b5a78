"""The routes that tell a key what it has used, and the use of API_KEY."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

from django.conf import settings as project
from django.utils import timezone

from billing import keys
from billing.events import Usage
from billing.tests.samples import API_KEY, event

DAY = dt.timedelta(days=1)
BEARER = {"Authorization": f"Bearer {API_KEY}"}
DASHBOARD = [
    f"{prefix}/dashboard/billing/{name}"
    for prefix in ("", "/v1")
    for name in ("subscription", "usage", "credit_grants")
]
ROUTES = ["/pro/balance", "/pro/usage", *DASHBOARD]


def used(**given: Any) -> Any:
    """Return an event of API_KEY today that cost 8 US cents: 800,000 tokens of input and cached input."""
    fingerprint = keys.fingerprint(API_KEY.encode(), pepper=project.KEY_PEPPER.encode())
    usage = Usage(input_tokens=500_000, cached_input_tokens=66_667)
    return event(**{"at": timezone.now(), "key_fingerprint": fingerprint, "usage": usage} | given)


def body_of(response: Any) -> Any:
    return json.loads(response.content)
