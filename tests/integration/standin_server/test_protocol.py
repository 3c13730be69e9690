import asyncio
import time
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidHandshake, InvalidStatus

from standin import LOCAL_JWT_SECRET, Behaviour
from standin.server import tokens
from tests.integration.standin_server.driving import Running, Start


def reply(ref: str | None, topic: str, response: object, status: str = "ok") -> dict[str, Any]:
    return {
        "ref": ref,
        "event": "phx_reply",
        "topic": topic,
        "payload": {"status": status, "response": response},
    }


def system(
    topic: str, message: str, status: str = "ok", extension: str = "postgres_changes"
) -> dict[str, Any]:
    payload = {
        "message": message,
        "status": status,
        "extension": extension,
        "channel": topic.removeprefix("realtime:"),
    }
    return {"ref": None, "event": "system", "topic": topic, "payload": payload}


def close(ref: str | None, topic: str) -> dict[str, Any]:
    return {"ref": ref, "event": "phx_close", "topic": topic, "payload": {}}


async def test_join_insert_leave(server: Running) -> None:
    async with server.client() as client:
        await client.join()
        answer = await client.receive()
        sent_id = answer["payload"]["response"]["postgres_changes"][0]["id"]
        binding = {"id": sent_id, "event": "*", "schema": "public", "table": "t"}
        assert answer == reply("1", "realtime:a", {"postgres_changes": [binding]})
        assert await client.receive() == system("realtime:a", "Subscribed to PostgreSQL")
        await server.feed.commit("one")
        change = await client.receive()
        assert (change["event"], change["ref"], change["payload"]["ids"]) == (
            "postgres_changes",
            None,
            [sent_id],
        )
        assert change["payload"]["data"]["record"] == {"v": "one", "id": 1}
        await client.send(
            {"topic": "realtime:a", "event": "phx_leave", "payload": {}, "ref": "2", "join_ref": "1"}
        )
        assert await client.receive() == reply("2", "realtime:a", {})
        assert await client.receive() == close("1", "realtime:a")
        await server.feed.commit("after")
        await client.heartbeat()


async def test_array_frames(server: Running) -> None:
    async with server.client(version="2.0.0") as client:
        config = {"postgres_changes": [{"table": "t"}], "presence": {"enabled": True}}
        await client.send(["2", "3", "realtime:a", "phx_join", {"config": config}])
        answer = await client.receive()
        assert answer[:4] == ["2", "3", "realtime:a", "phx_reply"]
        acknowledged = await client.receive()
        assert acknowledged[:4] == ["2", None, "realtime:a", "system"]
        assert await client.receive() == ["2", None, "realtime:a", "presence_state", {}]
        await server.feed.commit("one")
        change = await client.receive()
        assert change[:4] == [None, None, "realtime:a", "postgres_changes"]
        await client.send(["2", "4", "realtime:a", "phx_leave", {}])
        assert await client.receive() == [
            "2",
            "4",
            "realtime:a",
            "phx_reply",
            {"status": "ok", "response": {}},
        ]
        assert await client.receive() == ["2", "2", "realtime:a", "phx_close", {}]
        await client.send([None, "5", "realtime:b", "broadcast", {}])
        assert await client.receive() == [
            None,
            "5",
            "realtime:b",
            "phx_reply",
            {"status": "error", "response": {"reason": "unmatched topic"}},
        ]


@pytest.mark.parametrize(
    ("join_ref", "leave_ref", "leaves"),
    [(None, None, True), ("1", "1", True), ("1", None, False), (None, "1", True)],
)
async def test_a_leave_must_name_the_join_that_named_itself(
    server: Running, join_ref: str | None, leave_ref: str | None, *, leaves: bool
) -> None:
    async with server.client() as client:
        await client.subscribe(join_ref=join_ref)
        message = {"topic": "realtime:a", "event": "phx_leave", "payload": {}, "ref": "2"}
        await client.send(message if leave_ref is None else {**message, "join_ref": leave_ref})
        if leaves:
            assert await client.receive() == reply("2", "realtime:a", {})
            assert await client.receive() == close(join_ref, "realtime:a")
        await client.heartbeat()
        await server.feed.commit("x")
        if not leaves:
            assert await client.values(1) == ["x"]
        await client.heartbeat()


