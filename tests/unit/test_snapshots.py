"""Which transactions a snapshot shows, of whose ids the log tells 32 bits."""

import pytest

from worker.positions import Snapshot

EPOCH = 2**32


@pytest.mark.parametrize(
    ("text", "xid", "shown"),
    [
        ("100:100:", 99, True),
        ("100:100:", 100, False),
        ("90:100:90,95", 89, True),
        ("90:100:90,95", 90, False),
        ("90:100:90,95", 94, True),
        ("90:100:90,95", 95, False),
        ("90:100:90,95", 100, False),
        ("90:100:90,95", 100 + 2**31 - 1, False),
        (f"{EPOCH + 5}:{EPOCH + 5}:", EPOCH - 1, True),
        (f"{EPOCH + 5}:{EPOCH + 5}:", 4, True),
        (f"{EPOCH + 5}:{EPOCH + 5}:", 5, False),
        (f"{EPOCH - 3}:{EPOCH + 5}:{EPOCH - 3},{EPOCH + 2}", EPOCH - 3, False),
        (f"{EPOCH - 3}:{EPOCH + 5}:{EPOCH - 3},{EPOCH + 2}", EPOCH - 2, True),
        (f"{EPOCH - 3}:{EPOCH + 5}:{EPOCH - 3},{EPOCH + 2}", 2, False),
        (f"{EPOCH - 3}:{EPOCH + 5}:{EPOCH - 3},{EPOCH + 2}", 3, True),
        ("100:100:", EPOCH - 1, False),
    ],
)
def test_what_had_ended_is_shown_and_nothing_else(text: str, xid: int, shown: bool) -> None:  # noqa: FBT001 - a column of the table
    assert Snapshot.parse(text).shows(xid) is shown
