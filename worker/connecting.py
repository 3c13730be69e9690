"""What a Postgres URL says of the connection, in the words of asyncpg: TLS, timeouts, settings.

People paste URLs that were made for libpq and other clients. What their parameters mean is done; those
without a meaning here are left out, for asyncpg would refuse them. Nothing is connected.
"""

import shlex
import ssl
from typing import Any, Final

from sqlalchemy.engine import URL, make_url

from worker.errors import ConfigurationError

TRANSACTION_POOLER_PORT: Final = 6543
"""Supavisor's and Supabase's dedicated pooler in transaction mode: named statements cannot live there."""
_CONNECT_SECONDS: Final = 10.0
_MODES: Final = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_WITHOUT_MEANING: Final = frozenset(
    {
        "application_name",  # each process has its own, by which operators tell them apart
        "channel_binding",
        "fallback_application_name",
        "gssencmode",
        "keepalives",
        "keepalives_count",
        "keepalives_idle",
        "keepalives_interval",
        "load_balance_hosts",
        "sslnegotiation",
        "sslsni",
        "tcp_user_timeout",
    }
)


def connection_of(url: str, name: str) -> tuple[URL, dict[str, Any]]:
    """Give the URL without its parameters, and what they come to as arguments of `asyncpg.connect`.

    Args:
        url: `postgresql://…` or `postgres://…`.
        name: what `pg_stat_activity` shows as application name.

    Raises:
        ConfigurationError: a parameter makes no sense, or a file it names cannot be read.
    """
    parsed = make_url(url).set(drivername="postgresql+asyncpg")
    query = {key: str(value) for key, value in parsed.query.items() if key not in _WITHOUT_MEANING}
    settings = {"application_name": name} | _options(query.pop("options", ""))
    seconds = query.pop("connect_timeout", "")
    arguments: dict[str, Any] = {
        "timeout": float(seconds) if seconds.isdecimal() and seconds != "0" else _CONNECT_SECONDS,
        "server_settings": settings,
    }
    tls = _tls(query)
    if tls is not None:
        arguments["ssl"] = tls
    if parsed.port == TRANSACTION_POOLER_PORT:
        arguments |= {"statement_cache_size": 0, "prepared_statement_cache_size": 0}
    return parsed.set(query=query), arguments


def _options(text: str) -> dict[str, str]:
    """Read `options=-c name=value …`, which poolers do not all understand, as settings of the session."""
    words = shlex.split(text.replace("-c", " "))
    return dict(word.split("=", 1) for word in words if "=" in word)


def _tls(query: dict[str, str]) -> ssl.SSLContext | str | None:
    """Take the parameters of TLS out of the query; gives what asyncpg wants to know."""
    mode, root = query.pop("sslmode", None), query.pop("sslrootcert", None)
    certificate, key = query.pop("sslcert", None), query.pop("sslkey", None)
    password = query.pop("sslpassword", None)
    if mode is not None and mode not in _MODES:
        raise ConfigurationError([f"sslmode of DATABASE_URL is none of {', '.join(_MODES)}"])
    if root is not None and mode == "require":
        mode = "verify-ca"  # as libpq has it: who gives a root wants it to be looked at
    if mode not in ("verify-ca", "verify-full"):
        return mode
    context = _context(root)
    context.check_hostname = mode == "verify-full"
    if certificate is not None:
        try:
            context.load_cert_chain(certificate, key, password)
        except (OSError, ValueError) as error:
            raise _unreadable("sslcert or sslkey", error) from None
    return context


def _context(root: str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=None if root in (None, "system") else root)
    except (OSError, ValueError) as error:
        raise _unreadable("sslrootcert", error) from None


def _unreadable(parameter: str, error: Exception) -> ConfigurationError:
    return ConfigurationError([f"{parameter} of DATABASE_URL cannot be read ({type(error).__name__})"])
