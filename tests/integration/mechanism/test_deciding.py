"""What a person decides about dead letters and lane keys, and what the lanes make of it."""

import asyncio
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.mechanism.bench import Bench, item
from worker import Change, GiveUp, Handlers
from worker.asked import Operator, Which
from worker.draining.drain import Drain
from worker.draining.passes import Pass
from worker.errors import Refused, Unknown
from worker.lanes import Lane
from worker.operating import Operations

WRITE = text("insert into derived_log (handler, id, note) values (:handler, :id, :note)")
ANNA = Operator("anna", "command")


class Shop:
    """Handlers that give up rows whose note is poison, as long as `sick`."""

    def __init__(self) -> None:
        self.sick = True
        self.sources: list[str] = []
        self.groups: list[int] = []
        self.on = Handlers()

        @self.on.change("items", name="goes-on", lane_key="grp")
        async def goes_on(change: Change, session: AsyncSession) -> None:
            await self.meet("goes-on", change, session)

        @self.on.change("items", name="halts", lane_key="grp", after="halt")
        async def halts(change: Change, session: AsyncSession) -> None:
            await self.meet("halts", change, session)

        @self.on.derive("items", name="sums", by="grp")
        async def sums(groups: list[int], session: AsyncSession) -> None:
            if self.sick and 13 in groups:
                raise GiveUp("never")
            self.groups += groups

    async def meet(self, handler: str, change: Change, session: AsyncSession) -> None:
        row = change.record or change.old_record
        assert row is not None
        if self.sick and row["note"].startswith("poison"):
            raise GiveUp("never")
        self.sources.append(change.source)
        await session.execute(WRITE, {"handler": handler, "id": row["id"], "note": row["note"]})


class Desk:
    """An operator's desk at a bench."""

    def __init__(self, at: Bench) -> None:
        self.at = at
        self.woken: list[Lane] = []
        self.operations = Operations(at.engine, lambda: at.handlers, self._wake)

    async def _wake(self, lanes: Any) -> None:
        self.woken += lanes

    async def dead(self) -> list[int]:
        return [one["id"] for one in await self.operations.find(Which())]

    async def redrive(self, *ids: int) -> list[dict[str, Any]]:
        told = await self.operations.decide(ANNA, "redrive", Which(ids or None), dry_run=False)
        assert await self.at.holding_is_true()
        return told

    async def discard(self, *ids: int) -> list[dict[str, Any]]:
        told = await self.operations.decide(ANNA, "discard", Which(ids or None), dry_run=False)
        assert await self.at.holding_is_true()
        return told

    async def pause(self, handler: str, key: str | None = None) -> dict[str, Any]:
        told = await self.operations.pause(ANNA, handler, key, paused=True)
        assert await self.at.holding_is_true()
        return told

    async def resume(self, handler: str, key: str | None = None) -> dict[str, Any]:
        told = await self.operations.pause(ANNA, handler, key, paused=False)
        assert await self.at.holding_is_true()
        return told


@pytest.fixture
def shop() -> Shop:
    return Shop()


@pytest.fixture
def desk(at: Bench) -> Desk:
    return Desk(at)


async def passes(at: Bench, drain: Drain, count: int = 3) -> None:
    for _ in range(count):
        await at.make_due()
        for number in range(at.lane_count):
            await drain.run(Lane(drain.handler.name, number))
    assert await at.holding_is_true()
    await at.counters()


