"""The search for secrets in what the suite writes can fail: each that is planted is found."""

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.kit.projects import run_pytest

CONFTEST = """
from tests import leaks


def pytest_configure(config):
    config.pluginmanager.register(leaks)
"""
TEST = """
import logging
import sys

import structlog

from tests.stack import Process


async def write(text, **environment):
    code = f"import sys; sys.stderr.write({text!r})"
    process = await Process.start([sys.executable, "-c", code], environment, "listener")
    assert await process.ended() == 0


"""
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJyb2xlIjoic2VydmljZV9yb2xlIn0.c2lnbmF0dXJl"
PLANTED = {
    "by value": 'await write("opening with hunter2hunter2", WORKER_HOOK_SECRET="hunter2hunter2")',
    "a password": 'await write("as (shop, hunter3hunter3)", DATABASE_URL="postgresql://shop:hunter3hunter3@h/x")',
    "a token": f'await write("asked with {JWT}")',
    "a key": 'await write("asked with sb_secret_0123")',
    "a URL": 'await write("no connection to redis://default:hunter2@127.0.0.1")',
    "printed": f'structlog.get_logger().info("opening", key="{JWT}")',
    "logged": 'logging.getLogger("x").warning("opening redis://default:hunter2@127.0.0.1")',
}


FOUND = {
    "the value of WORKER_HOOK_SECRET",
    "the value of DATABASE_URL",
    "a JWT",
    "a secret key",
    "the password of a URL",
}


async def run(folder: Path, bodies: Iterable[str], *arguments: str) -> tuple[int, str]:
    tests = [f"async def test_{number}():\n    {body}\n" for number, body in enumerate(bodies)]
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_planted.py").write_text("\n\n".join([TEST, *tests]))
    return await run_pytest(folder, "--asyncio-mode=auto", *arguments)


@pytest.mark.parametrize("processes", ["0", "1"])
async def test_planted_secrets_fail_the_session(processes: str, tmp_path: Path) -> None:
    code, output = await run(tmp_path, PLANTED.values(), "-n", processes)
    assert code == 1
    assert f"{len(PLANTED)} passed" in output
    assert set(re.findall(r"^(.*) in: .*<here>", output, re.MULTILINE)) == FOUND
    assert f"{len(PLANTED)} lines" in output
    assert not [secret for secret in ("hunter2", "hunter3", JWT, "sb_secret_0123") if secret in output]


async def test_what_is_redacted_is_none(tmp_path: Path) -> None:
    text = "no connection to redis://default:[redacted]@127.0.0.1 as postgres"
    code, output = await run(tmp_path, [f'await write("{text}", PGPASSWORD="postgres")'])
    assert code == 0, output
