"""Every example of docs/testing.md, in a project of its own, with the plugin as pytest would load it."""

import re
import tomllib
from pathlib import Path

from tests.kit.projects import run_pytest
from tests.stack import ROOT

PAGE = (ROOT / "docs/testing.md").read_text()


def blocks(heading: str, language: str = "python") -> list[str]:
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


def write_project(folder: Path, **modules: str) -> None:
    (ini,) = blocks("Set-up", "ini")
    (conftest,) = blocks("Set-up")
    (folder / "pytest.ini").write_text(f"{ini}filterwarnings = error\n")
    (folder / "conftest.py").write_text(modules.pop("conftest", conftest))
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)


async def test_the_examples_of_the_page(tmp_path: Path) -> None:
    (one,), (whole,) = blocks("One change, one handler"), blocks("The whole pipeline")
    write_project(tmp_path, test_one=one, test_whole=whole)
    # A project that is configured is not reached: these addresses would be refused at once.
    nowhere = {"DATABASE_URL": "postgresql://u:p@127.0.0.1:9/x", "REDIS_URL": "redis://127.0.0.1:9"}
    code, output = await run_pytest(tmp_path, **nowhere)
    assert code == 0, output
    assert "4 passed" in output


def test_the_page_names_all_fixtures() -> None:
    source = (ROOT / "pytest_tailrace.py").read_text()
    fixtures = re.findall(r"^@(?:pytest\.|async_)fixture.*\n(?:async )?def (\w+)", source, re.MULTILINE)
    table = PAGE.split("\n## Fixtures\n")[1]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == fixtures


def test_pytest_finds_the_plugin_under_the_name_of_its_module() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["pytest11"] == {"pytest_tailrace": "pytest_tailrace"}
    assert project["tool"]["setuptools"]["py-modules"] == ["pytest_tailrace"]
    assert "standin*" in project["tool"]["setuptools"]["packages"]["find"]["include"]


async def test_a_project_that_uses_nothing_of_it_loads_nothing(tmp_path: Path) -> None:
    body = """
        import sys

        def test_nothing_is_loaded():
            heavy = {"worker", "config", "standin", "sqlalchemy", "asyncpg", "redis", "supabase", "pydantic"}
            assert "pytest_tailrace" in sys.modules
            assert not heavy & {name.split(".")[0] for name in sys.modules}
    """
    (tmp_path / "test_own.py").write_text(re.sub("^ {8}", "", body, flags=re.MULTILINE))
    code, output = await run_pytest(tmp_path, "-p", "no:hypothesispytest", "-W", "error", "-p", "no:asyncio")
    assert code == 0, output


FAILING = """
from sqlalchemy import text
from worker import Change, GiveUp, Handlers, RetryLater

on = Handlers()


@on.insert("public.items", filter="note=neq.skip")
async def note(change, session):
    if change.record["note"] == "bad":
        raise ValueError("a bad note")
    if change.record["note"] == "never":
        raise GiveUp("never")
    await session.execute(text("insert into copies values (:id)"), {"id": change.record["id"]})


@on.derive("public.copies")
async def count(keys, session):
    for key in keys:
        await session.execute(text("insert into counted values (:id)"), {"id": key})
"""
ITEMS = '''
import pytest


@pytest.fixture(scope="session")
def tailrace_tables():
    return """
        create table items (id bigint generated always as identity primary key, note text not null);
        create table copies (id bigint primary key);
        create table counted (id bigint);
    """


@pytest.fixture(scope="session")
def tailrace_handlers():
    return "shop"
'''
SHOWN = """
import pytest
from sqlalchemy import text
from worker import GiveUp
from worker.testing import NotSettledError, delete, insert, update


async def test_what_a_handler_raises_the_test_gets_and_its_writes_are_undone(deliver):
    with pytest.raises(ValueError, match="a bad note"):
        await deliver(insert("items", note="good"), insert("items", note="bad"))
    assert await deliver.session.scalar(text("select count(*) from copies")) == 0
    assert await deliver.session.scalar(text("select count(*) from items")) == 2
    with pytest.raises(GiveUp):
        await deliver(insert("items", note="never"))


async def test_what_is_filtered_out_calls_nobody(deliver):
    assert await deliver(insert("items", note="skip")) == ()


async def test_what_cannot_be_is_said(deliver):
    with pytest.raises(LookupError, match="there is no table public.orders"):
        await deliver(insert("orders", id=1), to="shop:note")
    with pytest.raises(LookupError, match="no handler subscribes to public.counted; there are: shop:note"):
        await deliver(insert("counted", id=1))
    with pytest.raises(LookupError, match="has no column nota"):
        await deliver(insert("items", nota="x"))
    with pytest.raises(LookupError, match="has no row with this primary key"):
        await deliver(update("items", 99, note="x"), to="shop:note")
    with pytest.raises(TypeError, match="which row"):
        delete("items")
    with pytest.raises(LookupError, match="is none of the handlers: shop:"):
        await deliver(insert("items", note="x"), to="note")


async def test_nothing_of_one_test_is_left_to_the_next(deliver):
    assert await deliver.session.scalar(text("select count(*) from items")) == 0


async def test_settling_follows_what_handlers_write(pipeline, settle):
    await pipeline.write(insert("items", note="good"), insert("items", note="skip"))
    await settle()
    async with pipeline.session() as session:
        assert await session.scalar(text("select count(*) from counted")) == 1


async def test_a_change_that_is_given_up_does_not_settle(pipeline, settle):
    await pipeline.write(insert("items", note="bad"))
    with pytest.raises(NotSettledError, match="shop:note gave up 1 change.*(?s:.)*ValueError: a bad note"):
        await settle()
"""


