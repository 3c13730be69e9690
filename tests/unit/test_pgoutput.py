"""The decoder of pgoutput, on messages built here byte by byte: what a server sends seldom, or never."""

import struct
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.change import Column, LogChange, Position, RawChange, encode_columns
from worker.errors import MalformedChange
from worker.wal.pgoutput import (
    ABSENT,
    Begin,
    Commit,
    Decoder,
    LogicalMessage,
    Origin,
    Relation,
    Row,
    RowChange,
    Truncate,
    TypeName,
)
from worker.wal.transactions import Assembler

INT4, TEXT, JSONB = 23, 25, 3802
NAMES = {INT4: "int4", TEXT: "text", JSONB: "jsonb"}
YEAR_2000 = 946_684_800_000_000


def string(text: str) -> bytes:
    return text.encode() + b"\0"


def begin(lsn: int = 1000, committed: int = 5, xid: int = 7) -> bytes:
    return b"B" + struct.pack(">QqI", lsn, committed, xid)


def commit(lsn: int = 1000, end: int = 1100, committed: int = 5) -> bytes:
    return b"C" + struct.pack(">BQQq", 0, lsn, end, committed)


def relation(
    oid: int = 1,
    name: str = "orders",
    identity: str = "d",
    columns: Sequence[tuple[str, int, bool]] = (
        ("id", INT4, True),
        ("note", TEXT, False),
        ("doc", JSONB, False),
    ),
    schema: str = "public",
) -> bytes:
    parts = [b"R", struct.pack(">I", oid), string(schema), string(name), identity.encode()]
    parts.append(struct.pack(">H", len(columns)))
    for column, type_oid, key in columns:
        parts += [bytes([key]), string(column), struct.pack(">Ii", type_oid, -1)]
    return b"".join(parts)


def row(values: Row) -> bytes:
    parts = [struct.pack(">H", len(values))]
    for value in values:
        if value is None:
            parts.append(b"n")
        elif value is ABSENT:
            parts.append(b"u")
        else:
            assert isinstance(value, bytes)
            parts.append(b"t" + struct.pack(">I", len(value)) + value)
    return b"".join(parts)


def insert(values: Row, oid: int = 1) -> bytes:
    return b"I" + struct.pack(">I", oid) + b"N" + row(values)


def update(values: Row, old: Row | None = None, kind: bytes = b"K", oid: int = 1) -> bytes:
    before = b"" if old is None else kind + row(old)
    return b"U" + struct.pack(">I", oid) + before + b"N" + row(values)


def delete(old: Row, kind: bytes = b"K", oid: int = 1) -> bytes:
    return b"D" + struct.pack(">I", oid) + kind + row(old)


def truncate(*oids: int, options: int = 0) -> bytes:
    return b"T" + struct.pack(">IB", len(oids), options) + b"".join(struct.pack(">I", oid) for oid in oids)


def decode(*messages: bytes) -> list[Any]:
    decoder = Decoder()
    return [decoder.decode(message) for message in messages]


def assemble(*messages: bytes, assembler: Assembler | None = None) -> list[tuple[Position, RawChange]]:
    reading = assembler or Assembler(NAMES)
    for message in messages:
        assert reading.feed(message) is None
    batch = reading.take()
    return list(batch.changes) if batch else []


texts = st.binary(max_size=30)
values = st.one_of(st.none(), st.just(ABSENT), texts)


@given(st.lists(values, max_size=40))
def test_rows_come_back_as_they_were_written(written: Row) -> None:
    columns = [(f"c{place}", TEXT, False) for place in range(len(written))]
    *_, change = decode(begin(), relation(identity="f", columns=columns), insert(written))
    assert change.new == written
    assert change.old is None
    *_, change = decode(
        begin(), relation(identity="f", columns=columns), delete([v or b"" for v in written], b"O")
    )
    assert change.old == [v or b"" for v in written]


