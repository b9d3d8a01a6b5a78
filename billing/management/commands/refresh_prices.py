"""`manage.py refresh_prices`: fetch list prices now."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError

from billing.services import RefreshError, refresh_prices


class Command(BaseCommand):
    help = "Fetch the newest list prices from LIST_PRICES_URL; those that have changed count from now on."

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            changed = refresh_prices()
        except RefreshError as exc:
            raise CommandError(f"List prices were not refreshed: {exc}") from exc
        self.stdout.write(f"{changed:,} list prices have changed.")
