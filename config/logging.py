"""One log for everything: structlog's events and the records of the libraries, in one shape, on one stream.

JSON for machines, colours for a terminal. Each line carries the context variables (handler, lane, position)
bound by whoever works on the change. `config.redaction` goes over each line before it is rendered. Row values
are kept out by the code that logs; what libraries would show of them is cut here.
"""

import logging
import sys
from collections.abc import Iterable
from typing import Any, Literal, TextIO

import orjson
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from config.redaction import Redaction
from config.sampling import Sampling
from config.settings import Settings, Tunables

# Libraries that tell per job, request or frame what only their authors want to know. Their warnings pass.
_QUIET = (
    "alembic.runtime.plugins",
    "arq",
    "arq.connections",
    "arq.jobs",
    "arq.worker",
    "asyncio",
    "asyncpg",
    "h2",
    "hpack",
    "httpcore",
    "httpx",
    "postgrest",
    "realtime",
    "sqlalchemy",
    "storage3",
    "supabase",
    "supabase_auth",
    "urllib3",
    "uvicorn",
    "uvicorn.access",
    "uvicorn.error",
    "websockets",
)
# The Realtime client logs frames it does not understand, and the reasons, whole: rows and tokens.
_FRAME_LOGGERS = ("realtime", "websockets")
_EXCERPT = 40


def configure_logging(settings: Tunables, stream: TextIO | None = None) -> None:
    """Set logging up as the settings say; may be called again, and then replaces what it did.

    Args:
        settings: with `Settings`, the secrets in it are hidden by value.
        stream: where lines go; standard error, because standard output belongs to tables and `--json`.
    """
    secrets = settings.secret_values() if isinstance(settings, Settings) else ()
    write_log(level=settings.log_level, form=settings.log_format, secrets=secrets, stream=stream)


def write_log(
    *,
    level: Literal["debug", "info", "warning", "error"] = "info",
    form: Literal["auto", "json", "console"] = "auto",
    secrets: Iterable[str] = (),
    stream: TextIO | None = None,
) -> None:
    """Set logging up without settings: for the moment before they are known."""
    target = sys.stderr if stream is None else stream
    machine = form == "json" or (form == "auto" and not target.isatty())
    redaction = Redaction(secrets)
    # Run for our events and for the libraries' records alike.
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        structlog.processors.StackInfoRenderer(),
        _name_trace,
    ]
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.stdlib.PositionalArgumentsFormatter(),
            *shared,
            structlog.stdlib.ExtraAdder(),
        ],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            _cut_frames,
            # Plain text, never local variables: those are rows. Before redaction, which reads the text.
            structlog.processors.format_exc_info,
            _redactor(redaction),
            *(_machine_renderers() if machine else _terminal_renderers(colours=target.isatty())),
        ],
    )
    handler = logging.StreamHandler(target)
    handler.setFormatter(formatter)
    handler.addFilter(Sampling())
    _take_over(handler, getattr(logging, level.upper()))
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        # Loggers made at import must follow a later call: arq imports us before we know the settings.
        cache_logger_on_first_use=False,
    )


def _take_over(handler: logging.Handler, level: int) -> None:
    """Make ours the only handler, and let everything reach it."""
    root = logging.getLogger()
    # Plain stream handlers are our own of an earlier call, or somebody's basicConfig. Others (a test's, an
    # error tracker's) are there on purpose.
    for old in [held for held in root.handlers if type(held) is logging.StreamHandler]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    for name in _QUIET:
        logger = logging.getLogger(name)
        logger.handlers.clear()  # arq's command line gives it one of its own, and each line would come twice
        logger.propagate = True
        logger.setLevel(max(level, logging.WARNING))
        # arq's command line configures logging after it has imported us, and that resets levels, not filters.
        logger.addFilter(_is_warning)
    logging.captureWarnings(capture=True)


def _name_trace(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Name the trace and the span in which a line is logged, where OpenTelemetry is loaded at all."""
    tracing: Any = sys.modules.get("opentelemetry.trace")
    if tracing is None:
        return event
    context = tracing.get_current_span().get_span_context()
    if not context.is_valid:
        return event
    event["trace_id"], event["span_id"] = f"{context.trace_id:032x}", f"{context.span_id:016x}"
    return event


def _is_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


def _cut_frames(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Keep of a Realtime client's line its beginning only, and of its exception the class."""
    name = event.get("logger") or ""
    if not name.startswith(_FRAME_LOGGERS):
        return event
    text = str(event.get("event", ""))
    for mark in (": ", "{", "[", '"', "'", "\n"):
        text = text.partition(mark)[0]
    kept: EventDict = {key: event[key] for key in ("level", "logger", "time") if key in event}
    kept["event"] = text[:_EXCERPT].rstrip(" :")
    kept["size"] = len(str(event.get("event", "")))
    problem = event.get("exc_info")
    if isinstance(problem, tuple) and problem[0] is not None:
        kept["error"] = problem[0].__name__
    elif isinstance(problem, BaseException):
        kept["error"] = type(problem).__name__
    return kept


def _redactor(redaction: Redaction) -> Processor:
    def redact(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        return {name: redaction.named(name, value) for name, value in event.items()}

    return redact


def _machine_renderers() -> list[Processor]:
    return [structlog.processors.JSONRenderer(_json)]


def _terminal_renderers(*, colours: bool) -> list[Processor]:
    return [
        structlog.dev.ConsoleRenderer(
            colors=colours, timestamp_key="time", exception_formatter=structlog.dev.plain_traceback
        )
    ]


def _json(event: dict[str, object], **_options: object) -> str:
    first = {name: event.pop(name, None) for name in ("time", "level", "logger", "event")}
    first["message"] = first.pop("event")  # the name that log services look for
    return orjson.dumps(first | event, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
