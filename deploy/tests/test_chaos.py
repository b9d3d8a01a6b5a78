"""A short version of `python -m bench.chaos`, with what it must find when something does break."""

from __future__ import annotations

import pytest

from bench import chaos
from bench.clock import can_shift
from deploy import programs
from deploy.tests.conftest import require_programs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_what_breaks_harms_nothing_else_and_recovers_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    require_programs()
    # On a busy machine the processes that are started anew take their time.
    monkeypatch.setattr(chaos, "RECOVERED_WITHIN_S", 120.0)
    outcomes, faults = chaos.rage(pause_s=3, down_s=3)
    assert [outcome.wrong for outcome in outcomes if outcome.wrong] == []
    assert len(outcomes) == 9 + programs.can_mount() + 2 * can_shift()
    assert all(outcome.complete for outcome in outcomes if "upstream" not in outcome.attack)
    assert faults == []
