"""Bad surroundings: each told in one clear line with its remedy, and nothing told that is secret.

What a person must mend in the configuration ends the process with 2. What may mend by itself is waited for,
and the work begins without a restart.
"""

import asyncio
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from standin.server.tokens import project_key
from tests.e2e import shop as handlers
from tests.e2e.shop import DIFFERENCES
from tests.stack import SECRET, Process, Project, Relay, Servers, project

PASSWORD = "open-sesame-of-these-tests"
ROW = "a-status-nobody-may-log"
LISTEN = (sys.executable, "-m", "worker", "listen")
MISFITS = """
from worker import Handlers

on = Handlers()


@on.insert("public.zones", name="of_nothing")
async def of_nothing(change, session): ...


@on.insert("public.bills", name="of_bills")
async def of_bills(change, session): ...


@on.derive("public.parts", by="bill_id", name="of_parts")
async def of_parts(keys, session): ...
"""
WORK = (sys.executable, "-m", "arq", "worker.jobs.WorkerSettings")


@pytest.fixture
async def shop(shared: Servers) -> AsyncIterator[Project]:
    """A shop whose user has a password that can be told from all other words."""
    async with project(shared, handlers.TABLES, "tests.e2e.shop") as made:
        name = f"keeper_{made.database_url.rpartition('_')[2]}"
        await made.db.execute(f"create role {name} superuser login password '{PASSWORD}'")
        made.environment["DATABASE_URL"] = made.database_url.replace(
            "postgres:postgres@", f"{name}:{PASSWORD}@"
        )
        yield made
        for process in made.processes:
            discreet(process.text, made)
        await made.db.execute(f"drop owned by {name}; drop role {name}")


def discreet(text: str, shop: Project) -> None:
    """See that a text shows no inside of the program, no secret and no row."""
    assert "Traceback" not in text, text
    assert "exc_info" not in text, text
    for secret in (PASSWORD, SECRET, ROW, shop.standin.service_role_key, shop.standin.service_role_key[-20:]):
        assert secret not in text, text


def lines(process: Process) -> list[str]:
    return [str(line["message"]) for line in process.lines if "level" not in line]


async def ends(shop: Project, command: tuple[str, ...], **environment: str) -> tuple[int, list[str]]:
    """Run a process to its end; returns its exit code and its lines that are no log lines."""
    process = await shop.start(*command, name=command[2], **environment)
    return await process.ended(), lines(process)


async def checked(shop: Project, **environment: str) -> tuple[int, str]:
    code, output = await shop.run("check", **environment)
    discreet(output, shop)
    return code, " ".join(output.split())


async def reasons(shop: Project, listener: Process) -> str:
    answer = await shop.get(listener, "/readyz")
    assert answer.status_code == 503
    discreet(answer.text, shop)
    return "; ".join(answer.json()["reasons"])


async def refused(shop: Project, *words: str, check: bool = True, **environment: str) -> None:
    """See that listener and worker end with 2 and a line with each of these words, which check finds too."""
    listened, worked, (code, found) = await asyncio.gather(
        ends(shop, LISTEN, **environment), ends(shop, WORK, **environment), checked(shop, **environment)
    )
    for ended, told in (listened, worked):
        assert ended == 2, told
        assert all(line.startswith("tailrace: ") for line in told), told
        assert len(told) == len(words), told
        for word in words:
            assert any(word in line for line in told), told
    if check:
        assert code == 1
        for word in words:
            detail, _, remedy = word.partition("; run: ")
            assert detail in found
            assert remedy in found


async def works(shop: Project) -> None:
    """See that a change goes all the way."""
    await shop.db.execute("insert into orders (customer_id, status) values (1, $1)", ROW)
    await shop.until(DIFFERENCES, 0)
    await shop.until(
        "select count(*) from derived_log", await shop.db.fetchval("select count(*) from orders")
    )


