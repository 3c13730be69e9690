"""The log as it is written: one shape for everybody, no secrets, no rows."""

import io
import json
import logging
import logging.config
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import structlog
from arq.logs import default_log_config
from structlog.contextvars import bound_contextvars

from config.logging import configure_logging, write_log
from config.sampling import BURST, SECONDS
from config.settings import Settings

pytestmark = pytest.mark.logs_secrets

SECRET = "a-long-configured-secret"


@pytest.fixture(autouse=True)
def logging_put_back() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    configuration = structlog.get_config()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in ("arq", "arq.worker", "realtime", "sqlalchemy"):
        logging.getLogger(name).setLevel(logging.NOTSET)
        logging.getLogger(name).handlers.clear()
    logging.captureWarnings(capture=False)
    structlog.configure(**configuration)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def lines() -> Callable[..., list[dict[str, Any]]]:
    stream = io.StringIO()
    write_log(stream=stream, secrets=[SECRET, "pwd4"])
    return lambda: [json.loads(line) for line in stream.getvalue().splitlines()]


Lines = Callable[[], list[dict[str, Any]]]


def test_events_and_library_records_have_one_shape_with_the_context(lines: Lines) -> None:
    with bound_contextvars(handler="shop:totals", lane=3, position="5-1"):
        structlog.get_logger("worker.draining.drain").info("applied", changes=2)
        logging.getLogger("somebody").warning("retrying %s", "soon")
    ours, theirs = lines()
    assert ours["message"] == "applied"
    assert ours["changes"] == 2
    assert theirs["message"] == "retrying soon"
    for line, name, level in ((ours, "worker.draining.drain", "info"), (theirs, "somebody", "warning")):
        assert (line["logger"], line["level"]) == (name, level)
        assert (line["handler"], line["lane"], line["position"]) == ("shop:totals", 3, "5-1")
        assert line["time"].endswith("Z")


def test_secrets_are_hidden_by_value_shape_and_name_wherever_they_stand(lines: Lines) -> None:
    token = "eyJhbGciOiJIUzI1NiJ9.eyJyb2xlIjoic2VydmljZV9yb2xlIn0.c2lnbmF0dXJl"
    log = structlog.get_logger("worker")
    log.info("key %s", SECRET, nested={"list": [f"x{SECRET}y", {"deeper": (SECRET,)}]})
    log.info("address", url="postgresql://postgres:p%40ss:w@db/x", redis="redis://:only@h:1/0")
    log.info("token", header=f"Bearer {token}", query=f"wss://h/websocket?apikey={token}&vsn=1.0.0")
    log.info("named", password=1234, api_key="k", access_token=b"t", service_role_key="v", jwt_secret=None)
    log.info("new key sb_secret_abc123", error=ValueError(f"with {SECRET}"), thing=object())
    log.info("a short one: pwd4, but not inside pwd4567")
    logging.getLogger("httpx").warning("GET %s", f"https://h/?token={token}")
    text = json.dumps(lines())
    for hidden in (SECRET, token, "p%40ss", ":only@", "sb_secret_abc123", "1234,", '"k"'):
        assert hidden not in text
    assert "postgresql://postgres:[redacted]@db/x" in text
    assert "redis://:[redacted]@h:1/0" in text
    assert "a short one: [redacted], but not inside pwd4567" in text
    assert lines()[3]["jwt_secret"] is None


def test_exceptions_are_logged_without_secrets_and_without_rows(lines: Lines) -> None:
    def fail() -> None:
        raise ValueError(
            f"(asyncpg) duplicate key, {SECRET}\nDETAIL:  Key (email)=(ada@example.org) already exists.\n"
            "[SQL: insert into t values ($1, $2)]\n[parameters: ('ada@example.org', [1, 2])]\n"
            "(Background on this error at: https://sqlalche.me/e/20/gkpj)"
        )

    try:
        fail()
    except ValueError:
        structlog.get_logger("worker").exception("failed")
        logging.getLogger("somebody").exception("failed too")
    for line in lines():
        assert "ValueError: (asyncpg) duplicate key" in line["exception"]
        assert "Traceback" in line["exception"]
        assert "insert into t" in line["exception"]
        assert "ada@example.org" not in line["exception"]
        assert SECRET not in line["exception"]


def test_rows_are_hidden_by_name_and_counts_stay(lines: Lines) -> None:
    structlog.get_logger("worker").info(
        "change", record={"email": "ada"}, old_record=None, payload=b"{}", rows=3
    )
    (line,) = lines()
    assert (line["record"], line["old_record"], line["payload"], line["rows"]) == (
        "[redacted]",
        None,
        "[redacted]",
        3,
    )


