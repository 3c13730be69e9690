"""The settings: read once from the environment and `.env`, checked, typed, frozen.

Nothing else reads the environment. Every setting is declared here with its unit, its default and the reason
for it; `config.declared` tells the same declarations in words. How a URL or a key has to look is in
`config.addresses`. This module opens nothing and logs nothing.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AliasChoices,
    BeforeValidator,
    ByteSize,
    Field,
    SecretStr,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from config.addresses import (
    database_address,
    http_address,
    realtime_address,
    redis_address,
    secret_parts,
    service_key,
)
from config.problems import problem
from worker.errors import ConfigurationError

_BYTES = TypeAdapter(ByteSize)

EnvFile = str | Path | None


def _setting(
    *names: str,
    reason: str,
    default: Any = ...,  # noqa: ANN401 - the default of any field
    unit: str = "",
    shown: str | None = None,
    **bounds: Any,  # noqa: ANN401 - handed on to pydantic
) -> Any:  # noqa: ANN401 - as pydantic's own Field
    """Declare a setting: environment names (aliases after the first), default, unit and reason."""
    extra: dict[str, Any] = {"unit": unit}
    if shown is not None:
        extra["shown"] = shown
    return Field(
        default,
        validation_alias=AliasChoices(*names),
        description=reason,
        json_schema_extra=extra,
        **bounds,
    )


def _modules(value: object) -> object:
    """Split a comma-separated list, as the environment carries it."""
    if isinstance(value, str):
        return tuple(part for part in (piece.strip() for piece in value.split(",")) if part)
    return value


def _bytes(value: object) -> object:
    """Read a size: a number of bytes, or one with a unit such as 256MiB."""
    if isinstance(value, str):
        try:
            return int(_BYTES.validate_python(value))
        except ValidationError:
            raise ValueError("must be a size such as 268435456 or 256MiB") from None
    return value


Modules = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_modules)]
Sorts = Annotated[tuple[Literal["integrity", "type"], ...], NoDecode, BeforeValidator(_modules)]
Bytes = Annotated[int, BeforeValidator(_bytes)]


class Tunables(BaseSettings):
    """Every setting that has a default: what a command needs that opens no connection."""

    model_config = SettingsConfigDict(
        env_file_encoding="utf-8",
        env_ignore_empty=True,  # NAME= in a .env means "not set"
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,  # inputs may be secrets
        populate_by_name=True,
        validate_default=True,
    )

    handlers: Modules = _setting(
        "HANDLERS",
        default=("handlers",),
        unit="comma-separated modules",
        reason="Modules or packages whose `on = Handlers()` is served; a package means all its modules.",
    )
    port: int = _setting(
        "PORT",
        default=8080,
        ge=0,
        le=65535,
        reason="HTTP port of the listener, under the name that platforms set; 0 takes any free one.",
    )
    health_host: str = _setting(
        "HEALTH_HOST",
        default="127.0.0.1",
        reason="Address of the HTTP servers: loopback, because they tell of your tables to whoever asks."
        " In a container 0.0.0.0.",
    )
    dashboard: Literal["local", "everywhere", "off"] = _setting(
        "WORKER_DASHBOARD",
        default="local",
        reason="Who is shown the dashboard on `/` of the listener: `local` is who asks by loopback and under"
        " a name of it, whatever HEALTH_HOST is; `everywhere` is for behind a proxy that asks who is there;"
        " `off` is nobody.",
    )
    delivery: Literal["auto", "proven", "plain", "webhooks"] = _setting(
        "WORKER_DELIVERY",
        default="auto",
        reason="Source of the payloads: `proven` is the write-ahead log, `plain` is Realtime; `auto` is"
        " `proven` wherever the database's user may have a replication slot, else `plain`;"
        " `webhooks` takes what the database's webhooks post.",
    )
    lanes: int = _setting(
        "WORKER_LANES",
        default=16,
        ge=1,
        le=4096,
        unit="lanes per handler",
        reason="Most lanes of a handler that work at once, each on a database connection. Another number"
        " moves keys to other lanes: stop and drain first.",
    )
    batch: int = _setting(
        "WORKER_BATCH",
        default=1000,
        ge=1,
        le=100_000,
        unit="changes",
        reason="Most changes in one transaction: with so many its own cost no longer shows, and more"
        " only make a retry dearer.",
    )
    max_backlog: int = _setting(
        "WORKER_MAX_BACKLOG",
        default=100_000,
        ge=1,
        unit="entries",
        reason="Entries in all lanes together above which reading the source stops; bounds Redis's memory.",
    )
    max_backlog_bytes: Bytes = _setting(
        "WORKER_MAX_BACKLOG_BYTES",
        default=256 * 1024 * 1024,
        ge=1,
        unit="bytes, or 256MiB",
        shown="256MiB",
        reason="The same bound in bytes, for wide rows. Keep it well below Redis's `maxmemory`.",
    )
    lane_backlog: int = _setting(
        "WORKER_LANE_BACKLOG",
        default=20_000,
        ge=1,
        unit="entries per lane",
        reason="Entries of one lane above which its changes are parked in Postgres: a slow handler must not"
        " stop the others.",
    )
    max_attempts: int = _setting(
        "WORKER_MAX_ATTEMPTS",
        default=8,
        ge=1,
        unit="attempts",
        reason="Attempts of a change, the first included, before it becomes a dead letter: with the default"
        " backoff up to two minutes.",
    )
    backoff_seconds: float = _setting(
        "WORKER_BACKOFF_SECONDS",
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        unit="seconds",
        reason="First step of the backoff, which doubles with every attempt (full jitter).",
    )
    backoff_max_seconds: float = _setting(
        "WORKER_BACKOFF_MAX_SECONDS",
        default=600.0,
        gt=0,
        allow_inf_nan=False,
        unit="seconds",
        reason="Longest backoff: a person who mends the cause should not wait longer for the next attempt.",
    )
    retries_per_second: float = _setting(
        "WORKER_RETRIES_PER_SECOND",
        default=1000.0,
        gt=0,
        allow_inf_nan=False,
        unit="calls, of a handler in one worker",
        reason="What is due at once, after an outage, must not keep all else from being applied. A list"
        " that is called again is one call. Less, where what handlers call outside bears less.",
    )
    give_up_on: Sorts = _setting(
        "WORKER_GIVE_UP_ON",
        default=(),
        shown="none",
        unit="comma-separated: `integrity`, `type`",
        reason="Failures that make a dead letter at once: of constraints (`integrity`), of values that do not"
        " fit (`type`). Otherwise they are retried, for the row they collide with may go.",
    )
    handler_timeout: float = _setting(
        "WORKER_HANDLER_TIMEOUT",
        default=30.0,
        gt=0,
        allow_inf_nan=False,
        unit="seconds",
        reason="Longest run of a handler; its transaction holds locks for as long.",
    )
    drain_seconds: float = _setting(
        "WORKER_DRAIN_SECONDS",
        default=25.0,
        gt=0,
        allow_inf_nan=False,
        unit="seconds",
        reason="Time to finish or hand back what is in flight after SIGTERM: below the 30 s after which most"
        " platforms kill.",
    )
    canary_seconds: float = _setting(
        "WORKER_CANARY_SECONDS",
        default=5.0,
        gt=0,
        le=10,
        allow_inf_nan=False,
        unit="seconds, at most 10",
        reason="Interval of the canary's updates: so short that a silent connection is replaced within 30 s.",
    )
    slot: str = _setting(
        "WORKER_SLOT",
        default="tailrace",
        pattern=r"^[a-z0-9_]{1,63}$",
        reason="Replication slot of proven delivery; one for each Tailrace on a server.",
    )
    publication: str = _setting(
        "WORKER_PUBLICATION",
        default="supabase_realtime",
        min_length=1,
        max_length=63,
        reason="Publication that names the tables; the one that Realtime reads.",
    )
    queue: str = _setting(
        "WORKER_QUEUE",
        default="tailrace",
        pattern=r"^[A-Za-z0-9_.:-]{1,100}$",
        reason="arq queue and prefix of all Redis keys; one for each Tailrace on a Redis.",
    )
    health_port: int | None = _setting(
        "WORKER_HEALTH_PORT",
        default=None,
        ge=0,
        le=65535,
        reason="HTTP port of the worker's own health; none, because several workers may share a machine.",
    )
    operator_role: str | None = _setting(
        "WORKER_OPERATOR_ROLE",
        default=None,
        reason="`app_metadata.role` of users who may redrive and pause; none: only `service_role` may.",
    )
    hook_secret: SecretStr | None = _setting(
        "WORKER_HOOK_SECRET",
        default=None,
        min_length=16,
        unit="at least 16 characters",
        reason="Secret of database webhooks, for WORKER_DELIVERY=webhooks: who knows it can make up changes.",
    )
    traces: float = _setting(
        "WORKER_TRACES",
        default=0.0,
        ge=0,
        le=1,
        unit="share of the changes, 0 to 1",
        reason="How many changes are traced with OpenTelemetry; needs the extra `otel`. 0 is off.",
    )
    traces_endpoint: str | None = _setting(
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        default=None,
        unit="http(s) URL",
        shown="`http://localhost:4318`",
        reason="Collector of traces, by OTLP over HTTP. OpenTelemetry's other variables hold, too.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "WORKER_LOG_LEVEL", default="info", reason="Least severe level that is logged."
    )
    log_format: Literal["auto", "json", "console"] = _setting(
        "WORKER_LOG_FORMAT",
        default="auto",
        reason="`json` for machines, `console` for people; `auto` asks whether standard error is a terminal.",
    )

    @field_validator("dashboard", "delivery", "log_level", "log_format", mode="before")
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.strip().lower() if isinstance(value, str) else value

    @field_validator("handlers")
    @classmethod
    def _check_handlers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("names no module: give at least one, such as `handlers`")
        wrong = [name for name in value if not all(part.isidentifier() for part in name.split("."))]
        if wrong:
            listed = ", ".join(repr(name) for name in wrong)
            raise ValueError(f"must name Python modules such as `shop.handlers`, not {listed}")
        return value

    # A validator of the later field, not of the model: a model's runs only when every field is right, so its
    # problem would be told one start later than the others.
    @field_validator("backoff_max_seconds")
    @classmethod
    def _check_backoff(cls, value: float, info: ValidationInfo) -> float:
        first = info.data.get("backoff_seconds", value)
        if value < first:
            raise ValueError(f"must not be below WORKER_BACKOFF_SECONDS ({first:g})")
        return value

    @field_validator("traces_endpoint")
    @classmethod
    def _check_traces_endpoint(cls, value: str | None) -> str | None:
        return None if value is None else http_address(value)

    @field_validator("health_port")
    @classmethod
    def _check_ports(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and value == info.data.get("port"):
            raise ValueError(f"must differ from PORT ({value}): listener and worker are two servers")
        return value


class Settings(Tunables):
    """All settings: the tunables, and where the project, the database and Redis are."""

    supabase_url: str = _setting(
        "SUPABASE_URL",
        unit="http(s) URL",
        reason="The project's URL, such as https://abcdefgh.supabase.co.",
    )
    realtime_url: str = _setting(
        "REALTIME_URL",
        default="",
        shown="`SUPABASE_URL` + `/realtime/v1`",
        unit="ws(s) URL",
        reason="Realtime, where it is not below the project URL (self-hosted: ws://host:4000/socket).",
    )
    service_role_key: SecretStr = _setting(
        "SUPABASE_SERVICE_ROLE_KEY",
        "SUPABASE_SECRET_KEY",
        "SUPABASE_SERVICE_KEY",
        "SUPABASE_KEY",
        unit="JWT or sb_secret_…",
        reason="The service key: Realtime shows its bearer every row, whatever the policies say.",
    )
    jwt_secret: SecretStr | None = _setting(
        "SUPABASE_JWT_SECRET",
        default=None,
        reason="HS256 secret that checks operators' tokens, for projects that publish no JWKS.",
    )
    database_url: SecretStr = _setting(
        "DATABASE_URL",
        unit="postgresql:// URL",
        reason="The project's Postgres: direct, session pooler or transaction pooler (6543).",
    )
    database_direct_url: SecretStr | None = _setting(
        "DATABASE_DIRECT_URL",
        default=None,
        unit="postgresql:// URL",
        reason="A direct connection for streaming the write-ahead log, where DATABASE_URL is a pooler.",
    )
    redis_url: SecretStr = _setting(
        "REDIS_URL",
        unit="redis://, rediss:// or unix:// URL, or redis+sentinel://host:26379,…/service",
        reason="Redis for the lanes and for arq; policy `noeviction`.",
    )

    @field_validator("supabase_url")
    @classmethod
    def _check_supabase_url(cls, value: str) -> str:
        return http_address(value)

    @field_validator("realtime_url")
    @classmethod
    def _check_realtime_url(cls, value: str, info: ValidationInfo) -> str:
        if value:
            return realtime_address(value)
        project = info.data.get("supabase_url")  # absent when it has a problem of its own
        return realtime_address(f"{project}/realtime/v1") if project else value

    @field_validator("service_role_key")
    @classmethod
    def _check_service_role_key(cls, value: SecretStr) -> SecretStr:
        return SecretStr(service_key(value.get_secret_value()))

    @field_validator("database_url", "database_direct_url")
    @classmethod
    def _check_database_url(cls, value: SecretStr | None) -> SecretStr | None:
        return None if value is None else SecretStr(database_address(value.get_secret_value()))

    @field_validator("redis_url")
    @classmethod
    def _check_redis_url(cls, value: SecretStr) -> SecretStr:
        return SecretStr(redis_address(value.get_secret_value()))

    def secret_values(self) -> tuple[str, ...]:
        """Return every text that must never be shown: keys, and the passwords inside URLs."""
        held = (self.service_role_key, self.jwt_secret, self.hook_secret)
        addresses = (self.database_url, self.database_direct_url, self.redis_url)
        texts = [secret.get_secret_value() for secret in held if secret is not None]
        for address in addresses:
            if address is not None:
                texts += secret_parts(address.get_secret_value())
        return tuple(dict.fromkeys(texts))


class _Given(Settings):
    """Settings of which neither the environment nor a file says anything."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *_: PydanticBaseSettingsSource,
        **__: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take what is given, and nothing else."""
        del settings_cls
        return (init_settings,)


def given_settings(**values: Any) -> Settings:  # noqa: ANN401 - of any setting
    """Make settings of these values, by name, and of defaults: nothing else is read.

    For tests, which must never reach the project that the environment names.
    """
    return _Given(**values)


_Kind = TypeVar("_Kind", bound=Tunables)


def load_settings(env_file: EnvFile = ".env") -> Settings:
    """Read all settings; what the environment says goes before what the file says.

    Raises:
        ConfigurationError: with every missing or bad setting, each by its environment name.
    """
    return _load(Settings, env_file)


def load_tunables(env_file: EnvFile = ".env") -> Tunables:
    """Read only the settings that have a default, for commands that connect to nothing.

    Raises:
        ConfigurationError: as `load_settings`.
    """
    return _load(Tunables, env_file)


def _load(kind: type[_Kind], env_file: EnvFile) -> _Kind:
    try:
        return kind(_env_file=env_file)  # type: ignore[call-arg] # BaseSettings takes it; the synthesised signature hides it
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=True, include_input=False)
        raise ConfigurationError([problem(kind.model_fields, detail) for detail in details]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError([f"{env_file} cannot be read: {type(error).__name__}"]) from None
