"""Settings as a person meets them: names in the environment, sentences when something is wrong."""

import base64
import json
import os
from pathlib import Path

import pytest

from config.declared import declared_settings, settings_table, unknown_settings
from config.settings import Settings, load_settings, load_tunables
from worker.errors import ConfigurationError


def jwt(**claims: object) -> str:
    def part(content: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip("=")

    return f"{part({'alg': 'HS256'})}.{part(claims)}.c2lnbmF0dXJl"


KEY = jwt(role="service_role", exp=4102444800)
COMPLETE = {
    "SUPABASE_URL": "https://abcdefgh.supabase.co/",
    "SUPABASE_SERVICE_ROLE_KEY": KEY,
    "DATABASE_URL": "postgres://postgres:s3cr%40t@db.example:6543/postgres",
    "REDIS_URL": "redis://:redispw@localhost:6379/1",
}


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for setting in declared_settings():
        for name in (setting.name, *setting.aliases):
            monkeypatch.delenv(name, raising=False)
    for name in [name for name in os.environ if name.startswith("WORKER_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in COMPLETE.items():
        monkeypatch.setenv(name, value)


def problems() -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    return caught.value.problems


@pytest.mark.usefixtures("complete")
def test_a_complete_environment_gives_typed_settings_with_the_documented_defaults() -> None:
    settings = load_settings()
    assert settings.supabase_url == "https://abcdefgh.supabase.co"
    assert settings.realtime_url == "wss://abcdefgh.supabase.co/realtime/v1"
    assert settings.service_role_key.get_secret_value() == KEY
    assert (
        settings.database_url.get_secret_value() == "postgresql://postgres:s3cr%40t@db.example:6543/postgres"
    )
    assert settings.redis_url.get_secret_value() == "redis://:redispw@localhost:6379/1"
    assert (settings.jwt_secret, settings.database_direct_url) == (None, None)
    assert settings.handlers == ("handlers",)
    assert (settings.port, settings.health_host, settings.health_port) == (8080, "127.0.0.1", None)
    assert (settings.delivery, settings.lanes, settings.batch) == ("auto", 16, 1000)
    assert (settings.max_backlog, settings.max_backlog_bytes) == (100_000, 256 * 1024 * 1024)
    assert (settings.lane_backlog, settings.max_attempts) == (20_000, 8)
    assert (settings.backoff_seconds, settings.backoff_max_seconds) == (1, 600)
    assert (settings.handler_timeout, settings.drain_seconds, settings.canary_seconds) == (30, 25, 5)
    assert (settings.slot, settings.publication, settings.queue) == (
        "tailrace",
        "supabase_realtime",
        "tailrace",
    )
    assert (settings.operator_role, settings.log_level, settings.log_format) == (None, "info", "auto")


def test_everything_that_is_missing_is_named_at_once() -> None:
    lines = problems()
    assert [line.split()[0] for line in lines] == [
        "SUPABASE_URL",
        "SUPABASE_SERVICE_ROLE_KEY",
        "DATABASE_URL",
        "REDIS_URL",
    ]
    assert all("is not set" in line for line in lines)


def test_missing_and_bad_values_are_told_together_by_their_environment_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong = {
        "WORKER_LANES": "many",
        "WORKER_BATCH": "0",
        "WORKER_MAX_BACKLOG_BYTES": "3 sacks",
        "WORKER_HANDLER_TIMEOUT": "nan",
        "WORKER_CANARY_SECONDS": "60",
        "WORKER_DELIVERY": "certain",
        "WORKER_SLOT": "Not-A-Slot",
        "WORKER_BACKOFF_SECONDS": "900",
        "WORKER_HEALTH_PORT": "8080",
        "HANDLERS": "shop/handlers",
        "PORT": "70000",
    }
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    named = {line.split()[0] for line in problems()}
    # The default of the longest backoff is below the first step that was asked for.
    assert named == (set(wrong) - {"WORKER_BACKOFF_SECONDS", "WORKER_HEALTH_PORT"}) | {
        "WORKER_BACKOFF_MAX_SECONDS",
        "SUPABASE_URL",
        "SUPABASE_SERVICE_ROLE_KEY",
        "DATABASE_URL",
        "REDIS_URL",
    }


@pytest.mark.usefixtures("complete")
@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("SUPABASE_URL", "abcdefgh.supabase.co", "must begin with http:// or https://"),
        ("SUPABASE_URL", "https://supabase.com/dashboard/project/abc", "address of the dashboard"),
        ("SUPABASE_URL", "https://", "names no host"),
        ("REALTIME_URL", "tcp://localhost", "must begin with ws:// or wss://"),
        ("DATABASE_URL", "https://abcdefgh.supabase.co", "must begin with postgresql:// or postgres://"),
        ("DATABASE_URL", "postgresql://postgres:[YOUR-PASSWORD]@db.example/postgres", "placeholder"),
        ("DATABASE_URL", "postgresql://postgres:hunter@2@db.example/postgres", "%40"),
        ("DATABASE_URL", "postgresql://postgres:hun/ter2@db.example/postgres", "%2F"),
        ("DATABASE_URL", "postgresql:///postgres", "names no host"),
        ("DATABASE_DIRECT_URL", "mysql://hunter2@db.example/postgres", "must begin with postgresql://"),
        ("REDIS_URL", "localhost:6379", "must begin with redis://, rediss:// or unix://"),
        ("REDIS_URL", "redis://:hunter2@localhost/first", "number of a database"),
        ("REDIS_URL", "unix://", "names no socket"),
        ("SUPABASE_SERVICE_ROLE_KEY", "sb_publishable_hunter2", "publishable key"),
        ("SUPABASE_SERVICE_ROLE_KEY", jwt(role="anon"), "the key of role anon"),
        ("SUPABASE_SERVICE_ROLE_KEY", "hunter2", "neither a JWT nor an sb_secret_"),
        ("SUPABASE_SERVICE_ROLE_KEY", "hun.ter.2", "neither a JWT nor an sb_secret_"),
        ("WORKER_HEALTH_PORT", "8080", "must differ from PORT"),
    ],
)
def test_what_people_paste_instead_is_recognised_and_never_repeated(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, told: str
) -> None:
    monkeypatch.setenv(name, value)
    (line,) = problems()
    assert line.startswith(f"{name} ")
    assert told in line
    assert "hunter" not in line
    assert jwt(role="anon") not in line


@pytest.mark.usefixtures("complete")
@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("postgresql+asyncpg://u:p@h/d", "postgresql://u:p@h/d"),
        (
            "postgresql://u:p@h:6543/d?pgbouncer=true&connection_limit=1&sslmode=require",
            "postgresql://u:p@h:6543/d?sslmode=require",
        ),
        (
            "postgresql://u:p@/d?host=/var/run/postgresql",
            "postgresql://u:p@/d?host=%2Fvar%2Frun%2Fpostgresql",
        ),
        ("postgresql:///d?host=h", "postgresql:///d?host=h"),
        (" postgres://u@[::1]:5432/d ", "postgresql://u@[::1]:5432/d"),
    ],
)
def test_database_urls_are_kept_in_one_form(monkeypatch: pytest.MonkeyPatch, given: str, kept: str) -> None:
    monkeypatch.setenv("DATABASE_URL", given)
    assert load_settings().database_url.get_secret_value() == kept


