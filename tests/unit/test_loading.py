"""What a process loads at its start is memory that it has for ever."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("module", "spared"),
    [
        ("worker.runtime", ("supabase", "alembic", "worker.jobs", "worker.draining")),
        ("worker.jobs", ("supabase", "alembic", "realtime", "worker.listener", "worker.reading")),
    ],
)
def test_a_process_loads_neither_the_other_one_nor_what_few_need(
    module: str, spared: tuple[str, ...]
) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    loaded = set(done.stdout.split())
    assert module in loaded
    assert loaded.isdisjoint(spared)