@pytest.mark.parametrize("handler", ["goes-on", "halts"])
async def test_many_are_decided_about_in_one_transaction_for_each_lane(
    at: Bench, shop: Shop, desk: Desk, handler: str
) -> None:
    await at.load(shop.on)
    drain, which = at.drain(handler), Which(handler=handler)
    rounds = 10 if handler == "goes-on" else 1  # of a key that halts there is one
    for n in range(rounds):
        for grp in range(6):
            await at.put("items", item(n, grp, f"poison {n}"))
            await at.put("items", item(n, grp, f"fine {n}"))
    await passes(at, drain, rounds + 1)
    for action in ("redrive", "discard"):
        dead = await desk.operations.find(which)
        assert len(dead) == 6 * rounds
        told = await desk.operations.decide(ANNA, action, which, dry_run=False)  # type: ignore[arg-type] # one of two
        assert await at.holding_is_true()
        assert [one["id"] for one in told] == [one["id"] for one in dead]
        decided = f"tailrace.audit where action = '{action}'"
        assert await at.count(decided) == 6 * rounds
        assert await at.count(f"(select distinct xmin::text from {decided})") <= at.lane_count
        await passes(at, drain, rounds + 1)  # it is still sick: what was redriven dies again
    await passes(at, drain)
    assert sorted(await at.log("note")) == sorted(f"fine {n}" for n in range(rounds) for _ in range(6))
    await at.counters()


async def test_redriven_changes_are_applied_in_their_order_and_once(
    at: Bench, shop: Shop, desk: Desk
) -> None:
    await at.load(shop.on)
    for note in ("poison 1", "fine 1", "poison 2", "poison 3", "fine 2"):
        await at.put("items", item(1, 7, note))
    drain = at.drain("goes-on")
    await passes(at, drain)
    assert await at.log("note") == ["fine 1", "fine 2"]
    first, second, third = await desk.dead()
    shop.sick = False
    told = await desk.redrive(third, first, second)
    assert [one["id"] for one in told] == [first, second, third]
    assert {(one["status"], one["attempts"]) for one in told} == {("retrying", 0)}
    assert set(desk.woken) == {at.lane_of("goes-on", item(1, 7))}
    # The others are due when it is their turn: nobody looks at them in vain until then.
    assert await at.count("tailrace.held where next_attempt_at is not null") == 1
    await passes(at, drain)
    assert await at.log("note") == ["fine 1", "fine 2", "poison 1", "poison 2", "poison 3"]
    assert shop.sources[-3:] == ["redrive"] * 3
    assert shop.sources.count("redrive") == 3
    assert await at.rows("held") == []
    with pytest.raises(Unknown, match=f"no dead letter {first}"):
        await desk.redrive(first)


async def test_a_redriven_change_that_fails_again_is_a_dead_letter_again_and_fresh_ones_wait_meanwhile(
    at: Bench, shop: Shop, desk: Desk
) -> None:
    await at.load(shop.on)
    await at.put("items", item(1, 7, "poison"))
    drain = at.drain("goes-on")
    await passes(at, drain)
    (letter,) = await desk.dead()
    await desk.redrive()
    lane = at.lane_of("goes-on", item(1, 7))
    await at.db.execute("update tailrace.held set next_attempt_at = now() + interval '1 hour'")
    await at.put("items", item(1, 7, "later"))
    await drain.run(lane)
    assert await at.log("note") == []  # behind the redriven one
    await passes(at, drain)
    assert await desk.dead() == [letter]
    assert await at.log("note") == ["later"]
    assert await at.rows("held", "attempts") == [(1,)]


async def test_a_dead_letter_is_redriven_by_one_of_two_people(at: Bench, shop: Shop, desk: Desk) -> None:
    await at.load(shop.on)
    await at.put("items", item(1, 7, "poison"))
    await passes(at, at.drain("goes-on"))
    (letter,) = await desk.dead()
    both = await asyncio.gather(
        *(desk.operations.redrive(Operator(name, "http"), letter) for name in ("anna", "ben")),
        return_exceptions=True,
    )
    assert [type(one) for one in both].count(Unknown) == 1
    assert len(await at.rows("audit", "who")) == 1
    assert await at.holding_is_true()