def test_begin_and_commit_carry_positions_time_and_transaction() -> None:
    assert decode(begin(2**40, 10, 2**32 - 1), commit(2**40, 2**40 + 50, 10)) == [
        Begin(2**40, YEAR_2000 + 10, 2**32 - 1),
        Commit(2**40, 2**40 + 50, YEAR_2000 + 10),
    ]


def test_a_key_tuple_says_nothing_of_other_columns() -> None:
    *_, change, gone = decode(
        begin(),
        relation(),
        update([b"2", b"a", None], old=[b"1", None, None]),
        delete([b"2", None, None]),
    )
    assert change.old == [b"1", ABSENT, ABSENT]
    assert gone.old == [b"2", ABSENT, ABSENT]


def test_an_update_without_old_row_kept_its_key() -> None:
    *_, change = decode(begin(), relation(), update([b"1", b"a", None]))
    assert change.old == [b"1", ABSENT, ABSENT]


def test_unchanged_toast_is_taken_from_a_full_old_row_only() -> None:
    *_, full = decode(
        begin(), relation(identity="f"), update([b"1", ABSENT, b"{}"], old=[b"1", b"long", None], kind=b"O")
    )
    assert full.new == [b"1", b"long", b"{}"]
    *_, key = decode(begin(), relation(), update([b"2", ABSENT, b"{}"], old=[b"1", None, None]))
    assert key.new == [b"2", ABSENT, b"{}"]


def test_ordinals_count_rows_and_truncated_tables_from_zero_in_each_transaction() -> None:
    messages = decode(
        begin(),
        relation(1),
        relation(2, "lines"),
        insert([b"1", None, None]),
        truncate(1, 2, options=3),
        b"Y" + struct.pack(">I", 9) + string("public") + string("mood"),
        insert([b"1", None, None], 2),
        commit(),
        begin(2000),
        delete([b"1", None, None], oid=2),
    )
    counted = [message.ordinal for message in messages if isinstance(message, RowChange | Truncate)]
    assert counted == [0, 1, 3, 0]
    assert messages[4].cascade
    assert messages[4].restart_identity
    assert messages[5] == TypeName(9, "public", "mood")


def test_messages_that_say_nothing_of_rows() -> None:
    origin, message = decode(
        b"O" + struct.pack(">Q", 77) + string("elsewhere"),
        b"M" + struct.pack(">BQ", 1, 99) + string("prefix") + struct.pack(">I", 3) + b"abc",
    )
    assert origin == Origin(77, "elsewhere")
    assert message == LogicalMessage(transactional=True, lsn=99, prefix="prefix", content=b"abc")
    assert assemble(begin(), b"O" + struct.pack(">Q", 77) + string("elsewhere"), commit()) == []


def test_a_table_described_anew_is_read_by_its_new_description() -> None:
    first, second = assemble(
        begin(),
        relation(),
        insert([b"1", b"a", None]),
        relation(columns=[("id", INT4, True), ("remark", TEXT, False)]),
        insert([b"2", b"b"]),
        commit(),
    )
    assert first[1].record == {"id": b"1", "note": b"a", "doc": None}
    assert second[1].record == {"id": b"2", "remark": b"b"}


@pytest.mark.parametrize("kind", [b"S", b"E", b"c", b"A", b"b", b"P", b"K", b"r", b"p", b"?"])
def test_messages_of_options_that_were_not_asked_for_are_refused(kind: bytes) -> None:
    with pytest.raises(MalformedChange, match="unexpected message"):
        Decoder().decode(kind + bytes(40))


def test_binary_values_are_refused() -> None:
    binary = (
        b"I" + struct.pack(">I", 1) + b"N" + struct.pack(">H", 3) + b"b" + struct.pack(">I", 1) + b"x" + b"nn"
    )
    with pytest.raises(MalformedChange, match="binary"):
        decode(begin(), relation(), binary)