async def test_handlers_that_do_not_fit_the_database_end_with_2_and_say_what_mends(
    shop: Project, tmp_path: Path
) -> None:
    (tmp_path / "misfits.py").write_text(MISFITS)
    misfits = {
        "HANDLERS": "tests.e2e.shop,misfits",
        "PYTHONPATH": f"{shop.environment['PYTHONPATH']}:{tmp_path}",
    }
    await shop.db.execute(
        "create table bills (id int primary key); create table parts (id int primary key, bill_id int);"
        "alter publication supabase_realtime add table parts"
    )
    publish = "alter publication supabase_realtime add table public.bills;"
    carry = "alter table public.parts replica identity full;"
    await refused(
        shop,
        "of_nothing: there is no table public.zones; create it, or correct the name",
        f"of_bills: public.bills is not in publication supabase_realtime; run: {publish}",
        "of_parts: by= needs old values of bill_id, which the replica identity of public.parts (default)"
        f" does not carry; run: {carry}",
        **misfits,
    )
    await shop.db.execute("create table zones (id int primary key)")
    await shop.db.execute("alter publication supabase_realtime add table zones")
    await shop.db.execute(publish)
    await shop.db.execute(carry)
    await asyncio.gather(shop.listener(**misfits), shop.worker(**misfits))
    await works(shop)


async def test_modules_that_cannot_be_imported_end_with_2(shop: Project, tmp_path: Path) -> None:
    (tmp_path / "needs_more.py").write_text("import a_package_nobody_has\n")
    (tmp_path / "stumbles.py").write_text("from worker import Handlers\non = Handlers()\n1 / 0\n")
    (tmp_path / "half.py").write_text("def f(:\n")
    await refused(
        shop,
        "no_such_module: there is no module of this name",
        "needs_more: cannot be imported, it needs a_package_nobody_has",
        "stumbles: cannot be imported: ZeroDivisionError",
        "half: cannot be imported: invalid syntax",
        "tests.e2e.writing: has no Handlers() object; write: on = Handlers()",
        HANDLERS="no_such_module,needs_more,stumbles,half,tests.e2e.writing",
        PYTHONPATH=f"{shop.environment['PYTHONPATH']}:{tmp_path}",
    )


async def test_bad_settings_are_all_named_at_once_by_every_command(shop: Project) -> None:
    bad = {
        "SUPABASE_URL": "",
        "SUPABASE_SERVICE_ROLE_KEY": project_key("anon", SECRET),
        "DATABASE_URL": f"mysql://somebody:{PASSWORD}@127.0.0.1/x",
        "REDIS_URL": "",
        "PORT": "many",
        "WORKER_BATCH": "0",
        "WORKER_LOG_FORMAT": "verse",
    }

    async def told(*command: str) -> tuple[int, str]:
        if command[0] == "arq":
            code, said = await ends(shop, WORK, **bad)
            return code, "\n".join(said)
        return await shop.run(*command, **bad)

    commands = [("arq",), ("listen",), ("work",), ("run",), ("migrate",), ("check",), ("status",)]
    for command, (code, output) in zip(
        commands, await asyncio.gather(*(told(*command) for command in commands)), strict=True
    ):
        assert code == 2, (command, output)
        for name in bad:
            assert any(line.startswith(f"tailrace: {name} ") for line in output.splitlines()), (
                command,
                output,
            )
        assert len(output.splitlines()) == len(bad), (command, output)
        discreet(output, shop)
        assert bad["SUPABASE_SERVICE_ROLE_KEY"] not in output


async def test_a_port_that_is_taken_ends_with_2(shop: Project) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        listened, worked = await asyncio.gather(
            ends(shop, LISTEN, PORT=port), ends(shop, WORK, WORKER_HEALTH_PORT=port)
        )
    remedy = "end what listens there, or choose a free port"
    assert listened == (2, [f"tailrace: PORT {port} is taken on 127.0.0.1: {remedy}"])
    assert worked == (2, [f"tailrace: WORKER_HEALTH_PORT {port} is taken on 127.0.0.1: {remedy}"])


