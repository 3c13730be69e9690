import asyncio
import contextlib

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidHandshake, InvalidStatus

from standin import Behaviour
from tests.integration.standin_server.driving import Running, Start


async def test_drop_next_loses_so_many_and_no_more(server: Running) -> None:
    async with server.client() as client:
        await client.subscribe()
        server.faults.drop_next = 2
        await server.feed.commit("a", "b", "c")
        assert await client.values(1) == ["c"]
        assert server.counters["dropped"] == 2
        assert server.faults.drop_next == 0


async def test_the_same_seed_drops_the_same(start: Start) -> None:
    sent = [str(number) for number in range(200)]
    came = []
    for _ in range(2):
        async with start(seed=7) as server, server.client() as client:
            await client.subscribe()
            server.faults.drop = 0.5
            await server.feed.commit(*sent)
            came.append(await client.values(server.counters["changes_sent"]))
            await client.heartbeat()
    assert came[0] == came[1]
    assert 50 < len(came[0]) < 150


async def test_duplicates(server: Running) -> None:
    async with server.client() as client:
        await client.subscribe()
        server.faults.duplicate = 1.0
        await server.feed.commit("a", "b")
        assert await client.values(4) == ["a", "a", "b", "b"]


async def test_delayed_changes_keep_their_order_and_heartbeats_do_not_wait(server: Running) -> None:
    async with server.client() as client:
        await client.subscribe()
        server.faults.delay_ms = 60_000
        await server.feed.commit("a", "b")
        await client.heartbeat()
        server.faults.delay_ms = 0
        await server.feed.commit("c")
        assert await client.values(3) == ["a", "b", "c"]
        server.faults.delay_ms = 50
        await server.feed.commit("d", "e")
        assert await client.values(2) == ["d", "e"]


async def test_truncated_and_error_events(server: Running) -> None:
    async with server.client() as client:
        await client.subscribe()
        server.faults.truncate = True
        await server.feed.commit("x" * 100)
        data = (await client.receive())["payload"]["data"]
        assert (data["record"], data["errors"]) == ({"id": 1}, ["Error 413: Payload Too Large"])
        server.faults.error_events = 401
        await server.feed.commit("y")
        data = (await client.receive())["payload"]["data"]
        assert (data["record"], data["commit_timestamp"]) == ({}, None)


async def test_oversize_is_for_one_frame(server: Running) -> None:
    async with server.client(max_size=None) as client:
        await client.subscribe()
        server.faults.oversize = True
        await server.feed.commit("a", "b")
        assert len(await client.socket.recv()) > 1_048_576
        assert len(await client.socket.recv()) < 1000


async def test_a_silent_server_answers_heartbeats_only(server: Running) -> None:
    async with server.client() as client:
        await client.subscribe()
        server.faults.silent = True
        await server.feed.commit("lost")
        await client.heartbeat()
        server.faults.silent = False
        await server.feed.commit("heard")
        assert await client.values(1) == ["heard"]


async def test_silence_of_the_current_connections_spares_new_ones(server: Running) -> None:
    async with server.client() as old:
        await old.subscribe()
        server.faults.silent = "current"
        async with server.client() as new:
            await new.subscribe()
            await server.feed.commit("x")
            assert await new.values(1) == ["x"]
        await old.heartbeat()


async def test_half_open_answers_nothing_and_goes_on_where_it_was(server: Running) -> None:
    async with server.client() as client:
        await client.subscribe()
        server.faults.half_open = True
        await server.feed.commit("later")
        pong = asyncio.ensure_future(await client.socket.ping())
        receiving = asyncio.create_task(client.receive())
        await client.send({"topic": "phoenix", "event": "heartbeat", "payload": {}, "ref": "hb"})
        # That nothing comes has no signal; a short while is enough to catch an answer, most of the time.
        done, _ = await asyncio.wait({pong, receiving}, timeout=0.2)
        assert not done
        server.faults.half_open = False
        await pong
        assert (await receiving)["event"] == "postgres_changes"
        assert (await client.receive())["ref"] == "hb"


