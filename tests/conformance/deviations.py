"""Every allowed deviation of the stand-in from the recorded server, frame by frame.

The table is checked in both directions: a difference that is not here fails the suite, and so does a row
whose difference does not occur any more. `standin/README.md` tells the reasons to people.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Deviation:
    """One allowed deviation.

    Attributes:
        scenario: the plan's name.
        frame: where, as the comparison names it: connection, topic, number of the frame; `*` stands for any
            text.
        reason: why the stand-in deviates.
        instead: a text that what came instead must contain.
    """

    scenario: str
    frame: str
    reason: str
    instead: str = ""


DEVIATIONS: tuple[Deviation, ...] = (
    Deviation("auth", "unknown_tenant handshake", "one project, whatever the Host header says"),
    Deviation(
        "auth", "badpath handshake", "serves the hosted path /realtime/v1/websocket, which a gateway maps"
    ),
)