async def test_failures_are_shown_where_they_belong(tmp_path: Path) -> None:
    write_project(tmp_path, conftest=ITEMS, shop=FAILING, test_shown=SHOWN)
    code, output = await run_pytest(tmp_path)
    assert code == 0, output
    assert "6 passed" in output


WIDE = """
from worker import Handlers

on = Handlers()
seen = []


@on.change("public.wide")
async def keep(change, session):
    seen.append(change)
"""
WIDE_TABLES = '''
import pytest


@pytest.fixture(scope="session")
def tailrace_handlers():
    return "wide"


@pytest.fixture(scope="session")
def tailrace_tables():
    return """
        create type mood as enum ('good', 'bad');
        create table wide (
            id uuid, n int, primary key (n, id), flag boolean, exact numeric(10, 3), name text, code char(5),
            at timestamptz, day date, facts jsonb, tags text[], feels mood, raw bytea, took interval,
            nothing text, "Odd Name" int, doubled int generated always as (n * 2) stored
        )
    """
'''
WIDE_TEST = """
import datetime as dt
from decimal import Decimal
from uuid import UUID

from wide import seen
from worker.testing import delete, insert, update

ID = UUID(int=7)
AT = dt.datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=dt.UTC)
ROW = {
    "id": ID, "n": 3, "flag": True, "exact": Decimal("1.500"), "name": "a b", "code": "ab", "at": AT,
    "day": AT.date(), "facts": {"a": [1, None]}, "tags": ["x", "y,z"], "feels": "bad", "raw": b"\\x00\\xff",
    "took": dt.timedelta(days=2, seconds=1), "nothing": None, "Odd Name": 5,
}


async def test_values_are_what_the_database_gives(deliver):
    await deliver(insert("wide", **ROW))
    driver = (await (await deliver.session.connection()).get_raw_connection()).driver_connection
    expected = dict(await driver.fetchrow("select * from wide"))
    expected["facts"] = ROW["facts"]
    (change,) = seen
    assert dict(change.record) == expected
    # The driver has a UUID of its own, which is one.
    assert all(isinstance(expected[name], type(value)) for name, value in change.record.items())
    assert (change.key, change.type, change.old_record) == ((3, ID), "INSERT", None)


async def test_old_values_are_what_the_replica_identity_carries(deliver):
    await deliver(insert("wide", **ROW))
    seen.clear()
    await deliver(update("wide", (3, ID), name="c"))
    await deliver(update("wide", (3, ID), n=4))
    await deliver(delete("wide", (4, ID)))
    same, moved, gone = seen
    assert dict(same.old_record) == {"id": ID, "n": 3}
    assert dict(moved.old_record) == {"id": ID, "n": 3}
    assert dict(gone.old_record) == {"id": ID, "n": 4}
"""


async def test_changes_are_those_of_the_log(tmp_path: Path) -> None:
    write_project(tmp_path, conftest=WIDE_TABLES, wide=WIDE, test_wide=WIDE_TEST)
    code, output = await run_pytest(tmp_path)
    assert code == 0, output


async def test_handlers_that_do_not_fit_the_tables_are_told_of(tmp_path: Path) -> None:
    wrong = FAILING.replace("public.items", "public.itemz")
    write_project(tmp_path, conftest=ITEMS, shop=wrong, test_shown="async def test_one(deliver): ...")
    code, output = await run_pytest(tmp_path)
    assert code == 1
    assert "there is no table public.itemz" in output
    assert "fixture tailrace_tables gives the tables that the tests have" in output


async def test_loops_that_differ_are_told_of(tmp_path: Path) -> None:
    test = """
import pytest
from worker.testing import insert

@pytest.mark.asyncio(loop_scope="session")
async def test_one(deliver):
    with pytest.raises(RuntimeError, match="asyncio_default_fixture_loop_scope"):
        await deliver(insert("items", note="x"))
"""
    write_project(tmp_path, conftest=ITEMS, shop=FAILING, test_shown=test)
    code, output = await run_pytest(tmp_path)
    assert code == 0, output