async def test_a_redrive_waits_for_the_pass_that_has_the_lane(at: Bench, shop: Shop, desk: Desk) -> None:
    await at.load(shop.on)
    await at.put("items", item(1, 7, "poison"))
    await passes(at, at.drain("goes-on"))
    lane = at.lane_of("goes-on", item(1, 7))
    transaction = at.db.transaction()
    await transaction.start()
    await at.db.execute(
        "select from tailrace.lanes where handler = $1 and lane = $2 for update", lane.handler, lane.number
    )
    redriving = asyncio.create_task(desk.redrive(), name="test: redriving")
    watching = await _second_connection(at)
    try:
        while not await watching.fetchval(
            "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname ="
            " current_database()"
        ):
            await asyncio.sleep(0.01)
        assert not redriving.done()
    finally:
        await watching.close()
        await transaction.rollback()
    assert [one["status"] for one in await redriving] == ["retrying"]


async def _second_connection(at: Bench) -> Any:
    import asyncpg  # noqa: PLC0415 - for this alone

    url = at.engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    return await asyncpg.connect(url)


async def test_lanes_are_worked_out_anew_after_their_number_has_changed(
    at: Bench, shop: Shop, desk: Desk
) -> None:
    await at.load(shop.on)
    for group in at.groups("goes-on"):
        await at.put("items", item(group, group, "poison"))
    await passes(at, at.drain("goes-on"))
    dead = len(await desk.dead())
    # As a listener does it when nothing is under way.
    await at.db.execute("delete from tailrace.lanes where lane >= 2")
    await at.db.execute("update tailrace.source set lanes = 2")
    at.lane_count = 2
    shop.sick = False
    await desk.redrive()
    assert await at.db.fetchval("select max(l) from tailrace.held, unnest(lanes) l") <= 1
    drain = at.drain("goes-on")
    for _ in range(3):
        for number in range(2):
            await drain.run(Lane("goes-on", number))
    assert len(await at.log()) == dead


async def test_who_halts_goes_on_after_a_redrive_and_after_a_discard(
    at: Bench, shop: Shop, desk: Desk
) -> None:
    await at.load(shop.on)
    for note in ("poison 1", "poison 2", "behind"):
        await at.put("items", item(1, 7, note))
    drain = at.drain("halts")
    await passes(at, drain)
    assert await at.log("note") == []
    (first,) = await desk.dead()
    await desk.discard(first)
    assert desk.woken == [at.lane_of("halts", item(1, 7))]
    await passes(at, drain)
    assert await at.log("note") == []
    (second,) = await desk.dead()
    shop.sick = False
    await desk.redrive(second)
    await passes(at, drain)
    assert await at.log("note") == ["poison 2", "behind"]


async def test_what_is_discarded_counts_as_filtered_out(at: Bench, shop: Shop, desk: Desk) -> None:
    await at.load(shop.on)
    for group in (1, 13, 13, 2):
        await at.put("items", item(1, group, "poison"))
    await passes(at, at.drain("sums"))
    (told,) = await desk.discard()
    assert (told["status"], told["key"], told["table"], told["type"]) == ("discarded", ["13"], "items", None)
    applied, waiting, _ = await at.counters()
    assert (applied, waiting) == (2, 0)
    assert await at.db.fetchval("select filtered from tailrace.handlers where name = 'sums'") == 2
    assert await at.rows("audit", "who, via, action, handler") == [("anna", "command", "discard", "sums")]


async def test_a_derive_key_is_redriven(at: Bench, shop: Shop, desk: Desk) -> None:
    await at.load(shop.on)
    await at.put("items", item(1, 13))
    drain = at.drain("sums")
    await passes(at, drain)
    shop.sick = False
    await desk.redrive()
    await passes(at, drain)
    assert shop.groups == [13]
    assert (await at.counters())[:2] == (1, 0)


