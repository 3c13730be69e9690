"""What Realtime refuses, withholds or garbles is said in words with the remedy, and ends nothing."""

import json
from dataclasses import asdict
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.integration.realtime.phoenix import ITEMS, KEY, ORDERS, Phoenix, Start, change_text
from worker.realtime.timing import Timing

CANARY = ("tailrace", "canary")


@pytest.mark.parametrize(
    ("status", "said", "advice"),
    [
        (401, "401 Failed to validate JWT signature", "check SUPABASE_SERVICE_ROLE_KEY"),
        (403, "refuses the key (403", "check SUPABASE_SERVICE_ROLE_KEY"),
        (404, "there is no Realtime at ws://127.0.0.1", "check SUPABASE_URL"),
        (429, "has no room (429", "waiting"),
        (500, "in trouble (500", "waiting"),
    ],
)
async def test_a_refused_handshake(
    phoenix: Phoenix,
    start: Start,
    capfd: pytest.CaptureFixture[str],
    status: int,
    said: str,
    advice: str,
) -> None:
    phoenix.refuse = status
    phoenix.refusal = json.dumps({"error": f"Failed to validate JWT signature {KEY}"})
    async with start() as reading:
        await phoenix.until(lambda: len(phoenix.handshakes) > 3)
        health = await reading.healthy(lambda health: str(status) in health.reasons[0])
        assert said in health.reasons[0]
        assert advice in health.reasons[0]
        assert not health.ready
        phoenix.refuse = None
        await reading.ready()
    output = "".join(capfd.readouterr())
    assert KEY not in output
    assert KEY not in str(health)
    assert output.count(str(status)) == 1


async def test_a_redirect_is_not_followed(phoenix: Phoenix, start: Start) -> None:
    phoenix.refuse, phoenix.location = 302, f"{phoenix.url}/elsewhere"
    async with start() as reading:
        health = await reading.healthy(lambda health: "302" in health.reasons[0])
    assert "REALTIME_URL" in health.reasons[0]
    assert not any("elsewhere" in path for path in phoenix.handshakes)


async def test_a_legacy_key_goes_into_address_and_joins(phoenix: Phoenix, start: Start) -> None:
    async with start() as reading:
        await reading.ready()
    address = urlsplit(phoenix.handshakes[0])
    assert address.path == "/realtime/v1/websocket"
    assert parse_qs(address.query) == {"apikey": [KEY], "vsn": ["1.0.0"]}
    assert {join["payload"]["access_token"] for join in phoenix.joins} == {KEY}


async def test_a_new_secret_key_goes_into_the_address_only(phoenix: Phoenix, start: Start) -> None:
    async with start(key="sb_secret_abc") as reading:
        await reading.ready()
    assert parse_qs(urlsplit(phoenix.handshakes[0]).query)["apikey"] == ["sb_secret_abc"]
    assert not any("access_token" in join["payload"] for join in phoenix.joins)


async def test_the_join_is_what_recorded_clients_send(phoenix: Phoenix, start: Start) -> None:
    async with start(key="sb_secret_abc") as reading:
        await reading.ready()
    join = next(
        join
        for join in phoenix.joins
        if join["payload"]["config"]["postgres_changes"][0]["table"] == "orders"
    )
    assert join["ref"] == join["join_ref"]
    assert join["topic"].startswith("realtime:")
    assert join["payload"] == {
        "config": {
            "broadcast": {"ack": False, "self": False},
            "presence": {"key": "", "enabled": False},
            "private": False,
            "postgres_changes": [{"event": "*", "schema": "public", "table": "orders"}],
        }
    }


@pytest.mark.parametrize(
    "reason",
    [
        "ChannelRateLimitReached: Too many channels",
        "ClientJoinRateLimitReached: Too many joins per second",
        "UnableToConnectToProject: Realtime was unable to connect to the project database",
        "Unauthorized: You do not have permissions to read from this Channel topic",
    ],
)
async def test_refused_joins_are_tried_again(phoenix: Phoenix, start: Start, reason: str) -> None:
    phoenix.join_error = reason
    async with start() as reading:
        await phoenix.until(lambda: len(phoenix.joins) > 5)
        health = reading.source.health()
        assert health.connected
        assert not health.subscribed
        assert any(reason in each for each in health.reasons)
        phoenix.join_error = None
        await reading.ready()
    assert phoenix.connections == 1


