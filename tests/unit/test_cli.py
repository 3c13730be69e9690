"""The command line as a person uses it: started as a process, judged by its output and exit code."""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jwt
import pytest

from tests import forkserver

ROOT = Path(__file__).parents[2]
HANDLERS = """
from worker import Handlers

on = Handlers()


@on.derive("public.orders", by="customer_id", name="totals", batch=50)
async def totals(customer_ids, session): ...


@on.insert("public.orders", name="log")
@on.update("public.orders", columns=["status"], filter="status=eq.paid", name="log")
async def log(change, session): ...
"""
COMPLETE = {
    "SUPABASE_URL": "http://127.0.0.1:1",
    "SUPABASE_SERVICE_ROLE_KEY": jwt.encode({"role": "service_role"}, "a secret of at least 32 characters"),
    # Port 1 of loopback: nobody listens there, and a refusal comes at once.
    "DATABASE_URL": "postgresql://postgres:hunter2@127.0.0.1:1/postgres",
    "REDIS_URL": "redis://:hunter2@127.0.0.1:1/0",
    "HANDLERS": "shop",
    "PORT": "1",
}
STATE: dict[str, Any] = {
    "delivery": "plain",
    "ready": True,
    "reasons": [],
    "handlers": {"totals": {"read": 5, "applied": 3, "lag_seconds": 0.25, "paused": False}},
    "gaps": [{"id": 1}],
    "workers": ["one"],
    "backfills": [],
}


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    (tmp_path / "shop.py").write_text(HANDLERS)
    return tmp_path


def tailrace(
    directory: Path,
    *arguments: str,
    entry: tuple[str, ...] = (sys.executable, "-m", "worker"),
    **settings: str,
) -> "subprocess.CompletedProcess[str]":
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment["PYTHONPATH"] = str(ROOT)  # what is tested is this checkout, whichever one is installed
    command, environment = [*entry, *arguments], environment | settings
    if forkserver.forks(command, environment):
        return forkserver.run(command, environment, directory)
    return subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@contextmanager