async def test_an_edited_record_is_what_the_handler_is_given_and_is_on_record(
    at: Bench, shop: Shop, desk: Desk
) -> None:
    await at.load(shop.on)
    await at.put("items", item(1, 7, "poison"))
    drain = at.drain("goes-on")
    await passes(at, drain)
    (letter,) = await desk.dead()
    await desk.operations.redrive(ANNA, letter, {"note": 'mended, with a "quote"'})
    await passes(at, drain)
    assert await at.log("note") == ['mended, with a "quote"']
    (details,) = (await at.rows("audit", "details::text"))[0]
    assert details == '{"after": {"note": "mended, with a \\"quote\\""}, "before": {"note": "poison"}}'


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"nothing": 1}, 'no column "nothing"'),
        ({"id": "one"}, 'the value for "id" is no integer'),
        ({"grp": 8}, '"grp" decides the lane key'),
        ({"note": ["a"]}, "write an array as"),
        ({}, "names no column"),
    ],
)
async def test_an_edit_that_does_not_fit_is_refused(
    at: Bench, shop: Shop, desk: Desk, record: dict[str, Any], complaint: str
) -> None:
    await at.load(shop.on)
    await at.put("items", item(1, 7, "poison"))
    await passes(at, at.drain("goes-on"))
    (letter,) = await desk.dead()
    with pytest.raises(Refused, match=complaint):
        await desk.operations.redrive(ANNA, letter, record)
    assert await desk.dead() == [letter]
    assert await at.rows("audit") == []


async def test_the_key_of_a_derive_handler_and_a_deleted_row_have_no_record(
    at: Bench, shop: Shop, desk: Desk
) -> None:
    await at.load(shop.on)
    await at.put("items", None, item(1, 13, "poison"))
    await passes(at, at.drain("goes-on"))
    await passes(at, at.drain("sums"))
    for letter, complaint in zip(await desk.dead(), ("a DELETE of", "is given keys"), strict=True):
        with pytest.raises(Refused, match=complaint):
            await desk.operations.redrive(ANNA, letter, {"note": "x"})


async def test_nobody_redrives_for_a_handler_that_is_gone_but_anybody_discards(
    at: Bench, shop: Shop, desk: Desk
) -> None:
    await at.load(shop.on)
    await at.put("items", item(1, 7, "poison"))
    await passes(at, at.drain("goes-on"))
    await at.db.execute("update tailrace.handlers set state = 'orphaned' where name = 'goes-on'")
    (told,) = await desk.redrive()
    assert "is not loaded any more" in told["refused"]
    assert [one["status"] for one in await desk.discard()] == ["discarded"]


async def newer(desk: Desk) -> list[int]:
    """Tell of each dead letter how many newer changes of its keys were applied."""
    return [(await desk.operations.show(one))["newer"]["count"] for one in await desk.dead()]


async def test_who_redrives_is_told_which_newer_changes_were_applied(
    at: Bench, shop: Shop, desk: Desk
) -> None:
    await at.load(shop.on)
    drain = at.drain("goes-on")
    # In one pass, in later ones, parked, and redriven ones: whatever applies them.
    for note in ("poison 1", "fine 1", "poison 2", "fine 2", "fine 3"):
        await at.put("items", item(1, 7, note))
    await at.put("items", item(2, 8, "of another key"))
    await passes(at, drain)
    assert await newer(desk) == [3, 2]
    await at.put("items", item(1, 7, "fine 4"))
    await passes(at, drain)
    await desk.pause("goes-on")
    for note in ("fine 5", "poison 3", "fine 6"):
        await at.put("items", item(1, 7, note))
    await passes(at, drain)
    await desk.resume("goes-on")
    await passes(at, drain)
    assert await newer(desk) == [6, 5, 1]
    first, second, third = await desk.dead()
    last = await at.db.fetchval("select max(lsn) from tailrace.lanes where handler = 'goes-on'")
    shop.sick = False
    (told,) = await desk.redrive(second)
    assert told["newer"]["count"] == 5
    assert told["newer"]["position"].startswith(f"{last}-")
    assert await newer(desk) == [6, 1]
    await passes(at, drain)
    assert await newer(desk) == [7, 1]
    await desk.discard(third)
    (told,) = await desk.redrive(first)
    assert told["newer"]["count"] == 7


