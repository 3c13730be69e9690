"""The pure parts of the Realtime source: channels, continuity, canaries, buffer; time is a number here."""

import math
from datetime import UTC, datetime, timedelta

import pytest

from worker.change import RawChange
from worker.realtime.buffer import Buffer
from worker.realtime.canary import Canary, Written
from worker.realtime.continuity import Continuity
from worker.realtime.frames import ChannelEnded, Reply, SystemNotice
from worker.realtime.subscription import (
    CHANNEL_LIMIT,
    MOST_CHANNELS,
    Lost,
    Replace,
    Stage,
    Subscribed,
    Subscriptions,
    cut,
)
from worker.realtime.timing import Timing, backoff
from worker.source import Gap

A, B, CANARY = ("public", "a"), ("public", "b"), ("tailrace", "canary")
START = datetime(2026, 1, 1, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def subscribed(tables: list[tuple[str, str]], timing: Timing = Timing()) -> Subscriptions:  # noqa: B008 - frozen
    subscriptions = Subscriptions(tables, CANARY, timing)
    subscriptions.begin(0.0)
    joins, outcomes = subscriptions.tick(100.0)
    assert outcomes == []
    for join in joins:
        assert subscriptions.frame(Reply(join.topic, join.ref, ok=True, reason=""), 100.0) == []
        assert not subscriptions.complete
        (outcome,) = subscriptions.frame(ok(join.topic), 100.0)
        assert outcome == Subscribed(join.tables, again=False)
    return subscriptions


def ok(topic: str) -> SystemNotice:
    return SystemNotice(topic, "postgres_changes", ok=True, message="Subscribed to PostgreSQL")


def error(topic: str, message: str) -> SystemNotice:
    return SystemNotice(topic, "postgres_changes", ok=False, message=message)


@pytest.mark.parametrize("number", [0, 1, 89, 90, 91, 180, 500])
def test_tables_are_shared_out_evenly(number: int) -> None:
    tables = [("public", f"t{n}") for n in range(number)]
    groups = cut([*tables, *tables])
    assert len(groups) == min(number, MOST_CHANNELS)
    assert sorted(table for group in groups for table in group) == sorted(tables)
    sizes = {len(group) for group in groups}
    assert not sizes or max(sizes) - min(sizes) <= 1


def test_joins_are_spaced() -> None:
    subscriptions = Subscriptions([A, B], CANARY, Timing(join_spacing=1.0))
    subscriptions.begin(10.0)
    assert [len(subscriptions.tick(now)[0]) for now in (10.0, 10.5, 11.0, 12.0)] == [1, 0, 1, 1]


def test_nothing_is_joined_without_a_socket() -> None:
    subscriptions = subscribed([A])
    subscriptions.end()
    assert not subscriptions.complete
    assert subscriptions.next_due() == math.inf
    assert subscriptions.tick(1e9) == ([], [])


def test_an_acknowledgement_of_an_older_join_does_not_count() -> None:
    subscriptions = Subscriptions([A], CANARY, Timing())
    subscriptions.begin(0.0)
    topic = subscriptions.channels[0].topic
    assert subscriptions.frame(ok(topic), 0.0) == []
    subscriptions.tick(1.0)
    assert subscriptions.frame(ok(topic), 1.0) == []
    assert subscriptions.frame(Reply(topic, "no such ref", ok=True, reason=""), 1.0) == []
    assert subscriptions.channels[0].stage is Stage.JOINING


def test_the_late_close_of_an_older_join_is_ignored() -> None:
    subscriptions = subscribed([A])
    channel = subscriptions.channels[0]
    assert subscriptions.frame(ChannelEnded(channel.topic, "0", crashed=False), 101.0) == []
    assert channel.stage is Stage.SUBSCRIBED
    (outcome,) = subscriptions.frame(ChannelEnded(channel.topic, channel.join_ref, crashed=False), 101.0)
    assert isinstance(outcome, Lost)


def test_every_join_that_leads_nowhere_is_made_again() -> None:
    timing = Timing()
    subscriptions = Subscriptions([A], CANARY, timing)
    subscriptions.begin(0.0)
    now, seen = 0.0, set()
    for _ in range(50):
        now = subscriptions.next_due()
        joins, outcomes = subscriptions.tick(now)
        assert outcomes == []
        for join in joins:
            assert join.ref not in seen
            seen.add(join.ref)
    assert len(seen) >= 20
    assert subscriptions.channels[0].due - now <= timing.rejoin_max + timing.join


def test_what_the_server_tries_again_itself_is_waited_for() -> None:
    subscriptions = subscribed([A])
    channel = subscriptions.channels[0]
    (outcome,) = subscriptions.frame(error(channel.topic, "Too many database timeouts, retrying"), 101.0)
    assert isinstance(outcome, Lost)
    assert channel.stage is Stage.JOINED
    assert subscriptions.frame(ok(channel.topic), 105.0) == [Subscribed((A,), again=False)]


def test_a_canary_that_fails_takes_the_socket_along() -> None:
    subscriptions = subscribed([A])
    (outcome,) = subscriptions.frame(error(subscriptions.canary.topic, "anything"), 101.0)
    assert isinstance(outcome, Replace)


def test_isolation_ends_with_the_bad_table_alone_though_nobody_names_it() -> None:
    tables = [("public", f"t{n}") for n in range(MOST_CHANNELS * 4)]
    bad = tables[7]
    subscriptions = Subscriptions(tables, CANARY, Timing())
    subscriptions.begin(0.0)
    now = 0.0
    for _ in range(400):
        now = max(now, subscriptions.next_due())
        for join in subscriptions.tick(now)[0]:
            subscriptions.frame(Reply(join.topic, join.ref, ok=True, reason=""), now)
            answer = error(join.topic, "who knows why") if bad in join.tables else ok(join.topic)
            subscriptions.frame(answer, now)
    failing = [channel for channel in subscriptions.channels if channel.stage is not Stage.SUBSCRIBED]
    assert [channel.tables for channel in failing] == [(bad,)]
    assert len(subscriptions.channels) < CHANNEL_LIMIT
    assert sorted(t for channel in subscriptions.channels for t in channel.tables) == sorted(tables)


def test_isolation_stops_at_the_limit_of_channels() -> None:
    tables = [("public", f"t{n}") for n in range(MOST_CHANNELS * 4)]
    subscriptions = Subscriptions(tables, CANARY, Timing())
    subscriptions.begin(0.0)
    for now in range(0, 4000, 40):
        for join in subscriptions.tick(float(now))[0]:
            subscriptions.frame(Reply(join.topic, join.ref, ok=True, reason=""), float(now))
            if join.topic != subscriptions.canary.topic:
                subscriptions.frame(error(join.topic, "who knows why"), float(now))
    assert len(subscriptions.channels) + 1 <= CHANNEL_LIMIT
    assert sorted(t for channel in subscriptions.channels for t in channel.tables) == sorted(tables)


def test_a_gap_runs_from_the_last_proof_to_the_new_subscription() -> None:
    continuity = Continuity([A, B])
    assert continuity.subscribed([A], at(1)) == []
    assert continuity.subscribed_since is None
    assert continuity.sure_until is None
    assert continuity.subscribed([B], at(2)) == []
    assert continuity.subscribed_since == at(2)
    continuity.prove(at(10))
    assert continuity.sure_until == at(10)
    continuity.lost([A, B], "first")
    continuity.lost([A, B], "second")
    continuity.prove(at(20))
    assert continuity.sure_until == at(10)
    assert continuity.subscribed([A], at(30)) == [Gap(at(10), at(30), "first", (A,))]
    assert continuity.subscribed_since is None
    assert continuity.subscribed([B], at(31)) == [Gap(at(10), at(31), "first", (B,))]
    assert continuity.subscribed_since == at(31)
    assert continuity.first_subscribed == {A: at(1), B: at(2)}


def test_a_proof_from_before_the_subscription_proves_nothing_for_it() -> None:
    continuity = Continuity([A])
    continuity.prove(at(5))
    continuity.subscribed([A], at(10))
    assert continuity.doubtful([A, CANARY], at(12), "why") == [Gap(at(10), at(12), "why", (A,))]


def test_what_is_not_live_is_not_doubtful_twice() -> None:
    continuity = Continuity([A, B])
    continuity.subscribed([A, B], at(1))
    continuity.lost([B], "gone")
    assert continuity.doubtful([A, B], at(3), "why") == [Gap(at(1), at(3), "why", (A,))]


def test_a_canary_comes_back() -> None:
    canary = Canary()
    assert canary.written("one", Written(1.0, at(1))) is None
    assert canary.waiting(4.0, 0.0) == 3.0
    assert canary.waiting(4.0, 3.5) == 0.5
    returned = canary.seen("one", 5.0)
    assert returned is not None
    assert returned == (at(1), False)
    assert canary.waiting(9.0, 0.0) == 0.0
    assert canary.seen("one", 5.0) is None


def test_a_canary_may_be_faster_than_its_statement() -> None:
    canary = Canary()
    assert canary.seen("one", 5.0) is None
    assert canary.written("one", Written(1.0, at(1))) == (at(1), False)
    assert canary.waiting(9.0, 0.0) == 0.0


def test_an_overtaken_canary_tells_of_a_loss() -> None:
    canary = Canary()
    for number in range(3):
        canary.written(str(number), Written(float(number), at(number)))
    assert canary.seen("1", 5.0) == (at(1), True)
    assert canary.seen("2", 5.0) == (at(2), False)


def test_a_new_socket_owes_nothing() -> None:
    canary = Canary()
    canary.written("one", Written(1.0, at(1)))
    canary.reset()
    assert canary.waiting(99.0, 0.0) == 0.0
    assert canary.seen("one", 5.0) is None
    assert canary.last is None


def raw(number: int, size: int = 0) -> RawChange:
    record = f'{{"id":{number},"x":"{"x" * size}"}}'
    data = f'{{"schema":"s","table":"t","type":"INSERT","columns":[],"record":{record}}}'
    return RawChange.decode("realtime", data.encode())


async def test_the_buffer_is_bounded_by_number_and_by_bytes() -> None:
    buffer = Buffer(changes=3, size=10_000, batch=2)
    changes = [raw(n) for n in range(3)]
    for change in changes:
        assert not buffer.full
        buffer.put(change)
    assert buffer.full
    gap = Gap(None, at(1), "why", (A,))
    buffer.put_gap(gap)
    assert buffer.take() == changes[:2]
    assert not buffer.full
    assert buffer.take() == [changes[2], gap]
    assert buffer.take() == []
    buffer.put(raw(9, size=20_000))
    assert buffer.full
    assert len(buffer.take()) == 1
    assert not buffer.full


async def test_neighbouring_gaps_of_one_cause_are_one() -> None:
    buffer = Buffer()
    buffer.put_gap(Gap(at(1), at(5), "why", (A,)))
    buffer.put_gap(Gap(at(1), at(6), "why", (B, A)))
    buffer.put_gap(Gap(at(2), at(6), "why", (B,)))
    assert buffer.take() == [Gap(at(1), at(6), "why", (A, B)), Gap(at(2), at(6), "why", (B,))]


def test_backoff_grows_to_its_bound_and_is_never_nothing() -> None:
    for failures in range(1, 5000):
        wait = backoff(0.5, 30.0, failures)
        bound = min(30.0, 0.5 * 2 ** min(failures - 1, 20))
        assert bound / 2 <= wait <= bound
