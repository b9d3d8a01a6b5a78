"""The dashboard and the alert rules ask for nothing that /metrics does not say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families as parse

from gateway.tests.fake_upstream import FakeUpstream
from gateway.tests.live import ROOT, LiveProxy

DASHBOARD = json.loads((ROOT / "deploy/grafana/proxysite.json").read_text())
ALERTS = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
# What Prometheus adds to each target.
_TARGET_LABELS = {"instance", "job", "le"}
_SELECTED = re.compile(r"(proxysite_[a-z_]+)\s*(?:\{([^}]*)\})?")


def panels() -> Iterator[dict[str, object]]:
    for panel in DASHBOARD["panels"]:
        yield panel
        yield from panel.get("panels", [])


PANELS = [panel for panel in panels() if panel["type"] != "row"]
DASHBOARD_EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]  # type: ignore[attr-defined]
EXPRESSIONS = DASHBOARD_EXPRESSIONS + [rule["expr"] for rule in RULES]


@pytest.fixture(scope="module")
def metrics() -> dict[str, set[str]]:
    """The labels of each series that a proxy exports once every kind of thing has happened."""
    with FakeUpstream() as upstream, LiveProxy(UPSTREAM_URL=upstream.url) as proxy:
        proxy.get("/v1/models")
        proxy.get("/v1/%2e%2e/x")
        text = proxy.get("/metrics").text
    labels: dict[str, set[str]] = {}
    for family in parse(text):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


def test_every_series_and_label_that_is_asked_for_exists(metrics: dict[str, set[str]]) -> None:
    asked = 0
    for expression in EXPRESSIONS:
        selected = _SELECTED.findall(expression)
        assert selected, expression
        known = set(_TARGET_LABELS)
        for name, matchers in selected:
            assert name in metrics, expression
            known |= metrics[name]
            names = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
            assert names <= metrics[name] | _TARGET_LABELS, expression
            asked += 1
        grouped = re.findall(r"\bby\s*\(([^)]*)\)", expression)
        assert {label.strip() for group in grouped for label in group.split(",")} <= known, expression
    assert asked > 40


def test_every_series_is_shown_or_watched(metrics: dict[str, set[str]]) -> None:
    asked = {name for expression in EXPRESSIONS for name, _ in _SELECTED.findall(expression)}
    families = {re.sub(r"_(?:bucket|count|sum)$", "", name) for name in metrics if "histogram" not in name}
    assert families <= {re.sub(r"_bucket$", "", name) for name in asked}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions_are_balanced(expression: str) -> None:
    for opening, closing in ("()", "{}", "[]"):
        assert expression.count(opening) == expression.count(closing)
    counters = re.findall(r"(\S*)\(?(proxysite_\w+_(?:total|bucket))[^\[(]*(\[)?", expression)
    assert all(bracket for _, _, bracket in counters), expression  # a counter only by its rate


def test_every_alert_says_what_to_do() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES) > 5
    for rule in RULES:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"].keys() == {"summary", "action"}


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    ids = [panel["id"] for panel in panels()]
    assert len(set(ids)) == len(ids)
    for panel in panels():
        place: dict[str, int] = panel["gridPos"]  # type: ignore[assignment]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells
