"""How URLs and keys have to look, and what people paste instead.

Pure. Each function returns the text in one form or raises ValueError with a sentence that continues the
setting's name ("DATABASE_URL …"). No sentence repeats the text: it may hold a password.
"""

import base64
import binascii
import json
from typing import NamedTuple
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit, urlunsplit

# Parameters that other clients put into Postgres URLs. asyncpg would send them to the server as settings,
# and the server would refuse the connection.
_FOREIGN_PARAMETERS = frozenset({"connection_limit", "pgbouncer", "pool_timeout", "supa"})
_JWT_PARTS = 3
_SENTINEL_SCHEMES = ("redis+sentinel", "rediss+sentinel")
_SENTINEL_PORT = 26379


def http_address(text: str) -> str:
    """Return the project's URL without a slash at its end."""
    parts = _split(text, {"http": "http", "https": "https"}, "http:// or https://")
    if (parts.hostname or "").removeprefix("www.") == "supabase.com":
        raise ValueError(
            "is the address of the dashboard: the project's is like https://abcdefgh.supabase.co"
        )
    if parts.username is not None:
        raise ValueError("must not carry a user or password")
    return urlunsplit(parts._replace(path=parts.path.rstrip("/"), query="", fragment=""))


def realtime_address(text: str) -> str:
    """Return the Realtime URL as ws:// or wss://, without `/websocket`, which the client adds itself."""
    schemes = {"ws": "ws", "wss": "wss", "http": "ws", "https": "wss"}
    parts = _split(text, schemes, "ws:// or wss://")
    path = parts.path.rstrip("/").removesuffix("/websocket").rstrip("/")
    return urlunsplit(parts._replace(path=path, query="", fragment=""))


def database_address(text: str) -> str:
    """Return a Postgres URL as `postgresql://…`, without parameters that are only for other clients."""
    if "[YOUR-PASSWORD]" in text:
        raise ValueError("still holds the placeholder [YOUR-PASSWORD]: put the database password there")
    schemes = dict.fromkeys(("postgres", "postgresql", "postgresql+asyncpg"), "postgresql")
    parts = _split(text, schemes, "postgresql:// or postgres://", needs_host=False)
    query = parse_qsl(parts.query, keep_blank_values=True)
    if not parts.hostname and "host" not in dict(query):
        raise ValueError("names no host")
    kept = [(name, value) for name, value in query if name.lower() not in _FOREIGN_PARAMETERS]
    return _joined(parts._replace(query=urlencode(kept)))


def redis_address(text: str) -> str:
    """Return a Redis URL: redis://, rediss:// or unix://, or either of the first two with `+sentinel`."""
    if text.strip().partition("://")[0].lower() in _SENTINEL_SCHEMES:
        sentinels(text)
        return text.strip()
    schemes = {name: name for name in ("redis", "rediss", "unix")}
    wanted = "redis://, rediss:// or unix://, or redis+sentinel:// or rediss+sentinel://"
    parts = _split(text, schemes, wanted, needs_host=False)
    if parts.scheme == "unix":
        if not parts.path.strip("/"):
            raise ValueError("names no socket: write unix:///path/to/redis.sock")
    elif not parts.hostname:
        raise ValueError("names no host")
    elif parts.path.strip("/") and not parts.path.strip("/").isdigit():
        raise ValueError("must end in the number of a database, such as /0, or in nothing")
    return _joined(parts)


class Sentinels(NamedTuple):
    """Where the master of a group is to be asked for."""

    hosts: tuple[tuple[str, int], ...]
    service: str
    """The master's name, as the sentinels have it."""
    master: str
    """URL of the master with a host that means nothing: TLS or not, user, password, database, parameters."""
    username: str | None
    """Of the sentinels themselves, which may have passwords of their own."""
    password: str | None


def sentinels(text: str) -> Sentinels | None:
    """Read redis+sentinel://[user:password@]host:26379,host:26379/service[/database]; None of another kind.

    Parameters are those of a Redis URL, `sentinel_username` and `sentinel_password`.
    """
    scheme, _, rest = text.strip().partition("://")
    if scheme.lower() not in _SENTINEL_SCHEMES:
        return None
    authority, _, path = rest.partition("/")
    credentials, at, listed = authority.rpartition("@")
    hosts = []
    for host in listed.split(","):
        found = _split(f"redis://{host}", {"redis": "redis"}, "")
        hosts.append((str(found.hostname), found.port or _SENTINEL_PORT))
    plain = "rediss" if scheme.lower().startswith("rediss") else "redis"
    parts = _split(f"{plain}://{credentials}{at}master/{path}", {plain: plain}, "")
    service, _, database = parts.path.strip("/").partition("/")
    if not service:
        raise ValueError("names no service: write redis+sentinel://host:26379,host:26379/mymaster/0")
    if database and not database.isdigit():
        raise ValueError("must end in the number of a database, such as /mymaster/0, or in the service")
    query = parse_qsl(parts.query, keep_blank_values=True)
    own = dict(query)
    kept = [(name, value) for name, value in query if not name.startswith("sentinel_")]
    master = _joined(parts._replace(path=f"/{database}", query=urlencode(kept)))
    return Sentinels(
        tuple(hosts), unquote(service), master, own.get("sentinel_username"), own.get("sentinel_password")
    )


def service_key(text: str) -> str:
    """Return the service key: a JWT that is not a public one, or an `sb_secret_…` key."""
    key = text.strip()
    if key.startswith("sb_publishable_"):
        raise ValueError(
            "is the publishable key: take the secret key (sb_secret_…) from the project's API keys"
        )
    if key.startswith("sb_secret_"):
        return key
    role = _claimed_role(key)
    if role in {"anon", "authenticated"}:
        raise ValueError(f"is the key of role {role}: take the service_role key from the project's API keys")
    return key


def secret_parts(address: str) -> list[str]:
    """Return the password of a URL, as written and decoded; nothing if it has none."""
    parts = urlsplit(address)
    found = [parts.password] if parts.password else []
    found += [
        value
        for name, value in parse_qsl(parts.query)
        if name in {"password", "sslpassword", "sentinel_password"}
    ]
    return list(dict.fromkeys(form for text in found for form in (text, unquote(text))))


def _split(text: str, schemes: dict[str, str], wanted: str, *, needs_host: bool = True) -> SplitResult:
    """Split a URL, and say what is wrong with it where the standard library would fail or guess."""
    text = text.strip()
    scheme, found, _ = text.partition("://")
    if not found or scheme.lower() not in schemes:
        raise ValueError(f"must begin with {wanted}")
    try:
        parts = urlsplit(text)
        readable = parts.port != 0
    except ValueError:
        readable = False
    if not readable or parts.netloc.count("@") > 1 or parts.fragment:
        raise ValueError(
            "is no URL: check the port, and write @ : / # ? % in a password as %40 %3A %2F %23 %3F %25"
        )
    if needs_host and not parts.hostname:
        raise ValueError("names no host")
    return parts._replace(scheme=schemes[scheme.lower()])


def _joined(parts: SplitResult) -> str:
    """Put a URL together again; urlunsplit would drop the // of a scheme it does not know."""
    query = f"?{parts.query}" if parts.query else ""
    return f"{parts.scheme}://{parts.netloc}{parts.path}{query}"


def _claimed_role(key: str) -> str | None:
    """Read the role that a JWT claims, without checking its signature (Realtime does)."""
    unlike = ValueError("is neither a JWT nor an sb_secret_… key: copy it again from the project's API keys")
    pieces = key.split(".")
    if len(pieces) != _JWT_PARTS or not key.isascii():
        raise unlike
    try:
        claims = json.loads(base64.urlsafe_b64decode(pieces[1] + "=" * (-len(pieces[1]) % 4)))
    except (binascii.Error, ValueError):
        raise unlike from None
    if not isinstance(claims, dict):
        raise unlike
    role = claims.get("role")
    return role if isinstance(role, str) else None