def test_frames_that_the_realtime_client_logs_do_not_pass(lines: Lines) -> None:
    log = logging.getLogger("realtime._async.client")
    frame = "{'table': 'users', 'record': {'email': 'ada@example.org'}}"
    log.error("Unrecognized message format %r\n1 validation error", frame)
    log.error("join push error for channel realtime:x: {'email': 'ada@example.org'}")
    log.error("Error in AsyncTimer callback: ada@example.org", exc_info=ValueError(frame))
    log.info("send: ada@example.org")
    unrecognised, refused, timer = lines()
    assert "ada" not in json.dumps([unrecognised, refused, timer])
    assert unrecognised["message"] == "Unrecognized message format"
    assert unrecognised["size"] > len(frame)
    assert timer["error"] == "ValueError"
    assert "exception" not in timer


def test_a_position_is_written_as_text(lines: Lines) -> None:
    class Position(NamedTuple):
        lsn: int
        ordinal: int

        def __str__(self) -> str:
            return f"{self.lsn}-{self.ordinal}"

    with bound_contextvars(position=Position(5, 1)):
        structlog.get_logger("worker").info("applied")
    assert lines()[0]["position"] == "5-1"


def test_arq_is_heard_once_and_only_when_something_is_wrong(lines: Lines) -> None:
    logging.config.dictConfig(
        default_log_config(verbose=False)
    )  # what the arq command does after importing us
    stream = io.StringIO()
    write_log(stream=stream)
    logging.getLogger("arq.worker").info("  0.10s → drain()")
    logging.getLogger("arq.worker").warning("no such function")
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["no such function"]
    assert lines() == []


def test_arq_is_silent_per_job_even_when_its_command_configures_after_us(
    lines: Lines, capsys: pytest.CaptureFixture[str]
) -> None:
    logging.config.dictConfig(default_log_config(verbose=True))
    logging.getLogger("arq.worker").info("  0.10s → drain()")
    assert lines() == []
    assert capsys.readouterr().err == ""


def test_levels(lines: Lines) -> None:
    structlog.get_logger("worker").debug("too fine")
    stream = io.StringIO()
    write_log(level="debug", stream=stream)
    structlog.get_logger("worker").debug("fine enough")
    logging.getLogger("sqlalchemy.engine").info("select 1")
    assert lines() == []
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["fine enough"]


def test_a_terminal_gets_colours_and_a_file_of_that_format_none() -> None:
    terminal, file = Terminal(), io.StringIO()
    write_log(stream=terminal)
    structlog.get_logger("worker").info("hello", password="x")
    write_log(form="console", stream=file)
    structlog.get_logger("worker").info("hello", password="x")
    assert "\x1b[" in terminal.getvalue()
    assert "hello" in terminal.getvalue()
    assert "\x1b[" not in file.getvalue()
    assert "password=[redacted]" in file.getvalue()


def test_json_is_asked_for_on_a_terminal_too() -> None:
    terminal = Terminal()
    write_log(form="json", stream=terminal)
    structlog.get_logger("worker").info("hello")
    assert json.loads(terminal.getvalue())["message"] == "hello"


def test_configured_secrets_come_from_the_settings() -> None:
    stream = io.StringIO()
    settings = Settings(
        _env_file=None,
        supabase_url="https://abcdefgh.supabase.co",
        service_role_key="sb_secret_x",
        database_url="postgresql://postgres:db-password@h/d",
        redis_url="redis://:redis-password@h",
        jwt_secret="signing-secret",
        log_format="json",
    )
    configure_logging(settings, stream)
    structlog.get_logger("worker").info("db-password, redis-password, signing-secret")
    assert json.loads(stream.getvalue())["message"] == "[redacted], [redacted], [redacted]"


def test_of_the_same_complaint_there_are_so_many_lines_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("config.sampling._now", lambda: now)
    # A new one, for it takes its clock when it is made.
    stream = io.StringIO()
    write_log(stream=stream)
    log = structlog.get_logger("worker.draining.applying")

    def written() -> list[dict[str, Any]]:
        return [json.loads(line) for line in stream.getvalue().splitlines()]

    for n in range(50):
        log.warning("handler failed", handler="totals", error_class="ValueError", position=f"{n}-0", lane=n)
        logging.getLogger("somebody").error("retry %s", n)
        log.info("backfill begins", handler="totals")
    assert [line["message"] for line in written()].count("handler failed") == BURST
    assert len([line for line in written() if line["logger"] == "somebody"]) == BURST
    assert [line["message"] for line in written()].count("backfill begins") == 50
    # Another handler, another error: another complaint.
    log.warning("handler failed", handler="log", error_class="ValueError")
    log.warning("handler failed", handler="totals", error_class="KeyError")
    assert [line["message"] for line in written()].count("handler failed") == BURST + 2
    now += SECONDS
    log.warning("handler failed", handler="totals", error_class="ValueError")
    logging.getLogger("somebody").error("retry %s", 51)
    ours, theirs = written()[-2:]
    assert (ours["message"], ours["left_out"]) == ("handler failed", 50 - BURST)
    assert (theirs["message"], theirs["left_out"]) == ("retry 51", 50 - BURST)
    log.warning("handler failed", handler="totals", error_class="ValueError")
    assert "left_out" not in written()[-1]
