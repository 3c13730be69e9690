"""Our own scenarios: text files in `scenarios/`, one step a line, with the frames that must come after it.

They tell the same stories as the recordings, in words and tables of our own, so that the suite is whole
without the recordings. The promised frames were recorded from the stand-in while it agreed with the
recordings (`record`).

    # a comment
    setting NAME VALUE              a setting of the stand-in
    token NAME CLAIMS [SECONDS]     claims as JSON; the token lives for an hour unless told otherwise
    sql[@SESSION] STATEMENT         followed by a fence, so that each statement is judged by itself
    sql+[@SESSION] STATEMENT        the same without the fence
    fails STATEMENT                 Postgres must refuse it
    open CONN TOKEN [VSN]           TOKEN names one, or is `-` for no key
    join CONN TOPIC REF BINDINGS    BINDINGS as JSON, or the whole payload as an object
    leave CONN TOPIC REF [JOIN_REF]
    send CONN FRAME
    close CONN
    check | expire | fence          look at the publication; wait for the tokens' end; wait for all changes
    < CONN @N FRAME                 a frame that must come; @N names its transaction, - none
    refused CONN STATUS BODY        the handshake must be refused
    closed CONN CODE                the server must close the connection

A line that begins with blanks goes on the line before.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from tests.conformance.frames import Frame, parse
from tests.conformance.script import (
    CheckPublication,
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
    Step,
    Token,
)

FOLDER = Path(__file__).parent / "scenarios"
_LIFETIME = 3600.0
_ROLES = ("service_role", "authenticated", "anon")


def names() -> list[str]:
    """Names of all scenario files."""
    return sorted(path.stem for path in FOLDER.glob("*.scenario"))


def lines(name: str) -> list[str]:
    """The logical lines of a scenario: comments and blank lines kept, continued lines joined."""
    joined: list[str] = []
    for line in (FOLDER / f"{name}.scenario").read_text().split("\n"):
        if line.startswith(" ") and line.strip():
            joined[-1] += "\n" + line
        else:
            joined.append(line)
    return joined


def load(name: str) -> Script:
    """Read one scenario. Raises ValueError naming the line that cannot be read."""
    script = Script(name, tokens={role: Token({"role": role}, _LIFETIME) for role in _ROLES})
    versions: dict[str, str] = {}
    for line in lines(name):
        try:
            script.steps.extend(steps_of(line, script, versions))
        except (ValueError, KeyError, IndexError) as error:
            raise ValueError(f"{name}: cannot read {line[:80]!r}: {error!r}") from error
    return script


def steps_of(line: str, script: Script, versions: dict[str, str]) -> Iterator[Step]:
    """Make the steps of one line; settings, tokens and the connections' versions are noted."""
    word, _, rest = line.partition(" ")
    if not word or word == "#":
        return
    kind, _, session = word.partition("@")
    match kind:
        case "setting":
            key, value = rest.split(" ", 1)
            script.settings[key] = json.loads(value)
        case "token":
            key, claims = rest.split(" ", 1)
            script.tokens[key] = _token(claims)
        case "sql" | "sql+" | "fails":
            yield Sql(rest, session or "main", fails=kind == "fails")
            if kind != "sql+":
                yield Fence()
        case "check":
            yield CheckPublication()
        case "expire":
            yield Expire()
        case "fence":
            yield Fence()
        case _:
            yield _connection_step(kind, rest.split(" ", 1), versions)


def _connection_step(kind: str, parts: list[str], versions: dict[str, str]) -> Step:
    conn, rest = parts[0], parts[1] if len(parts) > 1 else ""
    step: Step
    match kind:
        case "open":
            step = _open(conn, rest.split(" "), versions)
        case "join" | "leave":
            step = Send(conn, _message(versions[conn], kind, rest))
        case "send":
            step = Send(conn, rest)
        case "close":
            step = Close(conn)
        case "<":
            commit, text = rest.split(" ", 1)
            step = Receive(conn, _frame(text, None if commit == "-" else commit))
        case "refused":
            status, _, body = rest.partition(" ")
            step = Refused(conn, int(status), body)
        case "closed":
            step = Closed(conn, int(rest))
        case _:
            raise ValueError(f"{kind!r} is no step")
    return step


def _token(text: str) -> Token:
    claims, end = json.JSONDecoder().raw_decode(text)
    match text[end:].split():
        case []:
            return Token(claims, _LIFETIME)
        case ["none"]:
            return Token(claims)
        case ["forged"]:
            return Token(claims, _LIFETIME, valid=False)
        case [seconds]:
            return Token(claims, float(seconds))
    raise ValueError("after the claims: seconds to live, `none` for no end, or `forged`")


def _open(conn: str, words: list[str], versions: dict[str, str]) -> Open:
    token, version = words[0], words[1] if len(words) > 1 else ""
    versions[conn] = version or "1.0.0"
    key = {"-": "", "garbage": "apikey=garbage"}.get(token, f"apikey={{{{{token}}}}}")
    query = "&".join(filter(None, (key, f"vsn={version}" if version else "")))
    return Open(conn, f"/realtime/v1/websocket?{query}")


def _config(bindings: object) -> dict[str, object]:
    return {
        "config": {"broadcast": {"self": False}, "presence": {"enabled": False}, "postgres_changes": bindings}
    }


def _message(version: str, kind: str, rest: str) -> str:
    """Make the frame of a join or leave, from what stands behind the connection's name."""
    payload: object
    if kind == "join":
        topic, ref, text = rest.split(" ", 2)
        payload = json.loads(text)
        payload = payload if isinstance(payload, dict) else _config(payload)
        join_ref: str | None = ref
    else:
        topic, ref, *named = rest.split(" ")
        payload = {}
        join_ref = named[0] if named else None
    topic, event = f"realtime:{topic}", f"phx_{kind}"
    if version == "2.0.0":
        return json.dumps([join_ref, ref, topic, event, payload])
    message = {"topic": topic, "event": event, "payload": payload, "ref": ref}
    return json.dumps(message if join_ref is None else {**message, "join_ref": join_ref})


def _frame(text: str, commit: str | None) -> Frame:
    message = parse(text)
    topic, event = (
        (message[2], message[3]) if isinstance(message, list) else (message["topic"], message["event"])
    )
    return Frame(topic, event, text, commit, None)
