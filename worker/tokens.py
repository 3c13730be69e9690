"""Whose request is this? Supabase's tokens, verified by the project's secret or by its published keys.

It answers with an identity or refuses; it does not decide what an identity may do, and knows no HTTP server.
What a token says of its own key is a hint for finding one that is known already: keys inside a token, and
addresses of keys, are never used.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

import httpx
import jwt
import orjson
import structlog
from jwt.algorithms import AllowedPublicKeys

from worker.errors import KeysUnavailable, TokenRefused

log = structlog.get_logger(__name__)

MINIMUM_SECRET_BYTES: Final = 32
"""What HS256 needs (RFC 7518): a shorter secret can be guessed."""
_FAMILIES: Final = {"ES256": "EC", "RS256": "RSA", "EdDSA": "OKP"}
_PROJECT_KEYS: Final = frozenset({"anon", "service_role"})
_FRESH_SECONDS: Final = 600.0
_STALE_SECONDS: Final = 3600.0
_REFETCH_SECONDS: Final = 10.0
_FETCH_TIMEOUT: Final = 5.0
_TOKEN_BYTES: Final = 16_384
_KEY_SET_BYTES: Final = 262_144


@dataclass(frozen=True)
class Identity:
    """Whose token it was.

    Attributes:
        subject: id of the user; None for the project's own keys.
        role: role in Postgres: `authenticated`, `anon`, `service_role`, or one of the project's own.
        app_role: `app_metadata.role`, which only the service key can set.
        claims: everything that was signed, for row-level security.
    """

    subject: str | None
    role: str
    app_role: str | None
    claims: Mapping[str, Any]

    def may_operate(self, operator_role: str | None) -> bool:
        """Tell whether this is somebody who may redrive and pause: the service key, or a named role."""
        return self.role == "service_role" or (operator_role is not None and self.app_role == operator_role)


class PublishedKeys:
    """The project's public keys by their ids, fetched when they are needed.

    A key that is not known is asked for again, so that a rotation needs no restart; but seldom, or everybody
    who can make up key ids could have us call the project without end.
    """

    def __init__(
        self,
        url: str,
        *,
        now: Callable[[], float] = time.monotonic,
        refetch_seconds: float = _REFETCH_SECONDS,
    ) -> None:
        """Make it; nothing is fetched yet.

        Args:
            url: of the key set.
            now: seconds on a clock that is never set back.
            refetch_seconds: between two fetches at least.
        """
        self._url = url
        self._now = now
        self._refetch_seconds = refetch_seconds
        self._keys: dict[str, tuple[str, AllowedPublicKeys]] = {}
        self._fetched: float | None = None
        self._tried: float | None = None
        self._lock = asyncio.Lock()

    async def find(self, key_id: str, algorithm: str) -> AllowedPublicKeys:
        """Give the key with this id, for this algorithm.

        Raises:
            TokenRefused: there is none, or it is for another algorithm.
            KeysUnavailable: the key set cannot be had.
        """
        if not self._fresh() or key_id not in self._keys:
            async with self._lock:  # whoever waited here finds what the one before has fetched
                if (not self._fresh() or key_id not in self._keys) and self._may_try():
                    await self._fetch()
        if not self._usable():
            raise KeysUnavailable("the project's public keys cannot be had")
        known = self._keys.get(key_id)
        if known is None:
            raise TokenRefused("unknown key", "its key is not one of the project's")
        if known[0] != algorithm:
            raise TokenRefused("algorithm", "its algorithm is not that of its key")
        return known[1]

    def _fresh(self) -> bool:
        return self._fetched is not None and self._now() - self._fetched < _FRESH_SECONDS

    def _usable(self) -> bool:
        # A project that does not answer for a moment should not lock everybody out; a revoked key must end.
        return self._fetched is not None and self._now() - self._fetched < _STALE_SECONDS

    def _may_try(self) -> bool:
        return self._tried is None or self._now() - self._tried >= self._refetch_seconds

    async def _fetch(self) -> None:
        self._tried = self._now()
        try:
            keys = await self._asked()
        except (httpx.HTTPError, ValueError) as error:
            log.warning("the project's public keys cannot be had", error=type(error).__name__)
            return
        self._keys, self._fetched = keys, self._now()

    async def _asked(self) -> dict[str, tuple[str, AllowedPublicKeys]]:
        async with (
            httpx.AsyncClient(timeout=_FETCH_TIMEOUT) as client,
            client.stream("GET", self._url) as answer,
        ):
            answer.raise_for_status()
            body = b""
            async for piece in answer.aiter_bytes():
                body += piece
                if len(body) > _KEY_SET_BYTES:
                    raise ValueError("too long for a key set")
        found = orjson.loads(body)
        listed = found.get("keys") if isinstance(found, dict) else None
        if not isinstance(listed, list):
            raise ValueError("no key set")  # noqa: TRY004 - what a server sent is no argument
        return {key_id: key for one in listed if isinstance(one, dict) for key_id, key in _read(one).items()}


def _read(written: Mapping[str, Any]) -> dict[str, tuple[str, AllowedPublicKeys]]:
    """Read a key of a key set; nothing where it is none that we verify with, as no symmetric one is."""
    key_id, algorithm = written.get("kid"), _algorithm(written)
    if not isinstance(key_id, str) or algorithm is None or written.get("use", "sig") != "sig":
        return {}
    public = {name: value for name, value in written.items() if name != "d"}
    try:
        key = jwt.PyJWK(public, algorithm).key
    except jwt.PyJWTError:
        return {}
    return {key_id: (algorithm, key)}


def _algorithm(written: Mapping[str, Any]) -> str | None:
    named, family = written.get("alg"), written.get("kty")
    if named is None:
        named = next((name for name, kty in _FAMILIES.items() if kty == family), None)
    # Ed25519 is the name that RFC 9864 gives to what EdDSA with that curve has always been.
    named = "EdDSA" if named == "Ed25519" else named
    return named if isinstance(named, str) and _FAMILIES.get(named) == family else None


class Tokens:
    """Verifies the tokens of one project.

    ```python
    tokens = Tokens("https://abcdefgh.supabase.co")
    identity = await tokens.verify(text)
    ```
    """

    def __init__(
        self,
        supabase_url: str,
        *,
        secret: str | None = None,
        audience: str = "authenticated",
        issuers: Collection[str] | None = None,
        leeway: float = 10.0,
        keys: PublishedKeys | None = None,
    ) -> None:
        """Make it; nothing is fetched yet.

        Args:
            supabase_url: the project's URL.
            secret: HS256 secret; None where the project signs with published keys only. Too short a one is
                refused with a ValueError.
            audience: what users' tokens must be for.
            issuers: who may have signed users' tokens; default is the project's Auth.
            leeway: seconds by which clocks may differ.
            keys: the project's public keys; default is where every project publishes them.
        """
        if secret is not None and len(secret.encode()) < MINIMUM_SECRET_BYTES:
            raise ValueError(f"a JWT secret has at least {MINIMUM_SECRET_BYTES} bytes")
        auth = f"{supabase_url.rstrip('/')}/auth/v1"
        self._secret = secret
        self._audience = audience
        self._issuers = frozenset([auth] if issuers is None else issuers)
        self._leeway = leeway
        self._keys = keys or PublishedKeys(f"{auth}/.well-known/jwks.json")

    async def verify(self, token: str) -> Identity:
        """Tell whose token it is.

        Raises:
            TokenRefused: it is not to be trusted, whatever the reason.
            KeysUnavailable: nobody can tell now: the project's public keys cannot be had.
        """
        algorithm, key = await self._key(_header(token))
        try:
            claims = jwt.decode(
                token,
                key,
                algorithms=[algorithm],
                leeway=self._leeway,
                # Whom it is for and who signed it depends on whose it is.
                options={"require": ["exp"], "verify_aud": False, "verify_iss": False},
            )
        except jwt.ExpiredSignatureError:
            raise TokenRefused("expired", "it has expired") from None
        except (jwt.ImmatureSignatureError, jwt.InvalidIssuedAtError):
            raise TokenRefused("not yet", "it is not valid yet") from None
        except jwt.InvalidSignatureError:
            raise TokenRefused("signature", "its signature is wrong") from None
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError):
            raise TokenRefused("malformed", "it cannot be read") from None
        return self._identity(claims, algorithm)

    async def _key(self, header: Mapping[str, Any]) -> tuple[str, Any]:
        algorithm, key_id = header.get("alg"), header.get("kid")
        if algorithm == "HS256" and self._secret is not None:
            return algorithm, self._secret
        if algorithm not in _FAMILIES:
            # `none` too, and HS256 without a secret: what anybody can sign.
            raise TokenRefused("algorithm", "its algorithm is not accepted here")
        if not isinstance(key_id, str):
            raise TokenRefused("unknown key", "it names no key")
        return algorithm, await self._keys.find(key_id, algorithm)

    def _identity(self, claims: dict[str, Any], algorithm: str) -> Identity:
        role, subject = claims.get("role"), claims.get("sub")
        if not isinstance(role, str) or not role:
            raise TokenRefused("claims", "it names no role")
        if subject is None and algorithm == "HS256" and role in _PROJECT_KEYS:
            # A project's own legacy key: signed with its secret, for nobody in particular and by nobody.
            return Identity(None, role, None, claims)
        if not isinstance(subject, str) or not subject:
            raise TokenRefused("claims", "it names no user")
        audience, issuer = claims.get("aud"), claims.get("iss")
        if self._audience not in (audience if isinstance(audience, list) else [audience]):
            raise TokenRefused("audience", "it is for somebody else")
        if not isinstance(issuer, str) or issuer not in self._issuers:
            raise TokenRefused("issuer", "it was issued by somebody else")
        metadata = claims.get("app_metadata")
        app_role = metadata.get("role") if isinstance(metadata, dict) else None
        return Identity(subject, role, app_role if isinstance(app_role, str) else None, claims)


def _header(token: str) -> Mapping[str, Any]:
    if len(token) > _TOKEN_BYTES:
        raise TokenRefused("malformed", "it is longer than any token")
    try:
        header = jwt.get_unverified_header(token)
    except (jwt.PyJWTError, ValueError):
        raise TokenRefused("malformed", "it is no JWT") from None
    if "crit" in header:
        raise TokenRefused("malformed", "it demands an extension that nobody knows here")
    return header
