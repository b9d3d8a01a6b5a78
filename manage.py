#!/usr/bin/env python
"""Run one of the project's commands: `python manage.py help` lists them."""

import gc
import os
import sys


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "proxysite.settings")
    # Most of what a command makes are imports, which are no garbage: not to be looked through again and again for any.
    gc.set_threshold(100_000, 20, 20)
    from django.core.exceptions import ImproperlyConfigured
    from django.core.management import execute_from_command_line

    try:
        execute_from_command_line(sys.argv)
    except ImproperlyConfigured as exc:
        if "--traceback" in sys.argv:
            raise
        sys.exit(f"manage.py: {exc}")  # what is wrong with a setting; where that was found helps nobody


if __name__ == "__main__":
    main()
