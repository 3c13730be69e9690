from pathlib import Path

from alembic.script import ScriptDirectory

import migrations


def test_the_head_that_processes_ask_for_is_the_head_of_the_files() -> None:
    script = ScriptDirectory(str(Path(migrations.__file__).parent))
    assert script.get_heads() == [migrations.HEAD]