@pytest.mark.usefixtures("complete")
@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("ws://localhost:4000/socket", "ws://localhost:4000/socket"),
        ("ws://localhost:4000/socket/websocket", "ws://localhost:4000/socket"),
        ("https://abc.supabase.co/realtime/v1/", "wss://abc.supabase.co/realtime/v1"),
    ],
)
def test_realtime_may_be_elsewhere(monkeypatch: pytest.MonkeyPatch, given: str, kept: str) -> None:
    monkeypatch.setenv("REALTIME_URL", given)
    assert load_settings().realtime_url == kept


@pytest.mark.usefixtures("complete")
@pytest.mark.parametrize(
    "url", ["unix:///run/redis.sock", "rediss://user:pw@host:6380/0", "redis://localhost"]
)
def test_redis_urls_of_each_kind(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("REDIS_URL", url)
    assert load_settings().redis_url.get_secret_value() == url


@pytest.mark.usefixtures("complete")
@pytest.mark.parametrize("alias", ["SUPABASE_SECRET_KEY", "SUPABASE_SERVICE_KEY", "SUPABASE_KEY"])
def test_the_service_key_has_aliases(monkeypatch: pytest.MonkeyPatch, alias: str) -> None:
    monkeypatch.delenv("SUPABASE_SERVICE_ROLE_KEY")
    monkeypatch.setenv(alias, "sb_secret_abc")
    assert load_settings().service_role_key.get_secret_value() == "sb_secret_abc"


@pytest.mark.usefixtures("complete")
def test_the_file_is_read_and_the_environment_goes_before_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text(
        "WORKER_LANES=4\nWORKER_BATCH=7\nHANDLERS=shop.orders, shop.mail\n"
        "SUPABASE_SERVICE_ROLE_KEY=sb_secret_file\nUNRELATED=1\nWORKER_SLOT=\n"
    )
    monkeypatch.setenv("WORKER_LANES", "8")
    monkeypatch.delenv("SUPABASE_SERVICE_ROLE_KEY")
    monkeypatch.setenv("SUPABASE_KEY", "sb_secret_environment")
    settings = load_settings()
    assert (settings.lanes, settings.batch, settings.slot) == (8, 7, "tailrace")
    assert settings.handlers == ("shop.orders", "shop.mail")
    assert settings.service_role_key.get_secret_value() == "sb_secret_environment"


@pytest.mark.usefixtures("complete")
def test_an_empty_value_is_a_missing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "")
    monkeypatch.setenv("WORKER_LANES", "")
    (line,) = problems()
    assert line.startswith("REDIS_URL is not set")


