"""What docker-compose.yml says of each service, as far as processes without containers need to know it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|\{(?P<name>\w+)(?::(?P<kind>[-?])(?P<rest>[^}]*))?\})")
_DURATION = re.compile(r"(?:(?P<m>\d+)m)?(?:(?P<s>\d+)s)?\Z")


class ComposeError(Exception):
    """The file says something that this reader does not understand."""


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """One service; `health` is the health check's command, empty where there is none."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str]
    health: tuple[str, ...]
    replicas: int
    after: frozenset[str]
    is_one_shot: bool
    is_ours: bool
    stop_signal: str
    stop_grace_s: float


def read_compose(path: Path, variables: Mapping[str, str]) -> dict[str, ServiceSpec]:
    """Return the services by name, in the file's order, with `variables` in place of `${…}`."""
    services = _filled(yaml.safe_load(path.read_text(encoding="utf-8"))["services"], variables)
    return {name: _spec(name, service) for name, service in services.items()}


def in_order(specs: Mapping[str, ServiceSpec]) -> list[list[ServiceSpec]]:
    """Return the services in groups that may start together: each waits for groups before it only."""
    groups: list[list[ServiceSpec]] = []
    started: set[str] = set()
    while len(started) < len(specs):
        group = [spec for spec in specs.values() if spec.name not in started and spec.after <= started]
        if not group:
            raise ComposeError(f"these services wait for each other: {sorted(set(specs) - started)}")
        groups.append(group)
        started |= {spec.name for spec in group}
    return groups


def _spec(name: str, service: dict[str, Any]) -> ServiceSpec:
    command = service["command"]
    if not isinstance(command, list):
        raise ComposeError(f"{name}: a command is a list here; no shell is meant to read it.")
    return ServiceSpec(
        name=name,
        command=tuple(command),
        environment={key: str(value) for key, value in service.get("environment", {}).items()},
        health=_health(name, service.get("healthcheck", {"disable": True})),
        replicas=int(service.get("deploy", {}).get("replicas", 1)),
        after=frozenset(service.get("depends_on", {})),
        is_one_shot=service["restart"] == "no",
        is_ours="build" in service,
        stop_signal=service.get("stop_signal", "SIGTERM"),
        stop_grace_s=seconds(service.get("stop_grace_period", "10s")),
    )


def _health(name: str, check: dict[str, Any]) -> tuple[str, ...]:
    if check.get("disable"):
        return ()
    kind, *command = check["test"]
    if kind != "CMD":
        raise ComposeError(f"{name}: a health check is a CMD here; no shell is meant to read it.")
    return tuple(command)


def seconds(duration: str) -> float:
    """Return a duration such as `90s` or `1m30s` in seconds."""
    found = _DURATION.match(duration)
    if not found or not duration:
        raise ComposeError(f"{duration!r} is no duration")
    return 60.0 * int(found["m"] or 0) + int(found["s"] or 0)


def _filled(value: Any, variables: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(part, variables) for key, part in value.items()}
    if isinstance(value, list):
        return [_filled(part, variables) for part in value]
    if isinstance(value, str):
        return _VARIABLE.sub(lambda found: _value_of(found, variables), value)
    return value


def _value_of(found: re.Match[str], variables: Mapping[str, str]) -> str:
    if found["dollar"]:
        return "$"
    value = variables.get(found["name"], "")
    if not value and found["kind"] == "?":
        raise ComposeError(f"{found['name']}: {found['rest']}")
    return value or found["rest"] or ""
