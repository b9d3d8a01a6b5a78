"""What stands in the ledger, to be compared; and what the sample of `samples.event` costs."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from billing.models import KeyDay, UsageDay, UsageHour

# gpt-4o-mini: 0.15, cached 0.075, output 0.60 USD per million: 1000, 200 and 500 tokens of them.
SAMPLE_COST = Decimal("0.0004650")


def day_rows() -> list[tuple[Any, ...]]:
    """Return all roll-ups: those by day, by key and by hour."""
    found = []
    for model in (UsageDay, KeyDay, UsageHour):
        names = [field.attname for field in model._meta.concrete_fields if field.attname != "id"]
        found += sorted(model._default_manager.values_list(*names), key=repr)
    return found