def test_a_file_that_cannot_be_read_is_a_problem_of_configuration(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"REDIS_URL=\xff\xfe")
    (line,) = problems()
    assert ".env cannot be read" in line


@pytest.mark.usefixtures("complete")
def test_secrets_are_in_no_representation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUPABASE_JWT_SECRET", "jwt-signing-secret")
    settings = load_settings()
    shown = f"{settings!r} {settings} {settings.model_dump()}"
    for secret in settings.secret_values():
        assert secret not in shown
    assert set(settings.secret_values()) == {KEY, "jwt-signing-secret", "s3cr%40t", "s3cr@t", "redispw"}


@pytest.mark.usefixtures("complete")
def test_settings_do_not_change() -> None:
    settings = load_settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.lanes = 3


def test_tunables_need_no_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANDLERS", "shop")
    assert load_tunables().handlers == ("shop",)


def test_sizes_may_have_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_MAX_BACKLOG_BYTES", "64MiB")
    assert load_tunables().max_backlog_bytes == 64 * 1024 * 1024


def test_a_slip_in_a_name_is_found_in_environment_and_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("WORKER_BATHC=3\n")
    monkeypatch.setenv("WORKER_LANESS", "3")
    monkeypatch.setenv("WORKER_LANES", "3")
    assert unknown_settings() == [
        "WORKER_BATHC is not a setting: did you mean WORKER_BATCH?",
        "WORKER_LANESS is not a setting: did you mean WORKER_LANES?",
    ]


def test_the_readme_has_the_table_of_settings_as_it_is_declared() -> None:
    readme = Path(__file__).parents[2] / "README.md"
    assert settings_table() in readme.read_text(), "put the output of config.declared.settings_table() there"


def test_every_setting_is_in_the_table_with_its_reason() -> None:
    table = settings_table()
    assert len(declared_settings()) == len(Settings.model_fields)
    for setting in declared_settings():
        assert setting.reason.endswith(".")
        assert f"| `{setting.name}` |" in table
    assert "| `WORKER_MAX_BACKLOG_BYTES` | `256MiB` |" in table
    assert "| `DATABASE_URL` | **required** |" in table
