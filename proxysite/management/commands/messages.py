"""`manage.py messages`: compile the translations, on machines without gettext too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polib
from django.conf import settings
from django.core.management.base import BaseCommand

_APPS = ("proxysite", "gateway", "sessions_api", "billing", ".")


class Command(BaseCommand):
    help = "Compile every locale/*/LC_MESSAGES/*.po of the project into the .mo beside it (needs requirements-dev.txt)."

    def handle(self, *args: Any, **options: Any) -> None:
        for source in catalogs():
            source.with_suffix(".mo").write_bytes(compiled(source))
            self.stdout.write(str(source.relative_to(settings.BASE_DIR)))


def catalogs() -> list[Path]:
    """Return the project's .po files."""
    return sorted(path for app in _APPS for path in (settings.BASE_DIR / app).glob("locale/*/LC_MESSAGES/*.po"))


def compiled(source: Path) -> bytes:
    """Return a .po file as .mo: the same bytes for the same file."""
    content: bytes = polib.pofile(str(source)).to_binary()
    return content
