"""One set of servers for all tests of the doctor, for they make them ill."""

import sys
from collections.abc import AsyncIterator

import pytest

from standin.embedded import EmbeddedPostgres, EmbeddedRedis, bootstrap_supabase
from standin.server import LOCAL_JWT_SECRET, Standin
from tests.integration.check.patients import HANDLERS, INSERTS, MIGRATE, Patients
from worker.check.fixing import Done


@pytest.fixture(scope="session")
async def patients(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Patients]:
    directory = tmp_path_factory.mktemp("patients")
    (directory / "patients_shop.py").write_text(HANDLERS)
    (directory / "patients_inserts.py").write_text(INSERTS)
    sys.path.insert(0, str(directory))
    async with (
        EmbeddedPostgres(directory / "postgres", settings={"max_slot_wal_keep_size": "2GB"}) as postgres,
        EmbeddedRedis(directory / "redis") as redis,
    ):
        await bootstrap_supabase(postgres.dsn())
        async with Standin(postgres.dsn(), jwt_secret=LOCAL_JWT_SECRET) as realtime:
            yield Patients(postgres, redis, realtime, directory)
    sys.path.remove(str(directory))


@pytest.fixture
async def healthy(patients: Patients) -> AsyncIterator[Patients]:
    await patients.sql(
        "drop table if exists public.orders",
        "create table public.orders (id bigint primary key, customer_id bigint, number int not null unique)",
        "alter table public.orders replica identity full",
        "grant select on public.orders to service_role",
        "do $$ begin create publication supabase_realtime; exception when duplicate_object then end $$",
        "alter publication supabase_realtime set table public.orders",
        "alter publication supabase_realtime set (publish = 'insert, update, delete, truncate')",
    )
    done = await patients.mended([MIGRATE])
    assert done == [Done("python -m worker migrate")]
    yield patients
    await patients.sql("drop table if exists public.orders")
