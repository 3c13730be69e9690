"""What type checkers must refuse. An `ignore` that has nothing to ignore is an error itself. Never run."""
# pyright: reportUnnecessaryTypeIgnoreComment=true, reportUntypedFunctionDecorator=false

from sqlalchemy.ext.asyncio import AsyncSession

from worker import Change, Context, Handlers

on = Handlers()


@on.derive("orders", by="customer_id")  # pyright: ignore[reportArgumentType]
async def one_key(customer_id: int, session: AsyncSession) -> None: ...


@on.derive("orders")  # pyright: ignore[reportArgumentType]
async def no_session(keys: list[int]) -> None: ...


@on.insert("orders")  # pyright: ignore[reportArgumentType]
async def a_list_without_batch(changes: list[Change], session: AsyncSession) -> None: ...


@on.insert("orders", batch=10)  # pyright: ignore[reportArgumentType]
async def one_change_with_batch(change: Change, session: AsyncSession) -> None: ...


@on.change("orders")  # pyright: ignore[reportArgumentType]
def not_async(change: Change, session: AsyncSession) -> None: ...


@on.change("orders")  # pyright: ignore[reportArgumentType]
async def too_many(change: Change, session: AsyncSession, context: Context, more: int) -> None: ...


@on.change("orders")  # pyright: ignore[reportArgumentType]
async def returns_something(change: Change, session: AsyncSession) -> int: ...


@on.insert("orders")  # pyright: ignore[reportArgumentType]
@on.update("orders", batch=10)
async def stacked_one_and_many(changes: list[Change], session: AsyncSession) -> None: ...


@on.update("orders", colums=["status"])  # pyright: ignore[reportCallIssue]
async def unknown_option(change: Change, session: AsyncSession) -> None: ...


@on.insert("orders", columns=["status"])  # pyright: ignore[reportCallIssue]
async def an_insert_changes_no_column(change: Change, session: AsyncSession) -> None: ...


@on.derive("orders", lane_key="id")  # pyright: ignore[reportCallIssue]
async def derive_has_by(keys: list[int], session: AsyncSession) -> None: ...


@on.change("orders", types=["UPSERT"])  # pyright: ignore[reportArgumentType]
async def unknown_type(change: Change, session: AsyncSession) -> None: ...


@on.change("orders", max_attempts="3")  # pyright: ignore[reportArgumentType]
async def text_for_a_number(change: Change, session: AsyncSession) -> None: ...


@on.insert  # pyright: ignore[reportArgumentType]
async def without_a_table(change: Change, session: AsyncSession) -> None: ...


@on.update("orders", batch=10)  # pyright: ignore[reportArgumentType]
async def one_typed_change_with_batch(change: Change[int], session: AsyncSession) -> None: ...
