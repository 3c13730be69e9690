"""Loading modules of handlers, and judging handlers against a catalogue."""

import dataclasses
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from worker.catalogue import Catalogue, ColumnInfo, Identity, Table
from worker.change import Change
from worker.errors import ConfigurationError
from worker.loader import load, validate
from worker.registry import Handlers

HEAD = """\
from worker.registry import Handlers
on = Handlers()
"""
HANDLER = """
@on.insert("public.orders")
async def {name}(change, session): ...
"""

Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write modules, and forget them afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)

    def write(**modules: str) -> None:
        for name, body in modules.items():
            path = tmp_path.joinpath(*name.split("__"))
            package = path.parent
            while package != tmp_path:
                package.mkdir(parents=True, exist_ok=True)
                (package / "__init__.py").touch()
                package = package.parent
            path.with_suffix(".py").write_text(textwrap.dedent(body))

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def refused(*modules: str) -> list[str]:
    with pytest.raises(ConfigurationError) as error:
        load(modules)
    return error.value.problems


def test_a_module(write: Write) -> None:
    write(h_one=HEAD + HANDLER.format(name="log"))
    (handler,) = load(["h_one"])
    assert handler.name == "h_one:log"


def test_a_package_is_all_its_modules_those_below_too(write: Write, tmp_path: Path) -> None:
    write(
        h_pack__orders=HEAD + HANDLER.format(name="log"),
        h_pack__deep__down=HEAD + HANDLER.format(name="log"),
        h_pack__tables="class CustomerTotal: ...",
    )
    (tmp_path / "h_pack" / "__main__.py").write_text("raise SystemExit('never run')")
    assert sorted(handler.name for handler in load(["h_pack"])) == [
        "h_pack.deep.down:log",
        "h_pack.orders:log",
    ]


def test_a_registry_shown_in_two_modules_counts_once(write: Write) -> None:
    write(
        h_pack__first=HEAD + HANDLER.format(name="one"),
        h_pack__second="from h_pack.first import on\n" + HANDLER.format(name="two"),
    )
    names = [handler.name for handler in load(["h_pack", "h_pack.first"])]
    assert sorted(names) == ["h_pack.first:one", "h_pack.second:two"]


def test_a_directory_without_init_is_a_package_as_well(write: Write, tmp_path: Path) -> None:
    write(h_space__orders=HEAD + HANDLER.format(name="log"))
    (tmp_path / "h_space" / "__init__.py").unlink()
    assert [handler.name for handler in load(["h_space"])] == ["h_space.orders:log"]


def test_no_handler_at_all(write: Write) -> None:
    write(h_empty=HEAD, h_pack__tables="X = 1")
    (problem,) = refused("h_empty", "h_pack")
    assert problem.startswith("HANDLERS=h_empty,h_pack has no handler: ")
    (problem,) = refused()
    assert "has no handler" in problem


def test_a_module_named_itself_needs_a_registry(write: Write) -> None:
    write(h_tables="X = 1", h_one=HEAD + HANDLER.format(name="log"))
    assert refused("h_one", "h_tables") == ["h_tables: has no Handlers() object; write: on = Handlers()"]


def test_a_module_that_is_not_there(write: Write) -> None:
    write(h_pack__orders=HEAD + HANDLER.format(name="log"))
    assert refused("h_pack.order", "h_nowhere.at.all") == [
        "h_pack.order: there is no module of this name (from HANDLERS, on sys.path)",
        "h_nowhere.at.all: there is no module of this name (from HANDLERS, on sys.path)",
    ]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("import h_not_installed", "cannot be imported, it needs h_not_installed ("),
        (
            "\nfrom os import nothing_such",
            "cannot be imported: ImportError: cannot import name 'nothing_such'",
        ),
        ("x = 1 +", "cannot be imported: invalid syntax ("),
        ("\n\n1 / 0", "cannot be imported: ZeroDivisionError: division by zero ("),
        ("raise SystemExit(3)", "cannot be imported: SystemExit: 3"),
        ("raise ValueError('first\\nsecond')", "cannot be imported: ValueError: first ("),
    ],
)
def test_a_module_that_fails_says_where(write: Write, body: str, said: str) -> None:
    write(h_bad=body)
    (problem,) = refused("h_bad")
    assert problem.startswith(f"h_bad: {said}")
    if "SystemExit" not in said:
        assert f"h_bad.py, line {body.count(chr(10)) + 1 if 'first' not in body else 1})" in problem
    assert "\n" not in problem


