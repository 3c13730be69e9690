"""Long work tells how far it is where somebody looks at it; that it is silent elsewhere, other tests see."""

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator

import pytest

from tests.stack import ROOT, Project, Servers, project

SLOT = "of_progress"
LETTERS = 450
TABLES = (
    "create table orders (id bigint primary key, customer_id bigint); create table derived_totals (a int)"
)
HANDLERS = """
from worker import Handlers

on = Handlers()


@on.derive("public.orders", by="customer_id", name="totals")
async def totals(customers, session): ...
"""


@pytest.fixture
async def shop(shared: Servers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Project]:
    folder = tmp_path_factory.mktemp("progress")
    (folder / "progress_shop.py").write_text(HANDLERS)
    settings = {"WORKER_DELIVERY": "proven", "WORKER_SLOT": SLOT, "PYTHONPATH": f"{ROOT}:{folder}"}
    async with project(shared, TABLES, "progress_shop", **settings) as made:
        await made.db.execute("alter table orders replica identity full")
        yield made
        await made.kill_all(SLOT)


async def looked_at(shop: Project, *words: str) -> tuple[int, str, str]:
    """Run a command whose standard error is a terminal: its exit code, its output, what the terminal got."""
    ours, its = os.openpty()
    seen = bytearray()
    loop = asyncio.get_running_loop()
    loop.add_reader(ours, lambda: seen.extend(os.read(ours, 65536)))
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "worker",
            *words,
            cwd=ROOT,
            env=shop.environment | {"TERM": "xterm", "COLUMNS": "150"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=its,
        )
        output, _ = await process.communicate()
    finally:
        loop.remove_reader(ours)
        os.set_blocking(ours, False)
        try:
            while more := os.read(ours, 65536):
                seen.extend(more)
        except OSError:
            pass  # all is read
        os.close(ours)
        os.close(its)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode(errors="replace"))
    return process.returncode or 0, output.decode(), plain


async def dead_letters(shop: Project) -> None:
    await shop.db.execute(
        "insert into tailrace.held"
        " (handler, lanes, keys, lsn, ordinal, status, source, attempts, error_class)"
        " select 'totals', '{0}', array['[' || n || ']'], n, 0, 'dead', 'key', 8, 'ValueError'"
        f" from generate_series(1, {LETTERS}) n"
    )


async def test_bars_on_a_terminal_and_only_there(shop: Project) -> None:
    listener = await shop.listener(wait=False)
    await listener.said("listening")
    await shop.worker()
    await shop.db.execute("insert into orders select n, n % 50 from generate_series(1, 2000) n")
    await shop.until("select sum(applied) from tailrace.lanes", 2000)
    await dead_letters(shop)
    verified, redriven, migrated, examined, filled = await asyncio.gather(
        looked_at(shop, "status", "--verify"),
        looked_at(shop, "dead-letters", "redrive", "--handler", "totals", "--json"),
        looked_at(shop, "migrate"),
        looked_at(shop, "check"),
        looked_at(shop, "backfill", "orders", "--wait"),
    )
    assert "counting the log again" in verified[2]
    assert (redriven[0], "redriving ━" in redriven[2]) == (0, True), redriven
    assert f"{LETTERS}/{LETTERS}" in redriven[2]
    assert len(json.loads(redriven[1])) == LETTERS
    assert (migrated[0], "migrating" in migrated[2], "1/1" in migrated[2]) == (0, True, True), migrated
    assert "examining" in examined[2]
    assert "7/7" in examined[2]
    assert (filled[0], "totals done" in filled[2], "2000/2000" in filled[2]) == (0, True, True), filled
    for _, output, _ in (verified, redriven, migrated, examined, filled):
        assert "\x1b" not in output
