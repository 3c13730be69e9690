"""The recordings of the real server, replayed against the stand-in and compared frame for frame."""

import pytest

from tests.conformance import recordings
from tests.conformance.comparison import compare, judge
from tests.conformance.deviations import DEVIATIONS
from tests.conformance.plans import NOT_REPLAYED, PLANS
from tests.conformance.player import play
from tests.conformance.servers import serving

pytestmark = pytest.mark.skipif(
    recordings.directory() is None,
    reason="no recordings beside the checkout or at TAILRACE_TRANSCRIPTS; test_scenarios has our own",
)


@pytest.mark.parametrize("name", PLANS)
async def test_the_stand_in_sends_what_the_real_server_sent(name: str, project: str) -> None:
    script = recordings.load(name)
    async with serving(project, script.settings) as server:
        played = await play(script, server)
    problems = judge(script, compare(script, played), DEVIATIONS)
    assert not problems, f"{len(problems)} problems in {name}:\n" + "\n".join(problems[:20])


def test_every_recording_is_replayed_or_named_with_a_reason() -> None:
    folder = recordings.directory()
    assert folder is not None
    recorded = {path.name.split(".")[0] for path in folder.glob("*.jsonl*")}
    assert recorded == {plan.recording for plan in PLANS.values()} | NOT_REPLAYED.keys()


def test_every_deviation_belongs_to_a_plan() -> None:
    assert {row.scenario for row in DEVIATIONS} <= PLANS.keys()