def test_what_fails_inside_a_package_is_named(write: Write) -> None:
    write(
        h_pack__good=HEAD + HANDLER.format(name="log"),
        h_pack__bad="from h_pack.inner import x",
        h_pack__inner="import h_not_installed\nx = 1",
    )
    found = refused("h_pack")
    assert len(found) == 2
    assert found[0].startswith("h_pack.bad: cannot be imported, it needs h_not_installed (")
    assert "inner.py, line 1" in found[0]
    assert found[1].startswith("h_pack.inner: cannot be imported, it needs h_not_installed (")


def test_names_are_identities(write: Write) -> None:
    named = '\n@on.insert("t", name="same")\nasync def {name}(change, session): ...\n'
    write(
        h_a=HEAD + named.format(name="one"),
        h_b=HEAD + named.format(name="two"),
        h_c="from h_a import one\n" + HEAD + 'on.delete("t", name="same")(one)\n',
    )
    assert refused("h_a", "h_b") == [
        'same: two handlers have this name, in h_a and h_b; give one its own name="…"'
    ]
    assert refused("h_a", "h_c") == ["same: registered in h_a and again in h_c; one function is one handler"]


def test_all_problems_of_all_modules_at_once(write: Write) -> None:
    write(
        h_a=HEAD + '\n@on.insert("t", nonsense=1)\ndef plain(change, session): ...\n',
        h_b="import h_not_installed",
        h_c="X = 1",
        h_d=HEAD + HANDLER.format(name="sound"),
    )
    found = refused("h_a", "h_b", "h_c", "h_d")
    assert len(found) == 4
    assert [problem.split(":")[0] for problem in found] == ["h_b", "h_c", "h_a", "h_a"]


# Judging against the catalogue.

COLUMNS = {
    "id": ColumnInfo("id", "int8", "bigint", not_null=True),
    "customer_id": ColumnInfo("customer_id", "int8", "bigint"),
    "status": ColumnInfo("status", "text", "text"),
    "amount": ColumnInfo("amount", "numeric", "numeric(12,2)"),
    "code": ColumnInfo("code", "bpchar", "character(5)", 9),
    "flag": ColumnInfo("flag", "bpchar", "character(1)", 5),
}


def table(  # what each test varies
    name: str = "orders",
    *,
    identity: Identity = "full",
    carried: tuple[str, ...] = (),
    primary_key: tuple[str, ...] = ("id",),
    row_security: bool = False,
    published: bool = True,
    **columns: str,
) -> Table:
    known = {**COLUMNS, **{column: ColumnInfo(column, kind, kind) for column, kind in columns.items()}}
    by_identity = {"full": tuple(known), "default": primary_key, "index": carried, "nothing": ()}
    return Table(
        schema="public",
        name=name,
        oid=1,
        columns=known,
        primary_key=primary_key,
        identity=identity,
        identity_columns=frozenset(by_identity[identity]),
        row_security=row_security,
        published=published,
    )


def catalogue(*tables: Table, publication_exists: bool = True) -> Catalogue:
    return Catalogue({(found.schema, found.name): found for found in tables}, publication_exists)


async def handler(changes: Any, session: AsyncSession) -> None: ...


def judged(decorate: Callable[[Handlers], Any], *tables: Table, delivery: Any = "proven") -> list[str]:
    on = Handlers()
    decorate(on)(handler)
    found = validate(on.handlers(), catalogue(*tables), delivery)
    prefix = f"{__name__}:handler: "
    assert all(problem.startswith(prefix) and "\n" not in problem for problem in found)
    return [problem.removeprefix(prefix) for problem in found]


