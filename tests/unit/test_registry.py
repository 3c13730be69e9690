"""Declaring handlers: what the decorators make of a function, and every way to get them wrong."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from sqlalchemy import column, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from worker.change import Change, Context
from worker.errors import ConfigurationError
from worker.forgetting import cached_tables
from worker.registry import Handler, Handlers

Anything = dict[str, Any]


async def keys_handler(keys: list[int], session: AsyncSession) -> None: ...


async def change_handler(change: Change, session: AsyncSession) -> None: ...


async def list_handler(changes: list[Change], session: AsyncSession) -> None: ...


async def context_handler(change: Change, session: AsyncSession, context: Context) -> None: ...


def only(on: Handlers) -> Handler:
    (handler,) = on.handlers()
    return handler


def problems(on: Handlers) -> list[str]:
    with pytest.raises(ConfigurationError) as refused:
        on.handlers()
    assert str(refused.value).splitlines() == refused.value.problems
    return refused.value.problems


def test_a_derive_handler_is_given_lists_of_its_keys() -> None:
    on = Handlers()
    assert on.derive("public.orders", by="customer_id")(keys_handler) is keys_handler
    handler = only(on)
    assert (handler.kind, handler.wants_list, handler.wants_context) == ("derive", True, False)
    assert handler.name == f"{__name__}:keys_handler"
    assert handler.function is keys_handler
    (subscription,) = handler.subscriptions
    assert (subscription.schema, subscription.table) == ("public", "orders")
    assert subscription.types == {"INSERT", "UPDATE", "DELETE"}
    assert subscription.lane_key == ("customer_id",)
    assert subscription.filter is None
    assert subscription.columns == frozenset()


@pytest.mark.parametrize(
    ("decorate", "types"),
    [
        (Handlers.insert, {"INSERT"}),
        (Handlers.update, {"UPDATE"}),
        (Handlers.delete, {"DELETE"}),
        (Handlers.change, {"INSERT", "UPDATE", "DELETE"}),
    ],
)
def test_each_decorator_subscribes_to_its_types(decorate: Callable[..., Any], types: set[str]) -> None:
    on = Handlers()
    decorate(on, "orders")(change_handler)
    (subscription,) = only(on).subscriptions
    assert subscription.types == types
    assert subscription.qualified == "public.orders"
    assert subscription.lane_key is None


def test_truncate_only_for_those_that_ask() -> None:
    on = Handlers()
    on.change("orders", types=["DELETE", "TRUNCATE"])(change_handler)
    assert only(on).subscriptions[0].types == {"DELETE", "TRUNCATE"}


def test_options_that_are_not_given_leave_the_setting_to_decide() -> None:
    on = Handlers()
    on.insert("orders")(change_handler)
    handler = only(on)
    undecided = (handler.batch, handler.max_attempts, handler.backoff, handler.backoff_max, handler.timeout)
    assert undecided == (None,) * 5
    assert (handler.role, handler.claims, handler.all_keys) == (None, None, None)


def test_options_arrive() -> None:
    on = Handlers()
    on.change(
        "orders",
        batch=20,
        name="ship",
        filter="status=eq.paid",
        columns=["status"],
        lane_key=("customer_id", "region"),
        max_attempts=3,
        backoff=0.5,
        backoff_max=60,
        timeout=5,
        role="authenticated",
        claims={"sub": "1"},
    )(list_handler)
    handler = only(on)
    assert (handler.name, handler.batch, handler.wants_list) == ("ship", 20, True)
    assert (handler.max_attempts, handler.backoff, handler.backoff_max, handler.timeout) == (3, 0.5, 60, 5)
    assert (handler.role, dict(handler.claims or {})) == ("authenticated", {"sub": "1"})
    (subscription,) = handler.subscriptions
    assert subscription.columns == {"status"}
    assert subscription.lane_key == ("customer_id", "region")
    assert subscription.filter is not None
    assert subscription.filter.columns == {"status"}


def test_all_keys_is_a_select_or_makes_one() -> None:
    statement = select(column("customer_id"))
    for given in (statement, lambda: statement):
        on = Handlers()
        on.derive("orders", all_keys=given)(keys_handler)
        all_keys = only(on).all_keys
        assert all_keys is not None
        assert all_keys() is statement


def test_a_third_parameter_is_the_context() -> None:
    async def with_default(change: Change, session: AsyncSession, context: Context | None = None) -> None: ...

    async def with_something_else(change: Change, session: AsyncSession, retries: int = 3) -> None: ...

    wants = {}
    for function in (context_handler, with_default, with_something_else, change_handler):
        on = Handlers()
        on.insert("orders")(function)
        wants[function.__name__] = only(on).wants_context
    assert wants == {
        "context_handler": True,
        "with_default": True,
        "with_something_else": False,
        "change_handler": False,
    }


def test_stacked_decorators_are_one_handler_across_tables() -> None:
    on = Handlers()

    @on.insert("public.orders", max_attempts=2)
    @on.update("public.orders", columns=["status"])
    @on.delete("shop.refunds")
    async def log_status(change: Change, session: AsyncSession) -> None: ...

    handler = only(on)
    assert handler.function is log_status
    assert handler.max_attempts == 2
    assert [(s.qualified, *s.types) for s in handler.subscriptions] == [
        ("public.orders", "INSERT"),
        ("public.orders", "UPDATE"),
        ("shop.refunds", "DELETE"),
    ]


def test_a_derive_handler_may_follow_two_columns_of_one_table() -> None:
    on = Handlers()
    on.derive("transfers", by="source")(on.derive("transfers", by="target")(keys_handler))
    assert [s.lane_key for s in only(on).subscriptions] == [("source",), ("target",)]


@pytest.mark.parametrize(
    ("written", "parsed"),
    [
        ("orders", ("public", "orders")),
        ("shop.orders", ("shop", "orders")),
        ("public.MixedCase", ("public", "MixedCase")),
        ('"My Schema"."Odd.Name, table"', ("My Schema", "Odd.Name, table")),
        ('public."sel""ect"', ("public", 'sel"ect')),
    ],
)
def test_tables_are_named_as_the_catalogue_spells_them(written: str, parsed: tuple[str, str]) -> None:
    on = Handlers()
    on.insert(written)(change_handler)
    (subscription,) = only(on).subscriptions
    assert (subscription.schema, subscription.table) == parsed


@pytest.mark.parametrize(
    "written", ["", ".", "a.", ".a", "a.b.c", " orders", '"orders', "public. orders", None]
)
def test_what_names_no_table_is_a_problem(written: object) -> None:
    on = Handlers()
    decorate: Any = on.insert
    decorate(written)(change_handler)
    (problem,) = problems(on)
    assert "table" in problem


async def one_parameter(change: Change) -> None: ...


async def four_parameters(change: Change, session: AsyncSession, context: Context, more: int) -> None: ...


async def keyword_only(change: Change, *, session: AsyncSession) -> None: ...


async def star(*arguments: object) -> None: ...


def not_async(change: Change, session: AsyncSession) -> None: ...


def wrapped_by_a_plain_function(change: Change, session: AsyncSession) -> object:
    return change_handler(change, session)


BAD_FUNCTIONS: list[tuple[Any, str]] = [
    (one_parameter, "wrong signature, it must be: async def one_parameter(change, session)"),
    (four_parameters, "wrong signature"),
    (keyword_only, "wrong signature"),
    (star, "wrong signature"),
    (not_async, "must be a coroutine function: async def not_async(change, session)"),
    (functools.wraps(change_handler)(wrapped_by_a_plain_function), "must be a coroutine function"),
    (list_handler, "is given one change at a time: annotate Change, or ask for lists with batch="),
]


@pytest.mark.parametrize(("function", "said"), BAD_FUNCTIONS)
def test_functions_that_cannot_be_handlers(function: Callable[..., Any], said: str) -> None:
    on = Handlers()
    assert on.insert("orders")(function) is function
    (problem,) = problems(on)
    assert said in problem


def test_a_list_for_who_wants_one_change() -> None:
    on = Handlers()
    decorate: Any = on.insert("orders", batch=10)
    decorate(change_handler)
    assert "batch= gives the function a list: annotate list[Change]" in problems(on)[0]


def test_annotations_that_cannot_be_resolved_do_not_matter() -> None:
    on = Handlers()

    async def handler(change: "Nowhere", session: "AsyncSession") -> None:  # type: ignore[name-defined] # noqa: F821 - the point
        ...

    on.insert("orders")(handler)
    assert only(on).function is handler


BAD_OPTIONS: list[tuple[Anything, str]] = [
    ({"colums": ["a"]}, "unknown option colums= of @on.update; did you mean columns=?"),
    ({"by": "a"}, "unknown option by= of @on.update; known: after,"),
    ({"all_keys": None}, "unknown option all_keys= of @on.update"),
    ({"batch": 0}, "batch= must be a whole number from 1 on, not 0"),
    ({"batch": True}, "batch= must be a whole number"),
    ({"max_attempts": "3"}, "max_attempts= must be a whole number from 1 on, not '3'"),
    ({"backoff": -1}, "backoff= must be a number of seconds from 0 on"),
    ({"backoff_max": float("inf")}, "backoff_max= must be a number of seconds from 0 on"),
    ({"backoff": 5, "backoff_max": 1}, "backoff=5 is above backoff_max=1"),
    ({"timeout": 0}, "timeout= must be a number of seconds above 0"),
    ({"name": "two words"}, "name= must be 1 to 200 letters"),
    ({"name": ""}, "name= must be"),
    ({"role": ""}, "role= must be the name of a database role"),
    ({"role": "r", "claims": ["sub"]}, "claims= must be a mapping"),
    ({"claims": {"sub": "1"}}, "claims= needs role="),
    ({"columns": []}, "columns= must name columns, each once, not []"),
    ({"columns": ["a", "a"]}, "columns= must name columns, each once"),
    ({"lane_key": 3}, "lane_key= must name columns"),
    ({"filter": "status"}, 'filter "status": '),
    ({"filter": 3}, "filter= must be text"),
]


@pytest.mark.parametrize(("options", "said"), BAD_OPTIONS)
def test_bad_options(options: Anything, said: str) -> None:
    on = Handlers()
    decorate: Any = on.update
    function = list_handler if "batch" in options else change_handler
    decorate("orders", **options)(function)
    found = [problem for problem in problems(on) if said in problem]
    assert found
    assert all(problem.startswith(f"{__name__}:") for problem in found)


@pytest.mark.parametrize("types", [[], ["insert"], "UPSERT", 3])
def test_types_are_named_as_changes_have_them(types: object) -> None:
    on = Handlers()
    decorate: Any = on.change
    decorate("orders", types=types)(change_handler)
    assert "types= must name some of INSERT, UPDATE, DELETE, TRUNCATE" in problems(on)[0]


def test_claims_are_never_shown() -> None:
    on = Handlers()
    decorate: Any = on.insert
    decorate("orders", role="r", claims="a-token")(change_handler)
    assert "a-token" not in "\n".join(problems(on))


def test_decorators_that_do_not_fit_together() -> None:
    on = Handlers()
    stack: Any = on
    stack.derive("a")(stack.insert("a")(keys_handler))
    stack.insert("a", batch=5)(stack.update("a")(list_handler))
    stack.insert("a", lane_key="x")(stack.update("a", lane_key="y")(change_handler))
    stack.derive("a", by="x")(stack.derive("b", by=("x", "y"))(context_handler))
    stack.insert("a", timeout=1, name="one")(stack.update("a", timeout=2, name="two")(star))
    text = "\n".join(problems(on))
    assert "keys_handler: @on.derive cannot be stacked with other decorators" in text
    assert "list_handler: batch= must be on all of its decorators or on none" in text
    assert "change_handler: lane_key= differs between its decorators for public.a" in text
    assert "context_handler: by= names a different number of columns" in text
    assert "timeout= has different values on its decorators" in text
    assert "name= has different values on its decorators" in text


def test_all_problems_at_once_and_each_once() -> None:
    on = Handlers()
    decorate: Any = on.update
    decorate("a.b.c", colums=["x"], filter="nonsense", batch=-1, types=["INSERT"])(not_async)
    decorate("", columns=3)(one_parameter)
    found = problems(on)
    assert len(found) == len(set(found)) == 9
    assert sum("not_async" in problem.split(": ")[0] for problem in found) == 6


def test_a_sound_handler_is_not_hidden_by_another_ones_problem() -> None:
    on = Handlers()
    on.insert("orders")(change_handler)
    decorate: Any = on.insert
    decorate("orders", nonsense=1)(context_handler)
    handlers, found = on.collect()
    assert [handler.function for handler in handlers] == [change_handler]
    assert len(found) == 1


def test_the_decorator_without_its_table() -> None:
    on = Handlers()
    decorate: Any = on.insert
    decorate(change_handler)(change_handler)
    assert 'the first argument must name a table, as in @on.change("public.orders")' in problems(on)[0]


class Base(DeclarativeBase): ...


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)


async def typed(change: Change[Order], session: AsyncSession) -> None: ...
async def typed_list(changes: list[Change[Order]], session: AsyncSession) -> None: ...
async def typed_sequence(changes: Sequence[Change[Order]], session: AsyncSession) -> None: ...
async def of_anything(change: Change[Any], session: AsyncSession) -> None: ...
async def in_words(change: "Change[Order]", session: AsyncSession) -> None: ...


@pytest.mark.parametrize(
    ("function", "options", "model"),
    [
        (typed, {}, Order),
        (in_words, {}, Order),
        (typed_list, {"batch": 5}, Order),
        (typed_sequence, {"batch": 5}, Order),
        (of_anything, {}, None),
        (change_handler, {}, None),
    ],
)
def test_the_model_of_the_rows_is_annotated(
    function: Any, options: dict[str, Any], model: type[Any] | None
) -> None:
    on = Handlers()
    on.update("orders", **options)(function)
    assert on.handlers()[0].model is model


def unmapped(name: str) -> Any:
    async def function(change: Any, session: AsyncSession) -> None: ...

    function.__annotations__["change"] = name
    return function


@pytest.mark.parametrize(
    ("function", "options", "said"),
    [
        (typed, {"batch": 5}, "batch= gives the function a list"),
        (typed_list, {}, "is given one change at a time"),
        (unmapped("Change[int]"), {}, "annotates Change[int], which is no class mapped by SQLAlchemy"),
        (unmapped("Change[OnlyForCheckers]"), {}, "import the model outside of `if TYPE_CHECKING:`"),
    ],
)
def test_models_that_cannot_be(function: Any, options: dict[str, Any], said: str) -> None:
    on = Handlers()
    on.update("orders", **options)(function)
    (problem,) = problems(on)
    assert said in problem


def test_tables_followed_for_the_cache_are_derive_handlers() -> None:
    on = Handlers()
    on.caches("shop.Odd Name")
    on.caches("orders")
    odd, orders = on.handlers()
    assert (odd.name, orders.name) == ("cache:shop.Odd-Name", "cache:public.orders")
    assert (orders.kind, orders.wants_context, orders.subscriptions[0].lane_key) == ("derive", True, None)
    assert cached_tables([odd.function, orders.function, typed]) == {
        ("shop", "Odd Name"),
        ("public", "orders"),
    }


def test_what_names_no_table_is_followed_by_nobody() -> None:
    on = Handlers()
    on.caches("a.b.c")
    (problem,) = problems(on)
    assert '"a.b.c" names no table' in problem