@pytest.mark.parametrize(
    "messages",
    [
        [relation(), insert([b"1", None, None])],
        [begin(), begin()],
        [commit()],
        [begin(), insert([b"1", None, None])],
        [begin(), truncate(1)],
        [begin(), relation(), insert([b"1"])],
        [begin(), relation(), delete([b"1", None, None], kind=b"N")],
        [b""],
    ],
)
def test_what_cannot_come_is_refused(messages: list[bytes]) -> None:
    with pytest.raises(MalformedChange):
        decode(*messages)


whole = [
    begin(),
    commit(),
    relation(),
    insert([b"secret", ABSENT, None]),
    update([b"secret", b"x", None], old=[b"secret", None, None]),
    delete([b"secret", None, None]),
    truncate(1, 1),
    b"Y" + struct.pack(">I", 9) + string("public") + string("mood"),
]


@given(st.sampled_from(whole), st.data())
def test_a_message_cut_short_is_refused_without_telling_values(message: bytes, data: st.DataObject) -> None:
    decoder = Decoder()
    if message[:1] != b"B":
        decoder.decode(begin())
    decoder.decode(relation())
    part = message[: data.draw(st.integers(0, len(message) - 1))]
    with pytest.raises(MalformedChange) as refused:
        decoder.decode(part)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("length", [0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 30, 6])
def test_a_length_beyond_the_message_is_refused_whatever_its_sign(length: int) -> None:
    # 1 GB is the most that Postgres's values have; a length is no reason to ask for memory.
    damaged = b"I" + struct.pack(">I", 1) + b"N" + struct.pack(">H", 3) + b"nnt" + struct.pack(">I", length)
    with pytest.raises(MalformedChange):
        decode(begin(), relation(), damaged + b"short")


def test_a_value_of_many_megabytes_is_read_whole() -> None:
    value = bytes(range(256)) * (1 << 17)
    *_, change = decode(begin(), relation(), insert([b"1", value, None]))
    assert change.new == [b"1", value, None]


@given(st.binary(max_size=200))
def test_noise_is_refused_or_read_but_never_fails_otherwise(noise: bytes) -> None:
    decoder = Decoder()
    decoder.decode(begin())
    decoder.decode(relation())
    for kind in b"BCRYIUDTOM":
        try:
            decoder.decode(bytes([kind]) + noise)
        except MalformedChange:
            continue


def test_positions_are_commit_and_ordinal_whatever_is_left_out() -> None:
    own = relation(2, "lanes", schema="tailrace")
    canary = relation(3, "canary", schema="tailrace")
    changes = assemble(
        begin(),
        relation(),
        own,
        canary,
        insert([b"1", None, None], 2),
        insert([b"2", None, None], 1),
        insert([b"3", None, None], 3),
        truncate(2, 1),
        commit(),
    )
    assert [(position, change.table, change.type) for position, change in changes] == [
        ((1000, 1), "orders", "INSERT"),
        ((1000, 2), "canary", "INSERT"),
        ((1000, 4), "orders", "TRUNCATE"),
    ]
    assert [change.position for _, change in changes] == [position for position, _ in changes]


def test_reading_reaches_the_end_of_a_transaction_only_with_its_commit() -> None:
    reading = Assembler(NAMES)
    for message in (begin(), relation(), insert([b"1", None, None])):
        reading.feed(message)
    reading.pass_to(5000)  # a keepalive in the midst of a transaction says nothing
    first = reading.take()
    assert first is not None
    assert (first.read_to, first.open, len(first.changes)) == (0, True, 1)
    reading.feed(commit())
    second = reading.take()
    assert second is not None
    assert (second.read_to, second.open, len(second.changes)) == (1100, False, 0)
    assert reading.take() is None
    reading.pass_to(900)  # never back
    assert reading.take() is None
    reading.pass_to(1200)
    third = reading.take()
    assert third is not None
    assert (third.read_to, third.open) == (1200, False)


