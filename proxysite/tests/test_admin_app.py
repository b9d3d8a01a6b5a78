from __future__ import annotations

import os
import subprocess
import sys

from gateway.tests.live import ROOT

LOADED = """
import sys, django
from django.core import checks
django.setup()
print("billing.admin" in sys.modules)
checks.run_checks(tags=["admin"])
print("billing.admin" in sys.modules)
"""


def test_pages_of_the_admin_are_loaded_where_they_are_served_or_checked() -> None:
    environment = os.environ | {"DJANGO_SETTINGS_MODULE": "proxysite.settings"}
    done = subprocess.run([sys.executable, "-c", LOADED], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"], done.stderr
