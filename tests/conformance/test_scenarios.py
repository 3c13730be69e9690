"""Our own scenarios: the stories of the recordings in our words, whole without the recordings."""

import pytest

from tests.conformance import scenario_file
from tests.conformance.comparison import compare
from tests.conformance.player import play
from tests.conformance.servers import serving


@pytest.mark.parametrize("name", scenario_file.names())
async def test_the_stand_in_keeps_its_promises(name: str, project: str) -> None:
    script = scenario_file.load(name)
    async with serving(project, script.settings) as server:
        played = await play(script, server)
    problems = [str(difference) for difference in compare(script, played)]
    assert not problems, f"{len(problems)} problems in {name}:\n" + "\n".join(problems[:20])


@pytest.mark.parametrize(("fault", "value"), [("duplicate", 1.0), ("truncate", True), ("delay_ms", 1)])
async def test_a_fault_of_the_stand_in_does_not_pass(fault: str, value: float, project: str) -> None:
    """The suite would be worth nothing if it could not fail; a short delay alone is no fault."""
    script = scenario_file.load("replica_identity")
    async with serving(project, script.settings, faults={fault: value}) as server:
        played = await play(script, server)
    assert bool(compare(script, played)) == (fault != "delay_ms")