async def test_joining_again_closes_the_older_join_after_the_reply(server: Running) -> None:
    async with server.client() as client:
        await client.subscribe(ref="5", join_ref="5")
        await client.join(ref="7", join_ref="7")
        assert (await client.receive())["ref"] == "7"
        assert await client.receive() == close("5", "realtime:a")
        assert await client.receive() == system("realtime:a", "Subscribed to PostgreSQL")
        await server.feed.commit("x")
        assert await client.values(1) == ["x"]
        await client.heartbeat()


async def test_a_refused_join_ends_the_join_before_it(server: Running) -> None:
    async with server.client() as client:
        await client.subscribe(ref="5", join_ref="5")
        await client.join(ref="7", join_ref="7", token="xxx")
        refusal = await client.receive()
        assert (refusal["ref"], refusal["payload"]["status"]) == ("7", "error")
        assert await client.receive() == close("5", "realtime:a")
        await server.feed.commit("x")
        await client.heartbeat()


async def test_a_stop_does_not_wait_for_answers_that_are_held_back(start: Start) -> None:
    behaviour = Behaviour(join_error_delay=600, handshake_refusal_delay=600)
    async with start(behaviour) as server, server.client() as client:
        await client.join(token="xxx")
        refusing = asyncio.create_task(refused(server.url("xxx")))
        await server.counters.reach("connections_refused", 1)
        async with asyncio.timeout(10):
            await server.realtime.stop()
        with pytest.raises((InvalidHandshake, OSError, EOFError)):
            await refusing


async def test_several_bindings_give_one_frame_with_their_ids_in_reverse(server: Running) -> None:
    first, second = {"event": "INSERT", "table": "t"}, {"event": "*", "table": "t"}
    async with server.client() as client:
        await client.join("realtime:a", first, second, second)
        listed = (await client.receive())["payload"]["response"]["postgres_changes"]
        await client.receive()
        await server.feed.commit("x")
        assert (await client.receive())["payload"]["ids"] == [entry["id"] for entry in reversed(listed)]


async def test_messages_without_a_receiver(server: Running) -> None:
    async with server.client() as client:
        unmatched = {"reason": "unmatched topic"}
        await client.send({"topic": "realtime:no", "event": "broadcast", "payload": {}, "ref": "8"})
        assert await client.receive() == reply("8", "realtime:no", unmatched, "error")
        await client.send({"topic": "no:a", "event": "phx_join", "payload": {}, "ref": "9", "join_ref": "9"})
        assert await client.receive() == reply("9", "no:a", unmatched, "error")
        await client.socket.send("not json")
        await client.socket.send(b"\x00\xff")
        await client.subscribe()
        await client.send({"topic": "realtime:a", "event": "whatever", "payload": {}, "ref": "10"})
        await client.heartbeat()


async def test_an_empty_topic_is_refused(server: Running) -> None:
    async with server.client() as client:
        await client.join("realtime:")
        text = "TopicNameRequired: You must provide a topic name"
        assert await client.receive() == reply("1", "realtime:", {"reason": text}, "error")


async def test_a_bad_binding_fails_all_of_the_channel_and_leaves_it_joined(server: Running) -> None:
    async with server.client() as client:
        await client.join("realtime:a", {"table": "t"}, {"table": "missing"})
        assert (await client.receive())["payload"]["status"] == "ok"
        assert await client.receive() == system("realtime:a", "no such table", "error")
        await server.feed.commit("x")
        await client.send(
            {"topic": "realtime:a", "event": "phx_leave", "payload": {}, "ref": "2", "join_ref": "1"}
        )
        assert await client.receive() == reply("2", "realtime:a", {})