async def test_a_join_with_an_expired_token_means_a_new_connection(phoenix: Phoenix, start: Start) -> None:
    phoenix.join_error = "InvalidJWTToken: Token has expired 15 seconds ago"
    async with start() as reading:
        await phoenix.until(lambda: phoenix.connections > 2)
        phoenix.join_error = None
        await reading.ready()


async def test_a_table_outside_the_publication_silences_no_other(phoenix: Phoenix, start: Start) -> None:
    phoenix.bad = {ITEMS}
    async with start() as reading:
        health = await reading.healthy(lambda h: any("publication" in reason for reason in h.reasons))
        assert any(
            'alter publication supabase_realtime add table "public"."items"' in r for r in health.reasons
        )
        assert not health.ready
        await reading.healthy(lambda health: health.canary_seconds is not None)
        phoenix.change(ORDERS, 1)
        await reading.until(lambda: reading.numbers == [1])
        assert set(reading.source.first_subscribed) == {ORDERS}
        assert reading.source.subscribed_since is None
        phoenix.bad = set()
        await reading.ready()
        assert reading.source.subscribed_since is not None
    assert phoenix.connections == 1
    assert reading.gaps == []


async def test_above_ninety_tables_the_bad_one_is_isolated(phoenix: Phoenix, start: Start) -> None:
    tables = [("public", f"t{number}") for number in range(200)]
    phoenix.bad = {tables[5], tables[150]}
    async with start(*tables) as reading:
        await reading.healthy(lambda _: len(reading.source.first_subscribed) == 198)
        phoenix.change(tables[95], 1)
        await reading.until(lambda: reading.numbers == [1])
        assert len(phoenix.channels) <= 100
        phoenix.bad = set()
        await reading.ready()
    assert phoenix.connections == 1


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        ("Error 401: Unauthorized", 'grant select on "public"."orders" to service_role'),
        ("Error 400: Bad Request, no primary key", "primary key"),
    ],
)
async def test_withheld_changes_are_a_gap_and_a_reason(
    phoenix: Phoenix, start: Start, capfd: pytest.CaptureFixture[str], error: str, advice: str
) -> None:
    withheld = {"record": {}, "columns": [], "errors": [error], "commit_timestamp": None}
    async with start(withheld=60.0) as reading:
        await reading.ready()
        for number in range(50):
            phoenix.change(ORDERS, number, **withheld)
        await reading.until(lambda: reading.gaps)
        health = await reading.healthy(lambda health: not health.ready)
        assert any(advice in reason for reason in health.reasons)
        phoenix.change(ORDERS, 99)
        await reading.until(lambda: reading.numbers == [99])
        await reading.ready()
        assert reading.source.counts.withheld == 50
    assert [gap.tables for gap in reading.gaps] == [(ORDERS,)]
    assert error in reading.gaps[0].cause
    assert "".join(capfd.readouterr()).count("change lost") == 1


async def test_later_withheld_changes_are_a_gap_of_their_own(phoenix: Phoenix, start: Start) -> None:
    withheld = {"record": {}, "columns": [], "errors": ["Error 401: Unauthorized"], "commit_timestamp": None}
    async with start(withheld=0.2) as reading:
        await reading.ready()
        phoenix.change(ORDERS, 1, **withheld)
        await reading.until(lambda: len(reading.gaps) == 1)
        phoenix.change(ORDERS, 2, **withheld)
        phoenix.change(ORDERS, 3, **withheld)
        await reading.until(lambda: len(reading.gaps) == 2)
    assert reading.gaps[0].until < reading.gaps[1].until


