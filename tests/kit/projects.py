"""Pytest in a project of somebody else's, with the plugin as pytest would load it."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from tests.leaks import written
from tests.stack import ROOT

DEADLINE_SECONDS = 150.0


async def run_pytest(folder: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """Run pytest in a project; returns its exit code and what it printed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pytest", "-q", "-p", "pytest_tailrace", "-p", "no:cacheprovider"),
        *(*arguments, "--rootdir", str(folder)),
        cwd=folder,
        # Nothing of ours but where the code is: settings of a project would be read by nobody.
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(folder), **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        output, _ = await process.communicate()
        written.heard("pytest", output.decode())
        pytest.fail(f"pytest does not end: {output.decode()[-3000:]}")
    written.heard("pytest", output.decode())
    return process.returncode or 0, output.decode()