async def test_a_channel_without_bindings_has_no_acknowledgement(server: Running) -> None:
    async with server.client() as client:
        await client.send(
            {
                "topic": "realtime:a",
                "event": "phx_join",
                "payload": {"config": {}},
                "ref": "1",
                "join_ref": "1",
            }
        )
        assert await client.receive() == reply("1", "realtime:a", {"postgres_changes": []})
        await client.heartbeat()


async def test_the_first_api_names_its_table_in_the_topic_and_gets_the_type_as_event(server: Running) -> None:
    async with server.client() as client:
        topic = "realtime:public:t"
        await client.send({"topic": topic, "event": "phx_join", "payload": {}, "ref": "1", "join_ref": "1"})
        listed = (await client.receive())["payload"]["response"]["postgres_changes"]
        assert [list(entry) for entry in listed] == [["id", "schema", "table"]]
        assert await client.receive() == system(topic, "Subscribed to PostgreSQL")
        await server.feed.commit("x")
        frame = await client.receive()
        assert frame["event"] == "INSERT"
        assert frame["payload"]["record"]["v"] == "x"


async def refused(url: str, **headers: str) -> tuple[int, bytes | None]:
    with pytest.raises(InvalidStatus) as caught:
        async with connect(url, additional_headers=headers):
            pass
    return caught.value.response.status_code, caught.value.response.body


async def test_handshakes_are_refused_in_the_words_of_the_real_server(server: Running) -> None:
    expired = tokens.sign({"role": "anon", "exp": 1}, LOCAL_JWT_SECRET)
    assert await refused(server.url("xxx")) == (401, b'{"error":"The token provided is not a valid JWT"}')
    assert await refused(server.url(expired)) == (401, b'{"error":"Token has expired"}')
    assert await refused(server.url(version="3.0.0")) == (403, b"")
    assert await refused(server.url(path="/rest/v1/")) == (404, b"Not Found")
    assert server.counters["connections_refused"] == 4


async def test_the_upgrade_names_no_extension(server: Running) -> None:
    async with connect(server.url(), additional_headers={"Host": "project.supabase.co"}) as socket:
        assert socket.response is not None
        assert socket.response.headers["server"] == "Cowboy"
        assert "sec-websocket-extensions" not in socket.response.headers


async def test_bad_tokens_are_refused_at_the_join(server: Running) -> None:
    async with server.client() as client:
        for number, (token, reason) in enumerate(
            [
                ("xxx", "MalformedJWT: The token provided is not a valid JWT"),
                (
                    tokens.sign({"exp": 5e9}, LOCAL_JWT_SECRET),
                    "InvalidJWTToken: Fields `role` and `exp` are required in JWT",
                ),
                (tokens.sign({"role": "a"}, "x" * 32), "JwtSignatureError: Failed to validate JWT signature"),
            ]
        ):
            await client.join(f"realtime:{number}", token=token)
            assert (await client.receive())["payload"] == {"status": "error", "response": {"reason": reason}}
        await client.subscribe("realtime:opaque", token="sb_secret_x")
        assert server.counters["joins_refused"] == 3


async def test_a_token_that_expires_ends_its_channel_and_not_the_connection(server: Running) -> None:
    token = tokens.sign({"role": "anon", "exp": int(time.time()) + 1}, LOCAL_JWT_SECRET)
    async with server.client() as client:
        await client.subscribe(token=token)
        assert await client.receive() == system(
            "realtime:a", "Token has expired 0 seconds ago", "error", "system"
        )
        assert await client.receive() == close("1", "realtime:a")
        await server.feed.commit("x")
        await client.heartbeat()
        await client.subscribe(ref="3", join_ref="3")


