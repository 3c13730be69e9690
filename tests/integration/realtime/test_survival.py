"""The source goes on whatever Realtime and the network do, and says what may have been lost."""

import asyncio
from contextlib import aclosing
from datetime import UTC, datetime

import pytest

from tests.integration.realtime.phoenix import ITEMS, ORDERS, Phoenix, Start
from worker.realtime import Buffer


async def test_changes_come_in_order_and_with_every_digit(phoenix: Phoenix, start: Start) -> None:
    text = (
        '{"table":"orders","type":"UPDATE",'
        '"record":{"id": 1, "price": 12345678901234567890.1234567890,"n":12.50},'
        '"columns":[],"errors":null,"schema":"public","commit_timestamp":"2026-11-20T11:00:20.752Z"}'
    )
    async with start() as reading:
        await reading.ready()
        phoenix.raw(ORDERS, text)
        for number in range(2, 500):
            phoenix.change((ORDERS, ITEMS)[number % 2], number)
        await reading.until(lambda: len(reading.items) == 499)
    assert reading.numbers == list(range(1, 500))
    first = reading.items[0]
    assert first.payload == text.encode()
    assert bytes(first.record["price"]) == b"12345678901234567890.1234567890"
    assert bytes(first.record["n"]) == b"12.50"


async def test_one_connection_and_a_channel_for_each_table(phoenix: Phoenix, start: Start) -> None:
    async with start() as reading:
        await reading.ready()
        assert phoenix.connections == 1
        bound = sorted(channel.tables for channel in phoenix.channels.values())
    assert bound == [[ITEMS], [ORDERS], [("tailrace", "canary")]]
    assert reading.gaps == []  # what was before the first subscription is not this source's to say


@pytest.mark.parametrize("code", [1000, 1001, 1012, 1006])
async def test_a_closed_connection_is_replaced_and_the_time_between_is_a_gap(
    phoenix: Phoenix, start: Start, code: int
) -> None:
    async with start() as reading:
        await reading.ready()
        phoenix.change(ORDERS, 1)
        await reading.until(lambda: reading.numbers == [1])
        before = datetime.now(UTC)
        if code == 1006:
            phoenix.sockets[0].transport.abort()
        else:
            await phoenix.sockets[0].close(code)
        await reading.until(lambda: {t for gap in reading.gaps for t in gap.tables} == {ORDERS, ITEMS})
        phoenix.change(ORDERS, 2)
        await reading.until(lambda: reading.numbers == [1, 2])
    assert reading.items[-1] is not reading.gaps[-1]
    for gap in reading.gaps:
        assert gap.since is not None
        assert gap.since <= before <= gap.until
        assert str(code) in gap.cause