async def test_what_is_redriven_together_hands_down_what_has_overtaken_it(
    at: Bench, shop: Shop, desk: Desk
) -> None:
    await at.load(shop.on)
    drain = at.drain("goes-on")
    for note in ("poison 1", "fine 1", "poison 2", "fine 2", "poison 3", "fine 3"):
        await at.put("items", item(1, 7, note))
    await at.put("items", item(2, 8, "poison of another key"))
    await passes(at, drain)
    assert await newer(desk) == [3, 2, 1, 0]
    _, second, third, fourth = await desk.dead()
    shop.sick = False
    told = await desk.redrive(fourth, third, second)
    assert [(one["id"], one["newer"]["count"]) for one in told] == sorted(
        [(second, 2), (third, 1), (fourth, 0)]
    )
    assert await newer(desk) == [3]
    await passes(at, drain)
    assert await newer(desk) == [5]
    log = await at.log("note")
    assert log.index("poison 2") < log.index("poison 3")


async def test_a_dead_letter_that_none_has_overtaken(at: Bench, shop: Shop, desk: Desk) -> None:
    await at.load(shop.on)
    await at.put("items", item(1, 7, "fine"))
    await at.put("items", item(1, 7, "poison"))
    await at.put("items", item(2, 8, "of another key"))
    await passes(at, at.drain("goes-on"))
    (told,) = await desk.redrive()
    assert told["newer"] == {"count": 0, "position": None}


# Lane keys


async def test_a_paused_key_waits_in_its_order_and_no_other_does(at: Bench, shop: Shop, desk: Desk) -> None:
    shop.sick = False
    await at.load(shop.on)
    drain = at.drain("goes-on")
    assert (await desk.pause("goes-on", "7"))["changed"]
    assert not (await desk.pause("goes-on", '["7"]'))["changed"]
    for n, group in enumerate([7, 8, 7, 9, 7]):
        await at.put("items", item(n, group))
    await passes(at, drain)
    assert sorted(await at.log()) == [1, 3]
    # Another worker, later: nothing of it is in memory.
    drain = at.drain("goes-on")
    await at.put("items", item(5, 7))
    await passes(at, drain)
    assert sorted(await at.log()) == [1, 3]
    await desk.resume("goes-on", "7")
    assert desk.woken == [at.lane_of("goes-on", item(1, 7))]
    await at.put("items", item(6, 7))
    await passes(at, drain)
    assert (await at.log())[2:] == [0, 2, 4, 5, 6]
    assert await at.rows("held") == []
    with pytest.raises(Unknown, match="is not paused"):
        await desk.resume("goes-on", "7")
    assert await at.rows("audit", "id, action, lane_key") == [
        (1, "pause", '["7"]'),
        (2, "resume", '["7"]'),
    ]


async def test_pausing_a_key_stops_what_is_held_and_parked_of_it(at: Bench, shop: Shop, desk: Desk) -> None:
    await at.load(shop.on)
    await at.put("items", item(1, 7, "poison"))
    await passes(at, at.drain("halts"))
    await at.put("items", item(2, 7))  # behind the dead letter
    await passes(at, at.drain("halts"), 1)
    await desk.pause("halts")
    await at.put("items", item(3, 7))
    await at.put("items", item(4, 8))
    await passes(at, at.drain("halts"), 1)
    await desk.pause("halts", "7")
    await desk.resume("halts")
    shop.sick = False
    await desk.redrive()
    await passes(at, at.drain("halts"))
    assert await at.log() == [4]
    await desk.resume("halts", "7")
    await passes(at, at.drain("halts"))
    assert await at.log() == [4, 1, 2, 3]


async def test_a_change_of_two_keys_waits_if_one_is_paused_and_holds_back_the_other(
    at: Bench, shop: Shop, desk: Desk
) -> None:
    shop.sick = False
    await at.load(shop.on)
    one, other = at.groups("goes-on")[:2]
    drain = at.drain("goes-on")
    await desk.pause("goes-on", str(other))
    await at.put("items", item(1, one))
    await at.put("items", item(2, other), item(2, one))
    await at.put("items", item(3, one))
    await passes(at, drain)
    assert await at.log() == [1]
    await desk.resume("goes-on", str(other))
    await passes(at, drain, 4)
    assert await at.log() == [1, 2, 3]


