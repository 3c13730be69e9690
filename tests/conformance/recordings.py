"""Recordings of the real server, read from beside the checkout and made into scripts.

The recordings are not part of this repository: `TAILRACE_TRANSCRIPTS` names their directory, else
`../shared/transcripts` is tried. What a recording cannot say about itself (statements it names but does not
hold, frames that an earlier recording caused) stands in `plans`.
"""

import base64
import gzip
import hashlib
import hmac
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.conformance.frames import Labels, normalise
from tests.conformance.plans import PLANS, Plan
from tests.conformance.script import (
    Close,
    Closed,
    Expire,
    Fence,
    Open,
    Receive,
    Refused,
    Script,
    Send,
    Sql,
    Token,
)

_ROOT = Path(__file__).resolve().parents[2]
_JWT = re.compile(r"eyJ[\w-]+\.[\w-]+\.[\w-]+")
# The secret of Supabase's local development, which the recordings' tokens are signed with.
_RECORDED_SECRET = b"super-secret-jwt-token-with-at-least-32-characters-long"
# The real server polls at least every 0.5 s: after such a pause every earlier change had been judged.
_POLLED = 0.6
# Tokens that live at most this long were made to expire during the recording.
_SHORT_LIFE = 60.0


def directory() -> Path | None:
    """Return the directory of the recordings, or None when they are not at hand."""
    named = os.environ.get("TAILRACE_TRANSCRIPTS")
    found = Path(named) if named else _ROOT.parent / "shared" / "transcripts"
    return found if any(found.glob("00_smoke.jsonl*")) else None


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a recording."""

    t: float
    dir: str
    raw: str
    conn: str = ""


def read(name: str) -> list[Entry]:
    """Read one recording, packed or not. Raises FileNotFoundError when it is not there."""
    folder = directory()
    if folder is None:
        raise FileNotFoundError("the recordings are not at hand")
    path = folder / f"{name}.jsonl"
    if path.exists():
        text = path.read_text()
    else:
        text = gzip.decompress((folder / f"{name}.jsonl.gz").read_bytes()).decode()
    # Not splitlines: a recorded value holds U+2028.
    return [_entry(json.loads(line)) for line in text.split("\n") if line]


def load(name: str) -> Script:
    """Make the script of one plan. Raises FileNotFoundError when its recording is not there."""
    plan = PLANS[name]
    return _Loader(name, plan, read(plan.recording)).load()


def _entry(line: dict[str, Any]) -> Entry:
    raw = line["raw"] if isinstance(line["raw"], str) else json.dumps(line["raw"])
    return Entry(line["t"], line["dir"], raw, line.get("conn", ""))


class _Loader:
    def __init__(self, name: str, plan: Plan, entries: list[Entry]) -> None:
        self.plan = plan
        self.script = Script(name, settings=dict(plan.settings))
        self.entries = entries
        self.wall_start = datetime.fromisoformat(json.loads(entries[0].raw)["wall_start"]).timestamp()
        self.labels = Labels(is_now=self._during_recording)
        self.known_tokens: dict[str, str] = {}
        self.expiries: list[float] = []
        self.committed: float | None = None

    def load(self) -> Script:
        self.script.tokens.update(self.plan.tokens)
        self.script.steps.extend(map(Sql, self._prologue()))
        extra = sorted(self.plan.extra, key=lambda item: item[0])
        for index, entry in enumerate(self.entries):
            if entry.t < self.plan.since:
                continue
            while extra and extra[0][0] <= entry.t:
                moment, steps = extra.pop(0)
                self._act(moment)
                self.script.steps.extend(steps)
                self.committed = moment
            if entry.t > self.plan.until:
                break
            if not self.plan.dropped(entry.t, entry.dir, entry.raw):
                self._add(entry, self.entries[index + 1 :])
        return self.script

    def _prologue(self) -> Iterator[str]:
        if self.plan.first:
            yield self.plan.first
        for other in self.plan.tables_of:
            yield self._substituted(next(entry.raw for entry in read(other) if entry.dir == "sql"))
        yield from self.plan.prologue

    def _add(self, entry: Entry, later: list[Entry]) -> None:
        steps = self.script.steps
        match entry.dir:
            case "connect":
                self._act(entry.t)
                steps.append(self._open(entry))
            case "http_error":
                status, _, body = entry.raw.partition(" ")
                steps.append(Refused(entry.conn, int(status), body))
            case "send":
                self._act(entry.t)
                steps.append(Send(entry.conn, self._templated(entry)))
            case "recv":
                steps.append(Receive(entry.conn, normalise(entry.raw, self.labels)))
            case "sql":
                self._act(entry.t)
                steps.extend(self._sql(entry, later))
                self.committed = entry.t
            case "close":
                code = json.loads(entry.raw)["code"]
                if entry.conn in self.plan.server_closes:
                    steps.append(Closed(entry.conn, code))
                else:
                    self._act(entry.t)
                    steps.append(Close(entry.conn))

    def _act(self, moment: float) -> None:
        """Note that somebody acts at this moment, and what the recording shows to have happened before."""
        if self.committed is not None and moment - self.committed >= _POLLED:
            self.script.steps.append(Fence())
            self.committed = None
        if any(expiry < moment for expiry in self.expiries):
            self.script.steps.append(Expire())
            self.expiries = [expiry for expiry in self.expiries if expiry >= moment]

    def _open(self, entry: Entry) -> Open:
        url = urlsplit(self._templated(entry))
        headers = self.plan.headers.get(entry.conn, ())
        return Open(entry.conn, f"{url.path}?{url.query}" if url.query else url.path, headers)

    def _sql(self, entry: Entry, later: list[Entry]) -> Iterator[Any]:
        instead = self.plan.statements.get(entry.raw.strip())
        if instead is not None:
            yield from instead
            return
        after = next((e for e in later if e.dir in {"note", "sql", "send", "connect"}), None)
        fails = after is not None and after.dir == "note" and after.raw.startswith("sql error:")
        yield Sql(self._substituted(entry.raw), fails=fails)

    def _substituted(self, statement: str) -> str:
        for old, new in self.plan.substitutions:
            statement = statement.replace(old, new)
        return statement

    def _templated(self, entry: Entry) -> str:
        return _JWT.sub(lambda found: "{{" + self._token(found.group(), entry.t) + "}}", entry.raw)

    def _token(self, jwt: str, moment: float) -> str:
        if jwt not in self.known_tokens:
            signed, _, signature = jwt.rpartition(".")
            claims = json.loads(_unpadded(signed.partition(".")[2]))
            digest = hmac.new(_RECORDED_SECRET, signed.encode(), hashlib.sha256).digest()
            lifetime = None
            if "exp" in claims:
                lifetime = claims.pop("exp") - (self.wall_start + moment)
                if 0 < lifetime < _SHORT_LIFE:
                    self.expiries.append(moment + lifetime)
            claims.pop("iat", None)
            name = f"token{len(self.known_tokens) + 1}"
            self.known_tokens[jwt] = name
            self.script.tokens[name] = Token(claims, lifetime, valid=digest == _unpadded(signature))
        return self.known_tokens[jwt]

    def _during_recording(self, text: str) -> bool:
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            return False
        if moment.tzinfo is None:
            return False
        return -5 < moment.astimezone(UTC).timestamp() - self.wall_start < self.entries[-1].t + 5


def _unpadded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
