"""A database set back to an earlier state: noticed and told, and the lost time has no effect."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.e2e import shop as handlers
from tests.e2e.shop import DIFFERENCES
from tests.e2e.writing import Writer, logged
from tests.stack import Project, project, servers


@pytest.fixture
async def shop(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Project]:
    async with (
        servers(tmp_path_factory.mktemp("restored")) as own,
        project(own, handlers.TABLES, "tests.e2e.shop", WORKER_DELIVERY="proven") as made,
    ):
        yield made
        await made.kill_all("tailrace")


async def back_up(shop: Project, to: Path) -> None:
    """Copy the stopped server's files, and start it again."""
    postgres = shop.servers.postgres
    await postgres.stop()
    await asyncio.to_thread(shutil.copytree, postgres.data_dir, to, symlinks=True)
    await postgres.start()
    await shop.reconnect()


async def restore(shop: Project, backup: Path) -> None:
    """Put the files of a back-up in place of the server's own."""
    postgres = shop.servers.postgres
    await postgres.stop()
    # Directory by directory: owners and modes of the top stay.
    cluster = postgres.data_dir / "cluster"
    owner = cluster.stat()
    await asyncio.to_thread(shutil.rmtree, cluster)
    await asyncio.to_thread(shutil.copytree, backup / "cluster", cluster, symlinks=True)
    cluster.chmod(0o700)
    for path in [cluster, *cluster.rglob("*")]:
        shutil.chown(path, owner.st_uid, owner.st_gid)
    await postgres.start()
    await shop.reconnect()


async def settled(shop: Project, writer: Writer) -> None:
    await shop.until("select count(*) from derived_log", writer.committed, 60)
    await shop.until(DIFFERENCES, 0, 60)
    assert await logged(shop.db) == writer.history


async def test_a_restored_database_is_another_history(shop: Project, tmp_path: Path) -> None:
    listener = await shop.listener(wait=False)
    await listener.said("listening")
    await shop.worker()
    writer = Writer(shop, seed=21)
    await writer.write(100)
    await settled(shop, writer)
    await back_up(shop, tmp_path / "backup")
    before = await shop.db.fetchval("select history from tailrace.source")
    for number in range(1000, 1200):
        await shop.db.execute("insert into orders (id, customer_id, amount) values ($1, 1, 10)", number)
    await shop.until("select count(*) from derived_log where order_id >= 1000", 200)
    # Some of the lost time is in the lanes when the files go back.
    for process in shop.processes[1:]:
        await process.kill()
    await shop.db.execute(
        "insert into orders (id, customer_id, amount) select n, 2, 10 from generate_series(2000, 2500) n"
    )
    await restore(shop, tmp_path / "backup")
    await shop.until("select count(*) from tailrace.gaps", 1)
    await shop.worker()
    await writer.write(100)
    await settled(shop, writer)
    assert await shop.db.fetchval("select count(*) from derived_log where order_id >= 1000") == 0
    assert await shop.db.fetchval("select history from tailrace.source") != before
    await shop.until("select count(*) from tailrace.backfills where state <> 'done'", 0)
    cause = await shop.db.fetchval("select cause from tailrace.gaps")
    assert "restored" in cause
