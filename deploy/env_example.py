"""`python -m deploy.env_example` writes .env.example anew, from the table of settings in the README."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / ".env.example"
_ROW = re.compile(r"^\| `(?P<name>[A-Z_]+)` \|(?P<default>[^|]*)\|(?P<meaning>[^|]*)\|$", re.M)
_LITERAL = re.compile(r"`([^`]*)`\Z")
_HEAD = """\
# Settings of docker-compose.yml: copy this file to .env, and remove the # before what you change.
# Made from the README's table by `python -m deploy.env_example`. An empty value means the default.
#
# In containers, docker-compose.yml itself sets HOST, PORT, VAR_DIR, JOURNAL_DIR, REDIS_URL, CELERY_BROKER_URL,
# TRUSTED_PROXIES, GRACEFUL_TIMEOUT_SECONDS and MAX_INTERIM_RESPONSES, and PUBLIC_URL is https://localhost unless set.
# Secrets are files that `sh deploy/make-secrets.sh` makes; a value given here comes before the file: DATABASE_URL, for
# instance, for a database elsewhere.

# the image's name, the ports that nginx is reached at, and how many gateways there are
#PROXYSITE_IMAGE=proxysite:local
#HTTP_PORT=80
#HTTPS_PORT=443
#GATEWAYS=2
"""


def rendered(readme: str) -> str:
    """Return the example that fits a README, with a line `#NAME=default` for each row of its table."""
    return _HEAD + "".join(_entry(row) for row in _ROW.finditer(readme))


def _entry(row: re.Match[str]) -> str:
    default, meaning = row["default"].strip(), row["meaning"].strip().replace("`", "")
    literal = _LITERAL.match(default)
    explained = f" (default: {default.replace('`', '')})" if default and not literal else ""
    return f"\n# {meaning}{explained}\n#{row['name']}={literal[1] if literal else ''}\n"


if __name__ == "__main__":
    EXAMPLE.write_text(rendered((ROOT / "README.md").read_text(encoding="utf-8")), encoding="utf-8")