def listening(content: bytes) -> Iterator[int]:
    """Something that answers every GET with the same content."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class calls it so
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def test_help_names_the_commands(tmp_path: Path) -> None:
    done = tailrace(tmp_path, "--help")
    assert done.returncode == 0
    for command in ("listen", "work", "run", "migrate", "handlers", "check", "status"):
        assert command in done.stdout


def test_help_of_a_command_loads_neither_drivers_nor_settings(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['tailrace', 'listen', '--help']\n"
        "import worker\n"
        "loaded = set(sys.modules)\n"
        "from worker.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as done: assert not done.code\n"
        "new = set(sys.modules) - loaded\n"
        "print('heavy:', sorted(new & {'config.settings', 'arq', 'supabase', 'uvicorn', 'worker.runtime'}))"
    )
    done = tailrace(tmp_path, "-c", code, entry=(sys.executable,))
    assert done.stdout.splitlines()[-1] == "heavy: []", done.stderr


def test_version(tmp_path: Path) -> None:
    done = tailrace(tmp_path, "--version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "tailrace")


@pytest.mark.parametrize("arguments", [("fly",), ("listen", "--loud"), ("migrate", "now")])
def test_bad_usage_is_2_and_no_traceback(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = tailrace(tmp_path, *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["listen", "work", "run", "migrate", "check", "status"])
def test_bad_configuration_is_2_with_one_line_for_each_problem(tmp_path: Path, command: str) -> None:
    done = tailrace(tmp_path, command, DATABASE_URL="mysql://u:hunter2@h/d", WORKER_LANES="many")
    lines = done.stderr.splitlines()
    assert done.returncode == 2
    assert [line.split()[:2] for line in lines] == [
        ["tailrace:", name]
        for name in ("WORKER_LANES", "SUPABASE_URL", "SUPABASE_SERVICE_ROLE_KEY", "DATABASE_URL", "REDIS_URL")
    ]
    assert "hunter2" not in done.stderr
    assert done.stdout == ""


def test_handlers_that_cannot_be_loaded_are_2_before_anything_is_opened(shop: Path) -> None:
    (shop / "broken.py").write_text("import nothing_of_this_name\n")
    done = tailrace(shop, "listen", **COMPLETE | {"HANDLERS": "shop,broken,absent"})
    lines = done.stderr.splitlines()
    assert done.returncode == 2
    assert len(lines) == 2
    assert all(line.startswith("tailrace: ") for line in lines)
    assert "nothing_of_this_name" in lines[0]
    assert "absent" in lines[1]


@pytest.mark.parametrize(
    "entry", [(sys.executable, "-m", "worker"), (str(Path(sys.executable).parent / "tailrace"),)]
)
def test_handlers_are_found_in_the_current_directory_and_listed(shop: Path, entry: tuple[str, ...]) -> None:
    done = tailrace(shop, "handlers", entry=entry, HANDLERS="shop")
    assert (done.returncode, done.stderr) == (0, "")
    for word in (
        "totals",
        "derive",
        "public.orders",
        "customer_id",
        "50",
        "status=eq.paid",
        "status changed",
    ):
        assert word in done.stdout


def test_handlers_as_json_have_the_options_in_force(shop: Path) -> None:
    done = tailrace(shop, "handlers", "--json", HANDLERS="shop", WORKER_BATCH="70", WORKER_MAX_ATTEMPTS="3")
    handlers = {handler["name"]: handler for handler in json.loads(done.stdout)}
    assert (handlers["totals"]["batch"], handlers["log"]["batch"]) == (50, 70)
    assert {handler["max_attempts"] for handler in handlers.values()} == {3}
    (totals,) = handlers["totals"]["subscriptions"]
    assert totals["table"] == "public.orders"
    assert totals["lane_key"] == ["customer_id"]
    by_type = {tuple(one["types"]): one for one in handlers["log"]["subscriptions"]}
    assert by_type[("UPDATE",)]["columns"] == ["status"]
    assert by_type[("INSERT",)]["columns"] == []


def test_no_handler_at_all_is_2(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("from worker import Handlers\non = Handlers()\n")
    done = tailrace(tmp_path, "handlers", HANDLERS="empty")
    assert done.returncode == 2
    assert "has no handler" in done.stderr


def test_check_reports_every_server_that_is_away_and_no_secret(shop: Path) -> None:
    done = tailrace(shop, "check", **COMPLETE, WORKER_LANESS="3")
    assert (done.returncode, done.stderr) == (1, "")
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines() if not line.startswith(" ")]
    states = {(state, name) for state, name, _ in lines}
    assert states == {
        ("ok", "settings"),
        ("warning", "settings"),
        ("ok", "handlers"),
        ("problem", "key"),
        ("note", "jwks"),
        ("skipped", "delivery"),
        ("skipped", "pooler"),
        ("problem", "database"),
        ("problem", "redis"),
        ("problem", "realtime"),
        ("skipped", "clocks"),
    }
    assert "did you mean WORKER_LANES?" in done.stdout
    assert "hunter2" not in done.stdout
    assert COMPLETE["SUPABASE_SERVICE_ROLE_KEY"] not in done.stdout


def test_check_as_json_says_bad_configuration_too(tmp_path: Path) -> None:
    done = tailrace(tmp_path, "check", "--json")
    assert done.returncode == 2
    told = json.loads(done.stdout)
    assert told["ok"] is False
    assert {finding["state"] for finding in told["findings"]} == {"problem"}
    assert any(finding["detail"].startswith("REDIS_URL is not set") for finding in told["findings"])


def test_status_asks_the_listener(shop: Path) -> None:
    with listening(json.dumps(STATE).encode()) as port:
        table = tailrace(shop, "status", **COMPLETE | {"PORT": str(port)})
        as_json = tailrace(shop, "status", "--json", **COMPLETE | {"PORT": str(port)})
    assert (table.returncode, as_json.returncode) == (0, 0)
    assert json.loads(as_json.stdout) == STATE
    assert table.stdout.startswith("ready, plain delivery")
    for word in ("totals", "0.25", "gaps: 1"):
        assert word in table.stdout


def test_status_of_a_listener_that_is_not_ready_is_1_with_its_reasons(shop: Path) -> None:
    state = STATE | {"ready": False, "reasons": ["Redis cannot be reached"]}
    with listening(json.dumps(state).encode()) as port:
        done = tailrace(shop, "status", **COMPLETE | {"PORT": str(port)})
    assert done.returncode == 1
    assert "Redis cannot be reached" in done.stdout


def test_status_is_not_taken_in_by_somebody_elses_server(shop: Path) -> None:
    with listening(b"<html>hello</html>") as port:
        done = tailrace(shop, "status", **COMPLETE | {"PORT": str(port)})
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("tailrace: there is no listener")
    assert "hunter2" not in done.stderr


def test_migrate_can_print_its_sql_without_a_database(shop: Path) -> None:
    done = tailrace(shop, "migrate", "--sql", **COMPLETE)
    assert done.returncode == 0, done.stderr
    assert "create table tailrace.lanes" in done.stdout
