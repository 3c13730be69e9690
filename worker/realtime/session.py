"""The life of one socket: read, join, heartbeat, canary.

It only works, and ends with the reason why it cannot go on. Nothing is tried again here but a single
channel: whatever makes the socket doubtful ends it, and `source` starts the next one. What it finds goes to a
`Ledger`, which outlives it.
"""

import asyncio
import itertools
import math
import time
from collections.abc import Awaitable, Callable

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from worker.errors import TailraceError
from worker.realtime.canary import Written
from worker.realtime.connection import HEARTBEAT_TOPIC, Address, closing_words, heartbeat
from worker.realtime.frames import ChangeFrame, Frame, MalformedFrame, Reply, read_frame
from worker.realtime.ledger import Ledger
from worker.realtime.subscription import Outcome, Replace, Stage
from worker.realtime.timing import Timing


class SessionOver(TailraceError):  # noqa: N818 - the normal end of a session
    """The socket is no good any more.

    Args:
        cause: in words.
        answers: whether the other side can be expected to take part in a closing handshake.
    """

    def __init__(self, cause: str, *, answers: bool = True) -> None:
        self.cause = cause
        self.answers = answers
        super().__init__(cause)


class Session:
    """One socket from opening to end.

    Args:
        address: where to connect.
        ledger: what is known of the subscriptions; receives all that arrives.
        write_canary: writes a canary row, commits, returns its token.
        canary_seconds: between two canaries.
        timing: the waits.
    """

    def __init__(
        self,
        address: Address,
        ledger: Ledger,
        write_canary: Callable[[], Awaitable[str]],
        canary_seconds: float,
        timing: Timing,
    ) -> None:
        self._address, self._ledger, self._timing = address, ledger, timing
        self._write_canary, self._canary_seconds = write_canary, canary_seconds
        self._wake = asyncio.Event()
        self._canary_live = asyncio.Event()
        self._refs = itertools.count(1)
        self._heartbeat_due = 0.0
        self._unanswered: tuple[str, float] | None = None
        self._last_frame = self._last_change = self._fresh = time.monotonic()
        self._waiting_for_room = False
        self._opened = math.inf

    async def run(self) -> None:
        """Connect and work until the socket is no good any more.

        Raises:
            CannotConnect: there was no socket to begin with.
            SessionOver: always, in the end.
        """
        socket = await self._address.open(self._timing)
        over: SessionOver | None = None
        self._opened = self._fresh = self._last_frame = time.monotonic()
        self._heartbeat_due = self._opened + self._timing.heartbeat
        self._ledger.connected(self._opened)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read(socket), name="realtime: read frames")
                tasks.create_task(self._keep(socket), name="realtime: keep the socket alive")
                tasks.create_task(self._write_canaries(), name="realtime: write canaries")
        except* SessionOver as ends:
            over = next(end for end in ends.exceptions if isinstance(end, SessionOver))
        finally:
            self._ledger.disconnected(over.cause if over else "reading was stopped")
            if over is not None and not over.answers:
                socket.transport.abort()
            await socket.close()
        if over is not None:
            raise over

    async def _read(self, socket: ClientConnection) -> None:
        buffer = self._ledger.buffer
        while True:
            if buffer.full:
                # Not reading is the back-pressure. What has not been read cannot be missed either: the
                # deadlines for heartbeats and canaries start anew afterwards.
                self._waiting_for_room = True
                await buffer.room()
                self._waiting_for_room = False
                self._fresh = time.monotonic()
            try:
                text = await socket.recv(decode=False)
            except ConnectionClosed as error:
                raise SessionOver(closing_words(error)) from None
            self._last_frame = time.monotonic()
            try:
                frame = read_frame(text)
            except MalformedFrame as error:
                self._ledger.malformed(error, len(text), self._last_frame)
            else:
                self._take(frame)

    def _take(self, frame: Frame) -> None:
        if isinstance(frame, ChangeFrame):
            self._last_change = self._last_frame
            self._ledger.change(frame, self._last_frame)
        elif isinstance(frame, Reply) and frame.topic == HEARTBEAT_TOPIC:
            if self._unanswered is not None and frame.ref == self._unanswered[0]:
                self._unanswered = None
        else:
            self._act(self._ledger.subscriptions.frame(frame, self._last_frame))
            self._wake.set()

    def _act(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            if isinstance(outcome, Replace):
                raise SessionOver(outcome.cause)
            self._ledger.note(outcome)
        self._ledger.report()
        if self._ledger.subscriptions.canary.stage is Stage.SUBSCRIBED:
            self._canary_live.set()
        else:
            self._canary_live.clear()

    async def _keep(self, socket: ClientConnection) -> None:
        timing, subscriptions = self._timing, self._ledger.subscriptions
        while True:
            now = time.monotonic()
            joins, outcomes = subscriptions.tick(now)
            self._act(outcomes)
            for join in joins:
                await self._send(socket, self._address.join(join))
            if now >= self._heartbeat_due:
                self._heartbeat_due = now + timing.heartbeat
                ref = f"h{next(self._refs)}"
                # An unanswered one keeps its time: it is the older one that must not be forgotten.
                self._unanswered = self._unanswered or (ref, now)
                await self._send(socket, heartbeat(ref))
            self._check(now)
            self._ledger.tick(now)
            self._wake.clear()
            pause = min(subscriptions.next_due(), self._heartbeat_due, now + self._step()) - time.monotonic()
            try:
                async with asyncio.timeout(max(0.0, pause)):
                    await self._wake.wait()
            except TimeoutError:
                pass
            woken = time.monotonic()
            if woken - now > 2 * self._step():
                # It is we who were stopped or starved: the answers may lie unread in the socket.
                self._fresh = woken

    def _step(self) -> float:
        """Return how often the deadlines are looked at, in seconds."""
        return min(1.0, self._timing.heartbeat_reply / 4, self._timing.canary / 4)

    def _check(self, now: float) -> None:
        """End the session when the socket or what it carries has gone silent."""
        if self._waiting_for_room:
            return
        timing = self._timing
        if self._unanswered is not None:
            _, sent = self._unanswered
            if now - max(sent, self._last_frame, self._fresh) > timing.heartbeat_reply:
                raise SessionOver("the connection is dead: a heartbeat was not answered", answers=False)
            if self._last_frame > sent + timing.heartbeat_reply:
                self._unanswered = None  # other frames came since: it lives, whatever became of the answer
        silent = self._ledger.canary.waiting(now, self._fresh)
        # While changes flow, a canary may stand behind a long transaction; but not for ever.
        flowing = now - self._last_change < timing.canary / 3
        if silent > timing.canary * (4 if flowing else 1):
            raise SessionOver("silent: a canary did not come back through Realtime")
        if now - self._opened > timing.renew:
            raise SessionOver("the connection was renewed, as is done before its token expires")

    async def _send(self, socket: ClientConnection, text: str) -> None:
        try:
            async with asyncio.timeout(self._timing.heartbeat_reply):
                await socket.send(text)
        except ConnectionClosed as error:
            raise SessionOver(closing_words(error)) from None
        except TimeoutError:
            raise SessionOver("the connection is dead: it takes nothing", answers=False) from None

    async def _write_canaries(self) -> None:
        ledger = self._ledger
        while True:
            await self._canary_live.wait()
            written = Written(time.monotonic(), ledger.now())
            try:
                async with asyncio.timeout(self._timing.canary):
                    token = await self._write_canary()
            except Exception as error:  # noqa: BLE001 - the database is away or not migrated: said in health
                ledger.canary_failed(type(error).__name__)
            else:
                ledger.canary_written(token, written)
            await asyncio.sleep(max(0.0, written.clock + self._canary_seconds - time.monotonic()))
