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