@pytest.mark.parametrize("also_held", [False, True])
async def test_a_paused_derive_key_stands_for_what_came_meanwhile(
    at: Bench, shop: Shop, desk: Desk, *, also_held: bool
) -> None:
    await at.load(shop.on)
    drain = at.drain("sums")
    if also_held:
        await desk.pause("sums")
        await at.put("items", item(1, 7))
        await passes(at, drain)
        await desk.resume("sums")
    await desk.pause("sums", "7")
    for n, group in enumerate([7, 8, 7]):
        await at.put("items", item(n, group))
    await passes(at, drain)
    assert shop.groups == [8]
    assert (await at.counters())[1] == 2 + also_held
    await desk.resume("sums", "7")
    await passes(at, drain)
    assert shop.groups == [8, 7]
    assert (await at.counters())[:2] == (3 + also_held, 0)
    assert await at.rows("held") == []


async def test_a_paused_derive_key_is_computed_for_a_backfill_too(at: Bench, shop: Shop, desk: Desk) -> None:
    await at.load(shop.on)
    drain = at.drain("sums")
    await desk.pause("sums", "7")
    sums = next(one for one in at.handlers if one.name == "sums")
    await at.journal.put_keys(sums, [b'["7"]', b'["8"]'])
    await passes(at, drain)
    assert shop.groups == [8]
    await desk.resume("sums", "7")
    await passes(at, drain)
    assert shop.groups == [8, 7]
    assert await at.rows("held") == []


async def test_a_paused_handler_calls_nobody_until_it_is_resumed(at: Bench, shop: Shop, desk: Desk) -> None:
    shop.sick = False
    await at.load(shop.on)
    drain = at.drain("goes-on")
    assert await desk.pause("goes-on") == {
        "handler": "goes-on",
        "lane_key": None,
        "paused": True,
        "changed": True,
        "paused_keys": 0,
    }
    assert not (await desk.pause("goes-on"))["changed"]
    await at.put("items", item(1, 7))
    await passes(at, drain)
    assert await at.log() == []
    (told,) = await desk.operations.lanes("goes-on")
    assert (told["paused"], told["parked"], told["applied"]) == (True, 1, 0)
    await desk.resume("goes-on")
    assert len(desk.woken) == at.lane_count
    await passes(at, drain)
    assert await at.log() == [1]


@pytest.mark.parametrize(
    ("handler", "key", "complaint"),
    [
        ("nobody", None, "there is no handler nobody"),
        ("nobody", "7", "there is no handler nobody"),
        ("goes-on", "seven", 'the value for "grp" is no integer'),
        ("goes-on", '["7", "8"]', r"which are \(grp\)"),
    ],
)
async def test_what_cannot_be_paused_is_refused(
    at: Bench, shop: Shop, desk: Desk, handler: str, key: str | None, complaint: str
) -> None:
    await at.load(shop.on)
    for paused in (True, False):
        with pytest.raises(Refused, match=complaint):
            await desk.operations.pause(ANNA, handler, key, paused=paused)
    assert await at.rows("audit") == []


async def test_a_lane_key_is_read_as_its_column_has_it(at: Bench, desk: Desk) -> None:
    on = Handlers()

    @on.change("pairs", name="pairs")
    async def pairs(change: Change, session: AsyncSession) -> None: ...

    await at.load(on)
    key = '["01", "C0FFEE00-0000-4000-8000-000000000001"]'
    told = await desk.pause("pairs", key)
    assert told["lane_key"] == '["public.pairs","1","c0ffee00-0000-4000-8000-000000000001"]'
    assert not (await desk.pause("pairs", told["lane_key"]))["changed"]
    drain = at.drain("pairs")
    await at.put("pairs", {"a": 1, "b": "c0ffee00-0000-4000-8000-000000000001", "amount": 1})
    ended = [(await drain.run(Lane("pairs", number))).ended for number in range(at.lane_count)]
    assert Pass.AWAY not in ended
    assert await at.count("tailrace.held where status = 'retrying'") == 1
    (listed,) = await desk.operations.lanes("pairs")
    assert listed["paused_keys"] == [told["lane_key"]]
