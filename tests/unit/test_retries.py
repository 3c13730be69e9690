"""What a failure means: one table, from the top."""

import asyncio

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.exc import IntegrityError

from worker import GiveUp, RetryLater
from worker.errors import RedisLost, SessionMisuse
from worker.retries import RULES, Allowance, Backoff, Policy, classify

POLICY = Policy(Backoff(1.0, 600.0, lambda: 1.0), max_attempts=3)


def of_statement(error: asyncpg.PostgresError) -> IntegrityError:
    """Wrap it as SQLAlchemy does."""
    return IntegrityError("insert", {}, error)


def test_the_last_attempt_is_the_one_after_which_it_is_given_up() -> None:
    delays = [failure.delay for n in range(1, 5) if (failure := classify(ValueError("no"), n, POLICY))]
    assert delays == [1.0, 2.0, None, None]


@pytest.mark.parametrize(
    "error",
    [
        asyncpg.SerializationError("x"),
        asyncpg.DeadlockDetectedError("x"),
        asyncpg.InterfaceError("x"),
        RedisLost("x"),
    ],
)
def test_for_trouble_of_the_infrastructure_nobody_is_to_blame(error: Exception) -> None:
    assert classify(error, 100, POLICY) is None


def test_who_gives_up_is_not_asked_again_and_who_wants_to_be_called_later_is_for_ever() -> None:
    given_up, later = classify(GiveUp("no"), 1, POLICY), classify(RetryLater(7), 100, POLICY)
    assert given_up is not None
    assert later is not None
    assert (given_up.delay, given_up.counts) == (None, True)
    assert (later.delay, later.counts) == (7, False)


def test_constraints_and_types_are_given_up_at_once_where_the_setting_says_so() -> None:
    unique = of_statement(asyncpg.UniqueViolationError("x"))
    strict = POLICY._replace(give_up_on=frozenset({"integrity"}))
    for error, policy, gives_up in (
        (unique, POLICY, False),
        (unique, strict, True),
        (TypeError("x"), strict, False),
        (TypeError("x"), POLICY._replace(give_up_on=frozenset({"type"})), True),
    ):
        failure = classify(error, 1, policy)
        assert failure is not None
        assert (failure.delay is None) is gives_up


def test_a_dead_letter_halts_where_the_policy_says_so_and_a_retry_holds_back_anyway() -> None:
    halting = POLICY._replace(halts=True)
    for error, policy, holds_back in (
        (GiveUp("no"), halting, True),
        (GiveUp("no"), POLICY, False),
        (ValueError("no"), POLICY, True),
    ):
        failure = classify(error, 1, policy)
        assert failure is not None
        assert failure.holds_back is holds_back


@pytest.mark.parametrize(
    "error", [ValueError("x"), asyncio.CancelledError(), SessionMisuse("x"), KeyError("x")]
)
def test_every_failure_has_a_hint_for_the_operator(error: BaseException) -> None:
    failure = classify(error, 1, POLICY)
    assert failure is not None
    assert failure.hint.endswith(".")


def test_every_rule_says_what_to_do() -> None:
    assert all(rule.hint for rule in RULES)


@given(st.floats(0.1, 500), st.lists(st.floats(0, 3), min_size=1, max_size=60))
def test_retries_come_no_faster_than_allowed(rate: float, pauses: list[float]) -> None:
    now = 0.0
    allowance = Allowance(rate, lambda: now)
    taken = 0
    for pause in pauses:
        now += pause
        while allowance.take():
            taken += 1
    assert taken <= max(1.0, rate) + now * rate + 1e-6
    assert taken >= 1