async def test_what_is_away_at_the_start_is_waited_for(shop: Project) -> None:
    user, _, rest = shop.environment["DATABASE_URL"].partition("@")
    role = user.partition("//")[2].partition(":")[0]
    await shop.db.execute(f"alter role {role} password 'another'")
    await shop.db.execute("drop schema tailrace cascade")
    async with Relay(f"{user}@{rest}") as postgres, Relay(shop.environment["REDIS_URL"]) as redis:
        away = {"DATABASE_URL": postgres.url, "REDIS_URL": redis.url}
        listener, worker = await asyncio.gather(
            shop.listener(wait=False, **away), shop.worker(wait=False, **away)
        )

        async def waiting(times: int, words: str, remedy: str) -> None:
            for process in (listener, worker):
                line = await process.said("waiting for Postgres", times=times)
                assert words in line["reason"]
            assert words in await reasons(shop, listener)
            code, found = await checked(shop, **away)
            assert code == 1
            assert remedy in found

        line = await worker.said("waiting for Redis")
        assert line["reason"] == "REDIS_URL cannot be reached"
        await redis.open()
        await waiting(1, "Postgres cannot be reached", "check DATABASE_URL")
        await postgres.open()
        await waiting(2, "Postgres refuses the user or password of DATABASE_URL", "check DATABASE_URL")
        await shop.db.execute(f"alter role {role} password '{PASSWORD}'")
        await waiting(
            3, "tailrace's tables are missing: run `python -m worker migrate`", "python -m worker migrate"
        )
        await redis.cut()
        assert (await shop.run("migrate"))[0] == 0
        line = await listener.said("waiting for Redis")
        assert line["reason"] == "REDIS_URL cannot be reached"
        assert (await shop.get(listener, "/livez")).status_code == 200
        code, found = await checked(shop, **away)
        assert code == 1
        assert "start Redis, or correct REDIS_URL" in found
        await redis.open()
        await asyncio.gather(listener.said("subscribed"), worker.said("working"))
        await works(shop)
        for process in (listener, worker):
            assert sum("waiting for Postgres" in str(line["message"]) for line in process.lines) == 3
            assert await process.terminate() == 0


async def test_a_wrong_key_a_wrong_address_and_nobody_at_the_address(shop: Project) -> None:
    wrong = project_key("service_role", "another secret, which is long enough for HS256 as well")
    trouble = "no connection to Realtime, trying on"
    worker = await shop.worker(SUPABASE_SERVICE_ROLE_KEY=wrong)

    refuses = await shop.listener(wait=False, SUPABASE_SERVICE_ROLE_KEY=wrong)
    (code, found), line = await asyncio.gather(
        checked(shop, SUPABASE_SERVICE_ROLE_KEY=wrong), refuses.said(trouble)
    )
    assert "Realtime refuses the key" in line["cause"]
    assert "check SUPABASE_SERVICE_ROLE_KEY" in line["cause"]
    assert line["cause"] in await reasons(shop, refuses)
    assert code == 1
    assert "check SUPABASE_SERVICE_ROLE_KEY" in found
    assert await refuses.terminate() == 0
    assert wrong not in refuses.text + found

    elsewhere = {"SUPABASE_URL": f"{shop.standin.supabase_url}/elsewhere"}
    nowhere = await shop.listener(wait=False, **elsewhere)
    (code, found), line = await asyncio.gather(checked(shop, **elsewhere), nowhere.said(trouble))
    assert "there is no Realtime at" in line["cause"]
    assert "check SUPABASE_URL or REALTIME_URL" in line["cause"]
    assert code == 1
    assert "check SUPABASE_URL or REALTIME_URL" in found
    assert await nowhere.terminate() == 0

    async with Relay(shop.standin.supabase_url) as relay:
        listener = await shop.listener(wait=False, SUPABASE_URL=relay.url)
        line = await listener.said(trouble)
        assert "cannot be reached" in line["cause"]
        assert "check SUPABASE_URL or REALTIME_URL, and the network" in line["cause"]
        assert "cannot be reached" in await reasons(shop, listener)
        await relay.open()
        await listener.said("subscribed")
        await works(shop)
        assert sum(trouble in str(line["message"]) for line in listener.lines) == 1
        assert await listener.terminate() == 0
    assert wrong not in worker.text