SOUND: list[tuple[Callable[[Handlers], Any], Table]] = [
    (lambda on: on.derive("orders", by="customer_id"), table()),
    (lambda on: on.derive("orders"), table(identity="default")),
    (lambda on: on.change("orders"), table(identity="default")),
    (lambda on: on.change("orders", filter="id=eq.1", columns=["id"]), table(identity="default")),
    (
        lambda on: on.insert("orders", filter="status=eq.paid", lane_key="customer_id"),
        table(identity="default"),
    ),
    (lambda on: on.insert("orders"), table(identity="nothing")),
    (lambda on: on.update("orders", columns=["status"]), table(identity="index", carried=("id", "status"))),
    (lambda on: on.change("orders"), table(identity="index", carried=("id",))),
]


@pytest.mark.parametrize(("decorate", "found"), SOUND)
@pytest.mark.parametrize("delivery", ["plain", "proven"])
def test_sound_handlers(decorate: Callable[[Handlers], Any], found: Table, delivery: str) -> None:
    assert judged(decorate, found, delivery=delivery) == []


def test_an_unknown_table() -> None:
    assert judged(lambda on: on.change("order"), table()) == [
        "there is no table public.order; did you mean public.orders?"
    ]
    # The schema alone makes no table alike.
    assert judged(lambda on: on.change("public.zones"), table()) == [
        "there is no table public.zones; create it, or correct the name"
    ]
    assert judged(lambda on: on.change("zzz.zzz"), table()) == [
        "there is no table zzz.zzz; create it, or correct the name"
    ]


def test_a_table_outside_the_publication() -> None:
    assert judged(lambda on: on.change("orders"), table(published=False)) == [
        (
            "public.orders is not in publication supabase_realtime; run:"
            " alter publication supabase_realtime add table public.orders;"
        )
    ]


def test_remedies_quote_odd_names() -> None:
    on = Handlers()
    on.change('"My Schema"."Odd.Name"')(handler)
    odd = Table("My Schema", "Odd.Name", 1, COLUMNS, ("id",), "full", frozenset(COLUMNS), False, False)  # noqa: FBT003 - fields
    (problem,) = validate(on.handlers(), catalogue(odd), "plain", publication="Mine")
    assert problem.endswith('run: alter publication "Mine" add table "My Schema"."Odd.Name";')


def test_no_publication_at_all_is_one_problem() -> None:
    on = Handlers()
    on.change("orders")(on.change("refunds")(handler))
    found = validate(
        on.handlers(),
        catalogue(table(published=False), table("refunds", published=False), publication_exists=False),
        "plain",
    )
    assert found == [
        (
            "publication supabase_realtime does not exist; run:"
            " create publication supabase_realtime for table public.orders, public.refunds;"
        )
    ]


def test_no_primary_key() -> None:
    assert judged(lambda on: on.derive("orders", by="customer_id"), table(primary_key=())) == [
        "public.orders has no primary key; run: alter table public.orders add primary key (…);"
    ]


def test_unknown_columns_of_every_option() -> None:
    found = judged(
        lambda on: on.change("orders", lane_key="custmer_id", columns=["x"], filter="y=eq.1"), table()
    )
    assert found == [
        "lane_key= names column custmer_id, which public.orders does not have; did you mean customer_id?",
        (
            "columns= names column x, which public.orders does not have;"
            " it has amount, code, customer_id, flag, id, status"
        ),
        (
            "filter= names column y, which public.orders does not have;"
            " it has amount, code, customer_id, flag, id, status"
        ),
    ]
    found = judged(lambda on: on.derive("orders", by="custmer_id"), table())
    assert found == [
        "by= names column custmer_id, which public.orders does not have; did you mean customer_id?"
    ]


def test_a_filter_that_does_not_fit_its_table() -> None:
    (problem,) = judged(lambda on: on.change("orders", filter="customer_id=eq.abc"), table())
    assert problem.startswith("filter= on public.orders: ")


ALTER = "run: alter table public.orders replica identity full;"


@pytest.mark.parametrize(
    ("decorate", "needs"),
    [
        (lambda on: on.derive("orders", by="customer_id"), "by= needs old values of customer_id"),
        (lambda on: on.update("orders", columns=["status", "id"]), "columns= needs old values of status"),
        (
            lambda on: on.change("orders", lane_key=["customer_id"]),
            "lane_key= needs old values of customer_id",
        ),
        (lambda on: on.change("orders", filter="status=eq.paid"), "filter= needs old values of status"),
        (lambda on: on.delete("orders", filter="status=eq.paid"), "filter= needs old values of status"),
    ],
)
def test_old_values_need_a_replica_identity(decorate: Callable[[Handlers], Any], needs: str) -> None:
    assert judged(decorate, table(identity="default")) == [
        f"{needs}, which the replica identity of public.orders (default) does not carry; {ALTER}"
    ]
    assert judged(decorate, table()) == []


