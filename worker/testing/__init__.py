"""For tests of handlers: writes, factories, and what the fixtures of `pytest_tailrace` give.

    from worker.testing import insert

    async def test_totals(deliver):
        await deliver(insert("orders", customer_id=7, amount=10))
        assert await deliver.session.scalar(select(CustomerTotal.amount)) == 10

Not part of production: nothing else of `worker` imports it.
"""

from worker.testing.delivering import Deliver
from worker.testing.factories import Factory, factory
from worker.testing.pipeline import NotSettledError, Pipeline
from worker.testing.stack import Database, Stack
from worker.testing.writes import Write, delete, insert, update

__all__ = [
    "Database",
    "Deliver",
    "Factory",
    "NotSettledError",
    "Pipeline",
    "Stack",
    "Write",
    "delete",
    "factory",
    "insert",
    "update",
]