async def test_half_open_of_the_current_connections_spares_new_ones(server: Running) -> None:
    async with server.client() as old:
        await old.subscribe()
        server.faults.half_open = "current"
        server.faults.drop_next = 0
        async with server.client() as new:
            await new.subscribe()
        heard = server.counters["messages_received"]
        await old.send({"topic": "phoenix", "event": "heartbeat", "payload": {}, "ref": "hb"})
        async with server.client() as fence:
            await fence.heartbeat()
        assert server.counters["messages_received"] == heard + 1
        server.faults.half_open = False
        assert (await old.receive())["ref"] == "hb"


async def test_a_half_open_server_stops_all_the_same(start: Start) -> None:
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(start())
        client = await stack.enter_async_context(server.client())
        await client.subscribe()
        server.faults.half_open = True
        connecting = asyncio.create_task(connect(server.url(), open_timeout=5).__aenter__())
        await server.counters.reach("connections", 2)
        await server.realtime.stop()
        assert await client.closed() == 1006
        with pytest.raises((InvalidHandshake, OSError, EOFError)):
            await connecting


async def test_refused_connections(server: Running) -> None:
    server.faults.refuse_connections = True
    with pytest.raises((InvalidHandshake, OSError, EOFError)):
        await connect(server.url())
    server.faults.refuse_connections = 503
    with pytest.raises(InvalidStatus) as caught:
        await connect(server.url())
    assert caught.value.response.status_code == 503
    server.faults.clear()
    async with server.client() as client:
        await client.subscribe()


async def test_refused_joins_and_withheld_subscriptions(server: Running) -> None:
    async with server.client() as client:
        server.faults.refuse_joins = True
        await client.join()
        assert (await client.receive())["payload"]["status"] == "error"
        server.faults.refuse_joins = "RealtimeRestarting: soon"
        await client.join()
        assert (await client.receive())["payload"]["response"]["reason"] == "RealtimeRestarting: soon"
        server.faults.clear()
        server.faults.withhold_subscribed = True
        await client.join()
        assert (await client.receive())["payload"]["status"] == "ok"
        await server.feed.commit("x")
        await client.heartbeat()


async def test_actions_on_joined_channels(server: Running) -> None:
    async with server.client() as client:
        await client.subscribe()
        await server.realtime.act({"resubscribed": True, "late_close": True})
        assert (await client.receive())["payload"]["message"] == "Subscribed to PostgreSQL"
        late = await client.receive()
        assert (late["event"], late["ref"]) == ("phx_close", "0")
        await server.realtime.act({"system_error": "the subscription is gone"})
        failed = (await client.receive())["payload"]
        assert (failed["message"], failed["status"]) == ("the subscription is gone", "error")
        await server.feed.commit("x")
        await client.heartbeat()
        await server.realtime.act({"expire_tokens": True})
        assert (await client.receive())["payload"]["message"] == "Token has expired 0 seconds ago"
        assert (await client.receive())["event"] == "phx_close"
        await server.realtime.act({"close": 4001})
        assert await client.closed() == 4001


@pytest.mark.parametrize(("code", "seen"), [(1000, 1000), (1012, 1012), (1006, 1006)])
async def test_closing(server: Running, code: int, seen: int) -> None:
    async with server.client() as client:
        await client.subscribe()
        await server.realtime.act({"close": code})
        assert await client.closed() == seen


async def test_a_client_that_does_not_read_is_cut_and_delays_nobody(start: Start) -> None:
    async with (
        start(Behaviour(send_buffer_bytes=2_000_000)) as server,
        server.client() as reader,
        server.client() as sleeper,
    ):
        await reader.subscribe()
        await sleeper.subscribe()
        while not server.counters["clients_cut"]:
            await server.feed.commit(*["x" * 1000] * 100)
            assert len(await reader.values(100)) == 100
        assert await sleeper.closed() == 1006


async def test_a_client_that_takes_nothing_for_long_is_cut(start: Start) -> None:
    async with start(Behaviour(send_timeout=0.2)) as server, server.client() as sleeper:
        await sleeper.subscribe()
        await server.feed.commit(*["x" * 1000] * 20_000)
        await server.counters.reach("clients_cut", 1)
        assert await sleeper.closed() == 1006
