"""`manage.py doctor [--url …]`: what is wrong, and what to do about it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser

from gateway.transport import tls_context
from proxysite.doctor.address import Visit, address_checks
from proxysite.doctor.findings import Check, Finding, as_json, as_text, exit_code, findings_of
from proxysite.doctor.instance import instance_checks
from proxysite.doctor.upstream import upstream_checks


class Command(BaseCommand):
    help = (
        "Look at this instance, its upstream and, with --url, at the way that clients come. "
        "Exits with 0 if all is well, 1 if there are warnings, 2 if there are errors."
    )
    requires_system_checks = []  # they are among the findings

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--url", help="the public address: also stream, upload and open a WebSocket through it")
        parser.add_argument("--key", help="API key to do so with; - reads it from stdin (default: the sandbox's)")
        parser.add_argument("--model", default="gpt-4o-mini", help="model to stream with, where --key is given")
        parser.add_argument("--ca-file", help="certificates to trust at --url beside the system's, PEM")
        parser.add_argument("--json", action="store_true", help="print one JSON object")

    def handle(self, *args: Any, **options: Any) -> None:
        checks = instance_checks() + upstream_checks()
        if options["url"]:
            checks += _address_checks(options)
        findings = []
        for found in findings_of(checks):
            findings.append(found)
            if not options["json"]:
                self.stdout.write(as_text(found))
                self.stdout.flush()
        if options["json"]:
            self.stdout.write(as_json(findings))
        if code := exit_code(findings):
            sys.exit(code)


def _address_checks(options: dict[str, Any]) -> list[tuple[str, Check]]:
    url = str(options["url"]).rstrip("/").removesuffix("/v1")
    if not url.startswith(("http://", "https://")):
        raise CommandError("--url is an address such as https://api.example.com")
    key = sys.stdin.readline().strip() if options["key"] == "-" else options["key"]
    if not key and not settings.SANDBOX_ENABLED:
        return [("address", _needs_key)]
    try:
        context = tls_context(extra_ca_file=options["ca_file"])
    except OSError as exc:
        raise CommandError(f"--ca-file: {options['ca_file']} cannot be used ({exc}).") from exc
    return address_checks(
        Visit(
            url=url,
            key=key or settings.SANDBOX_KEY,
            is_sandbox=not key or key == settings.SANDBOX_KEY,
            model=options["model"],
            context=context,
            own_address=(settings.HOST, settings.PORT),
        )
    )


def _needs_key() -> Iterator[Finding]:
    cure = "Give --key, or run with SANDBOX_ENABLED=true."
    yield Finding("address", "error", "the sandbox is off, so a key is needed to stream", cure)