async def test_it_never_gives_up_and_speaks_once(
    phoenix: Phoenix, start: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    async with start() as reading:
        await reading.ready()
        phoenix.refuse, phoenix.refusal = 503, ""
        await phoenix.sockets[0].close(1012)
        await phoenix.until(lambda: len(phoenix.handshakes) > 30)
        health = reading.source.health()
        assert not health.ready
        assert not health.connected
        assert "503" in health.reasons[0]
        phoenix.refuse = None
        await reading.ready()
    output = "".join(capfd.readouterr())
    assert output.count("503") == 1


async def test_a_server_that_is_away_for_long_and_comes_back(phoenix: Phoenix, start: Start) -> None:
    async with start() as reading:
        await reading.ready()
        await phoenix.stop()
        health = await reading.healthy(lambda health: "cannot be reached" in health.reasons[0])
        assert "SUPABASE_URL" in health.reasons[0]
        await phoenix.start()
        await reading.ready()
        phoenix.change(ORDERS, 7)
        await reading.until(lambda: reading.numbers == [7])


async def test_a_server_that_is_not_there_at_start(phoenix: Phoenix, start: Start) -> None:
    url = phoenix.url
    await phoenix.stop()
    async with start(url=url) as reading:
        await reading.healthy(lambda health: "cannot be reached" in health.reasons[0])
        await phoenix.start()
        await reading.ready()
    assert reading.gaps == []


async def test_a_half_open_socket_is_replaced(phoenix: Phoenix, start: Start) -> None:
    async with start(heartbeat_reply=0.3, canary=30.0) as reading:
        await reading.ready()
        phoenix.frozen = True
        await phoenix.until(lambda: phoenix.connections == 2)
        phoenix.frozen = False
        phoenix.changed()
        await reading.ready()
        await reading.until(lambda: reading.gaps)
    assert "heartbeat" in reading.gaps[0].cause


async def test_a_silent_subscription_is_found_and_replaced(phoenix: Phoenix, start: Start) -> None:
    async with start(canary=0.4) as reading:
        await reading.ready()
        phoenix.silent = True
        silent_since = datetime.now(UTC)
        await phoenix.until(lambda: phoenix.connections == 2)
        assert phoenix.heartbeats > 0
        phoenix.silent = False
        await reading.ready()
        await reading.until(lambda: {t for gap in reading.gaps for t in gap.tables} == {ORDERS, ITEMS})
    gap = reading.gaps[0]
    assert "silent" in gap.cause
    assert gap.since is not None
    assert gap.since <= silent_since < gap.until


async def test_a_server_that_stays_silent_is_asked_ever_more_rarely_and_reported_once(
    phoenix: Phoenix, start: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    phoenix.silent = True
    async with start(canary=0.1) as reading:
        await phoenix.until(lambda: phoenix.connections >= 4)
        assert any("canary" in reason for reason in reading.source.health().reasons) or (
            "silent" in reading.source.health().reasons[0]
        )
        phoenix.silent = False
        await reading.ready()
    assert "".join(capfd.readouterr()).count("no connection to Realtime") == 1


async def test_joined_but_not_subscribed_is_joined_again(phoenix: Phoenix, start: Start) -> None:
    phoenix.acknowledge = False
    async with start() as reading:
        await phoenix.until(lambda: len(phoenix.joins) == 3)
        health = await reading.healthy(lambda health: health.connected)
        assert not health.subscribed
        assert not health.ready
        await phoenix.until(lambda: len(phoenix.joins) > 3)
        phoenix.acknowledge = True
        await reading.ready()
    assert phoenix.connections == 1


async def test_a_system_error_fails_its_channel_only_and_the_late_close_of_the_old_join_does_no_harm(
    phoenix: Phoenix, start: Start
) -> None:
    async with start() as reading:
        await reading.ready()
        joins = len(phoenix.joins)
        # The server closes the older join of the same topic after it has answered the new one.
        phoenix.system(phoenix.channel_of(ORDERS), "Unable to subscribe to changes: something is amiss")
        phoenix.change(ITEMS, 1)
        await reading.until(lambda: reading.gaps)
        phoenix.change(ORDERS, 2)
        await reading.until(lambda: reading.numbers == [1, 2])
        await reading.ready()
        assert len(phoenix.joins) == joins + 1
    assert phoenix.connections == 1
    assert [gap.tables for gap in reading.gaps] == [(ORDERS,)]
    assert "something is amiss" in reading.gaps[0].cause


@pytest.mark.parametrize("event", ["phx_close", "phx_error"])
async def test_a_channel_that_ends_is_joined_again(phoenix: Phoenix, start: Start, event: str) -> None:
    async with start() as reading:
        await reading.ready()
        phoenix.end(phoenix.channel_of(ITEMS), event)
        await reading.until(lambda: reading.gaps)
        await reading.ready()
    assert phoenix.connections == 1
    assert [gap.tables for gap in reading.gaps] == [(ITEMS,)]


async def test_losing_the_canarys_channel_means_a_new_connection(phoenix: Phoenix, start: Start) -> None:
    # Joining it alone could start Realtime's poller anew, which forgets the other subscriptions in silence.
    async with start() as reading:
        await reading.ready()
        phoenix.end(phoenix.channel_of(("tailrace", "canary")))
        await reading.until(lambda: {t for gap in reading.gaps for t in gap.tables} == {ORDERS, ITEMS})
    assert phoenix.connections == 2


async def test_an_expired_token_means_a_new_connection(phoenix: Phoenix, start: Start) -> None:
    async with start() as reading:
        await reading.ready()
        channel = phoenix.channel_of(ORDERS)
        phoenix.system(channel, "Token has expired 0 seconds ago", "system")
        phoenix.end(channel)
        await phoenix.until(lambda: phoenix.connections == 2)
        await reading.ready()
    assert "Token has expired" in reading.gaps[0].cause


async def test_a_server_that_asks_to_disconnect_with_status_ok(phoenix: Phoenix, start: Start) -> None:
    async with start() as reading:
        await reading.ready()
        channel = phoenix.channel_of(ORDERS)
        payload = {"message": "Server requested disconnect", "status": "ok", "extension": "system"}
        phoenix.frame(channel.socket, channel.topic, "system", payload)
        await phoenix.until(lambda: phoenix.connections == 2)
        await reading.ready()


async def test_a_connection_is_renewed_before_its_token_expires(phoenix: Phoenix, start: Start) -> None:
    async with start(renew=0.5) as reading:
        await phoenix.until(lambda: phoenix.connections >= 2)
        await reading.until(lambda: reading.gaps)
    assert "renewed" in reading.gaps[0].cause


async def test_a_second_subscribed_frame_is_a_gap_of_its_tables(phoenix: Phoenix, start: Start) -> None:
    async with start() as reading:
        await reading.ready()
        phoenix.system(phoenix.channel_of(ITEMS))
        await reading.until(lambda: reading.gaps)
        phoenix.change(ITEMS, 3)
        await reading.until(lambda: reading.numbers == [3])
    assert phoenix.connections == 1
    assert [gap.tables for gap in reading.gaps] == [(ITEMS,)]


async def test_a_canary_that_was_dropped_tells_of_dropped_changes(phoenix: Phoenix, start: Start) -> None:
    async with start(canary=30.0) as reading:
        await reading.ready()
        phoenix.drop_canaries = 1
        await reading.until(lambda: reading.gaps)
    assert phoenix.connections == 1
    assert set(reading.gaps[0].tables) == {ORDERS, ITEMS}
    assert "dropped" in reading.gaps[0].cause


async def test_a_database_that_was_away_is_a_possible_gap(phoenix: Phoenix, start: Start) -> None:
    async with start() as reading:
        await reading.ready()
        phoenix.canary_fails = ConnectionError("postgresql://user:secret@host")
        health = await reading.healthy(lambda health: not health.ready)
        assert "canary row cannot be written (ConnectionError)" in health.reasons[0]
        assert "secret" not in str(health)
        phoenix.canary_fails = None
        await reading.until(lambda: reading.gaps)
        await reading.ready()
    assert phoenix.connections == 1
    assert set(reading.gaps[0].tables) == {ORDERS, ITEMS}


async def test_a_doubt_from_outside_is_a_gap_up_to_the_next_canary(phoenix: Phoenix, start: Start) -> None:
    async with start() as reading:
        await reading.ready()
        reading.source.doubt("Realtime's slot has another backend")
        await reading.until(lambda: reading.gaps)
    assert phoenix.connections == 1
    assert set(reading.gaps[0].tables) == {ORDERS, ITEMS}
    assert reading.gaps[0].cause == "Realtime's slot has another backend"


async def test_a_consumer_that_raises_ends_it_cleanly_and_can_read_on(phoenix: Phoenix, start: Start) -> None:
    async with start() as reading:
        await reading.ready()
        source = reading.source
        with pytest.raises(RuntimeError, match="one reader"):
            async for _ in source.read():
                pass
    await phoenix.until(lambda: not phoenix.sockets)
    assert source.health().reasons == ("Realtime is not being read",)

    async def consume() -> None:
        async with aclosing(source.read()) as batches:
            async for batch in batches:
                raise LookupError(batch[0].cause)

    consuming = asyncio.create_task(consume())
    with pytest.raises(LookupError, match="reading was stopped"):
        async with asyncio.timeout(10):
            await consuming
    await phoenix.until(lambda: not phoenix.sockets)


async def test_a_slow_consumer_holds_up_the_socket_and_loses_nothing(phoenix: Phoenix, start: Start) -> None:
    buffer = Buffer(changes=10, size=1 << 30, batch=5)
    async with start(buffer=buffer, heartbeat=0.1, heartbeat_reply=1.0, canary=1.0) as reading:
        await reading.ready()
        reading.taking.clear()
        for number in range(400):
            phoenix.change(ORDERS, number, old_record={"filler": "x" * 100_000})
        await reading.until(lambda: reading.items)
        # Longer than every deadline for signs of life; heartbeats go on, and count the time.
        beats = phoenix.heartbeats
        await phoenix.until(lambda: phoenix.heartbeats > beats + 20)
        assert len(reading.items) < 100
        reading.taking.set()
        await reading.until(lambda: len(reading.numbers) == 400)
        assert phoenix.connections == 1
    assert reading.numbers == list(range(400))
    assert reading.gaps == []