async def test_a_new_token_subscribes_again_and_outlives_the_old_one(server: Running) -> None:
    old = tokens.sign({"role": "anon", "exp": int(time.time()) + 1}, LOCAL_JWT_SECRET)
    new = tokens.sign({"role": "service_role", "exp": int(time.time()) + 100}, LOCAL_JWT_SECRET)
    async with server.client() as client:
        await client.subscribe(token=old)
        message = {"topic": "realtime:a", "event": "access_token", "ref": "2", "join_ref": "1"}
        for ignored in (None, old, "sb_secret_x", 5):
            await client.send({**message, "payload": {"access_token": ignored}})
        # A frame without join_ref is heard, too.
        await client.send({**message, "payload": {"access_token": new}, "join_ref": None})
        assert await client.receive() == system("realtime:a", "Subscribed to PostgreSQL")
        assert [claims["role"] for claims in server.feed.claims] == ["anon", "service_role"]
        # The old token's end must pass, and it gives no sign any more.
        await asyncio.sleep(max(0.0, tokens.verify(new, LOCAL_JWT_SECRET)["exp"] - 98.8 - time.time()))
        await client.heartbeat()
        await client.send({**message, "payload": {"access_token": "xxx"}})
        text = "The token provided is not a valid JWT"
        assert await client.receive() == system("realtime:a", text, "error", "system")
        assert await client.receive() == close("1", "realtime:a")


async def test_a_private_channel_is_for_the_service_role(server: Running) -> None:
    anon = tokens.sign({"role": "anon", "exp": 5e9}, LOCAL_JWT_SECRET)
    async with server.client() as client:
        await client.join("realtime:p", token=anon, private=True)
        reason = (await client.receive())["payload"]["response"]["reason"]
        assert reason == "Unauthorized: You do not have permissions to read from this Channel topic: p"
        await client.subscribe("realtime:q", private=True)


async def test_limits(start: Start) -> None:
    behaviour = Behaviour(max_channels_per_client=1, max_users=1)
    async with start(behaviour) as server, server.client() as client:
        await client.subscribe("realtime:a")
        await client.join("realtime:b", ref="2")
        reason = (await client.receive())["payload"]["response"]["reason"]
        assert reason == "ChannelRateLimitReached: Too many channels"
        assert await refused(server.url()) == (429, b'{"error":"Too many connected users"}')


async def test_joins_per_second(start: Start) -> None:
    behaviour = Behaviour(max_joins_per_second=1, rate_tick=0.05, rate_window=60)
    async with start(behaviour) as server, server.client() as client:
        reasons = [""]
        while not reasons[-1]:
            await client.join("realtime:a", {"table": "missing"})
            frame = await client.receive()
            while frame["event"] != "phx_reply":
                frame = await client.receive()
            reasons.append(frame["payload"]["response"].get("reason", ""))
        assert reasons[-1] == "ClientJoinRateLimitReached: Too many joins per second"
        assert await refused(server.url()) == (429, b'{"error":"Too many joins per second"}')


async def test_changes_over_the_limit_are_dropped_in_silence(start: Start) -> None:
    behaviour = Behaviour(max_events_per_second=10, rate_tick=0.05, rate_window=60)
    async with start(behaviour) as server, server.client() as client:
        await client.subscribe()
        while not server.counters["rate_limited"]:
            await server.feed.commit(*["x"] * 10)
            await asyncio.sleep(0.01)
        sent = server.counters["changes_sent"]
        assert await client.values(sent) == ["x"] * sent
        await client.heartbeat()


async def test_a_silent_client_is_closed(start: Start) -> None:
    async with start(Behaviour(idle_timeout=0.2)) as server, server.client() as client:
        await client.subscribe()
        assert await client.closed() == 1000


async def test_a_stop_closes_with_1012(server: Running) -> None:
    async with server.client() as client:
        await client.subscribe()
        await server.realtime.stop()
        assert await client.closed() == 1012