def test_commits_below_the_start_and_changes_handed_over_before_are_passed_over() -> None:
    messages = [
        *(begin(1000), relation(), insert([b"1", None, None]), commit(1000, 1100)),
        # The end of a transaction is often the commit LSN of the next.
        *(begin(1100), insert([b"2", None, None]), insert([b"3", None, None]), commit(1100, 1200)),
    ]
    from_end = assemble(*messages, assembler=Assembler(NAMES, 1100))
    assert [position for position, _ in from_end] == [(1100, 0), (1100, 1)]
    after = assemble(*messages, assembler=Assembler(NAMES, 1100, Position(1100, 0)))
    assert [position for position, _ in after] == [(1100, 1)]


def test_types_are_asked_for_before_they_are_needed() -> None:
    names: dict[int, str] = {INT4: "int4"}
    reading = Assembler(names)
    reading.feed(begin())
    assert reading.feed(relation()) == {TEXT, JSONB}
    names |= {TEXT: "text", JSONB: "jsonb"}
    assert reading.feed(relation()) is None
    reading.feed(insert([b"1", None, None]))
    batch = reading.take()
    assert batch is not None
    ((_, change),) = batch.changes
    assert change.columns == (Column("id", "int4", key=True), Column("note", "text"), Column("doc", "jsonb"))


rows = st.none() | st.lists(values, min_size=3, max_size=3)


@given(
    st.sampled_from(["INSERT", "UPDATE", "DELETE", "TRUNCATE"]),
    rows,
    rows,
    st.integers(0, 4 * 10**15),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**63),
    st.integers(0, 2**40),
)
def test_a_change_of_the_log_survives_its_lane(
    change_type: Any, record: Any, old: Any, committed: int, xid: int, lsn: int, ordinal: int
) -> None:
    columns = encode_columns(
        [Column("id", "int4", key=True), Column("näme", "text"), Column("doc", "_feelings", 16_400)]
    )
    written = RawChange.of_log(
        LogChange("public", "orders", change_type, columns, record, old, committed, xid, lsn, ordinal, 16_500)
    )
    read = RawChange.decode("wal", written.payload)
    assert read == written
    assert read.columns is written.columns
    assert read.columns[0].key
    assert [column.type_oid for column in read.columns] == [0, 0, 16_400]
    assert read.table_oid == 16_500
    assert read.position == (lsn, ordinal)
    if record is not None:
        assert read.record == {
            name: value
            for name, value in zip(("id", "näme", "doc"), record, strict=True)
            if value is not ABSENT
        }


def test_the_time_of_a_commit_keeps_its_microseconds() -> None:
    log = LogChange("s", "t", "TRUNCATE", encode_columns([]), None, None, YEAR_2000 + 1_000_123, 1, 1, 0)
    assert RawChange.of_log(log).commit_timestamp == "2000-01-01T00:00:01.000123+00:00"


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{}",
        b"\x90",
        RawChange.of_log(LogChange("s", "t", "INSERT", encode_columns([]), [], None, 0, 1, 1, 0)).payload[
            :-3
        ],
    ],
)
def test_a_damaged_payload_of_the_log_is_refused(payload: bytes) -> None:
    with pytest.raises(MalformedChange):
        RawChange.decode("wal", payload)


def test_a_payload_with_too_few_values_is_refused() -> None:
    columns = encode_columns([Column("id", "int4")])
    empty = RawChange.of_log(LogChange("s", "t", "INSERT", encode_columns([]), [], None, 0, 1, 1, 0)).payload
    damaged = empty.replace(b"\xc4\x01" + encode_columns([]), b"\xc4" + bytes([len(columns)]) + columns)
    assert damaged != empty
    with pytest.raises(MalformedChange):
        RawChange.decode("wal", damaged)


def test_relations_are_told_apart_by_identity_not_by_looks() -> None:
    first, second = decode(relation(), relation())
    assert isinstance(first, Relation)
    assert first != second