@pytest.mark.parametrize("identity", ["nothing", "index"])
def test_an_identity_without_the_primary_key_has_no_order(identity: Identity) -> None:
    (problem,) = judged(lambda on: on.change("orders"), table(identity=identity, carried=("customer_id",)))
    assert problem.startswith(
        "the order of each row's changes needs old values of id, which the replica identity"
    )
    assert problem.endswith(ALTER)


def test_row_security_cuts_deletes_in_plain_delivery_only() -> None:
    found = table(row_security=True)
    by_customer: Callable[[Handlers], Any] = lambda on: on.derive("orders", by="customer_id")  # noqa: E731 - used twice
    (problem,) = judged(by_customer, found, delivery="plain")
    assert problem == (
        "by= needs old values of customer_id, but with row-level security on, Realtime's DELETE of"
        " public.orders carries the primary key alone; use proven delivery (WORKER_DELIVERY=proven), or run:"
        " alter table public.orders disable row level security;"
    )
    assert judged(by_customer, found, delivery="proven") == []
    assert judged(lambda on: on.update("orders", columns=["status"]), found, delivery="plain") == []
    assert judged(lambda on: on.change("orders"), found, delivery="plain") == []


def test_values_that_realtime_cuts_do_not_route_in_plain_delivery() -> None:
    (problem,) = judged(lambda on: on.derive("orders", by=("code", "flag")), table(), delivery="plain")
    assert problem.startswith("by= uses code of public.orders, and Realtime cuts char(n) and bit(n)")
    assert problem.endswith("alter table public.orders alter column code type text;")
    (problem,) = judged(lambda on: on.change("orders"), table(primary_key=("code",)), delivery="plain")
    assert problem.startswith("the primary key uses code of public.orders")
    assert judged(lambda on: on.derive("orders", by="code"), table(), delivery="proven") == []


def test_one_derived_key_has_one_type() -> None:
    def stacked(on: Handlers) -> Callable[[Any], Any]:
        return lambda function: on.derive("orders", by="customer_id")(
            on.derive("refunds", by="customer")(function)
        )

    (problem,) = judged(stacked, table(), table("refunds", customer="text"))
    assert problem.startswith("its keys have different types: public.orders (int8) and public.refunds (text)")
    assert judged(stacked, table(), table("refunds", customer="int4")) == []


def test_rows_are_of_the_annotated_model() -> None:
    class Base(DeclarativeBase): ...

    class Order(Base):
        __tablename__ = "orders"
        id: Mapped[int] = mapped_column(primary_key=True)
        amount: Mapped[int]

    async def typed(change: Any, session: AsyncSession) -> None: ...

    typed.__annotations__["change"] = Change[Order]

    def judged_typed(name: str, found: Table) -> list[str]:
        on = Handlers()
        on.insert(name, name="typed")(typed)
        return validate(on.handlers(), catalogue(found), "proven")

    alike = dataclasses.replace(table(), name="orders_2026")
    fewer = {name: one for name, one in table().columns.items() if name != "amount"}
    other = dataclasses.replace(table(), name="other", columns=fewer)
    assert judged_typed("orders", table()) == []
    assert judged_typed("orders_2026", alike) == []
    assert judged_typed("orders", dataclasses.replace(table(), columns=fewer)) == []
    (problem,) = judged_typed("other", other)
    assert problem.startswith("typed: annotates Change[Order], but public.other has no amount; annotate")


def test_all_problems_of_all_handlers_at_once() -> None:
    on = Handlers()
    on.derive("orders", by="customer_id")(handler)

    @on.update("refunds", columns=["nope"])
    @on.insert("nowhere")
    async def other(change: Change, session: AsyncSession) -> None: ...

    found = validate(
        on.handlers(),
        catalogue(table(identity="default", published=False), table("refunds", published=False)),
        "plain",
    )
    assert len(found) == 5