async def test_a_canary_that_may_not_be_read_says_so_and_breaks_nothing(
    phoenix: Phoenix, start: Start
) -> None:
    phoenix.canary_parts = {"record": {}, "columns": [], "errors": ["Error 401: Unauthorized"]}
    async with start(canary=0.3) as reading:
        await reading.healthy(lambda h: any('grant select on "tailrace"."canary"' in r for r in h.reasons))
        beats = phoenix.heartbeats
        await phoenix.until(lambda: phoenix.heartbeats > beats + 4)
    assert phoenix.connections == 1


async def test_cut_changes_pass_with_their_error(phoenix: Phoenix, start: Start) -> None:
    async with start() as reading:
        await reading.ready()
        phoenix.change(ORDERS, 1, errors=["Error 413: Payload Too Large"])
        await reading.until(lambda: reading.numbers == [1])
    assert reading.items[0].errors == ("Error 413: Payload Too Large",)
    assert reading.gaps == []


async def test_frames_over_one_mebibyte_pass(phoenix: Phoenix, start: Start) -> None:
    async with start() as reading:
        await reading.ready()
        phoenix.change(ORDERS, 1, old_record={"body": "é" * 2_000_000})
        await reading.until(lambda: reading.numbers == [1])
    assert phoenix.connections == 1


async def test_names_are_compared_exactly(phoenix: Phoenix, start: Start) -> None:
    # Realtime takes user_events for a LIKE pattern, which userXevents matches too.
    async with start(("public", "user_events")) as reading:
        await reading.ready()
        phoenix.raw(("public", "user_events"), change_text(("public", "userXevents"), 1))
        phoenix.raw(("public", "user_events"), change_text(("other", "user_events"), 2))
        phoenix.change(("public", "user_events"), 3)
        await reading.until(lambda: reading.numbers == [3])
        assert reading.source.counts.foreign == 2


@pytest.mark.parametrize(
    ("text", "tables"),
    [
        ("secret-row: not JSON", {ORDERS, ITEMS}),
        ('{"secret-row": 1}', {ORDERS, ITEMS}),
        ('["1", null, "realtime:x", "system", "secret-row"]', {ORDERS, ITEMS}),
        (
            '{"event":"postgres_changes","topic":"TOPIC","payload":{"data":{"secret-row":1},"ids":[]}}',
            {ORDERS},
        ),
        ('{"event":"postgres_changes","topic":"TOPIC","payload":["secret-row"]}', {ORDERS}),
        ('{"event":"system","topic":"TOPIC","payload":"secret-row"}', {ORDERS}),
    ],
)
async def test_malformed_frames(
    phoenix: Phoenix,
    start: Start,
    capfd: pytest.CaptureFixture[str],
    text: str,
    tables: set[tuple[str, str]],
) -> None:
    async with start() as reading:
        await reading.ready()
        phoenix.put(phoenix.sockets[0], text.replace("TOPIC", phoenix.channel_of(ORDERS).topic))
        phoenix.change(ORDERS, 1)
        await reading.until(lambda: reading.numbers == [1])
        assert reading.source.counts.malformed == 1
    assert {table for gap in reading.gaps for table in gap.tables} == tables
    assert phoenix.connections == 1
    output = "".join(capfd.readouterr())
    assert "malformed" in output
    assert "secret-row" not in output


def test_an_address_that_is_none_is_refused_in_words() -> None:
    from worker.realtime import RealtimeSource  # noqa: PLC0415 - the only test that makes one by itself

    async def write_canary() -> str:
        return ""

    for url in ("", "example.com", "postgresql://example.com", "wss://"):
        with pytest.raises(ValueError, match="REALTIME_URL"):
            RealtimeSource(url, KEY, [ORDERS], write_canary)


def test_silence_is_found_and_mended_within_thirty_seconds() -> None:
    timing = Timing()
    canary_seconds = 5.0
    look = 1.0
    assert canary_seconds + timing.canary + look + timing.close + timing.reconnect + 3.0 <= 30.0
    assert all(wait > 0 for wait in asdict(timing).values())
    assert timing.heartbeat < 25.0
    assert timing.renew < 24 * 3600
