"""A short run of chaos with a seed that is always the same."""

from pathlib import Path

import pytest

from tests.chaos.faults import KINDS, plan
from tests.chaos.run import chaos


def test_a_plan_repeats_by_its_seed_and_leaves_no_kind_out() -> None:
    assert plan(7, 120, 4) == plan(7, 120, 4) != plan(8, 120, 4)
    assert {one.kind for one in plan(7, 120, 4)} == set(KINDS)


@pytest.mark.slow
async def test_whatever_dies_everything_is_applied_once_and_in_order(tmp_path: Path) -> None:
    outcome = await chaos(tmp_path, seed=7, seconds=15, rate=200, every=1.5, settling=100)
    assert outcome.committed > 0
    # Processes are started again here whatever happens; but a listener has no reason ever to end.
    assert not [line for line in outcome.died if line.startswith("listener")]
