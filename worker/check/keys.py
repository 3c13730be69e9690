"""Examines the keys: the service key, and the public keys that the project signs users' tokens with.

A key is looked at, and never shown. Whether Realtime accepts it, only Realtime knows.
"""

import time
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import httpx
import jwt

from config.settings import Settings
from worker.check.findings import Finding, listed

SOON_DAYS = 30
_TIMEOUT = 5.0
_HOSTED = ".supabase.co"
_NEW = "take a service_role or sb_secret_… key from the project's settings (API keys)"
_DAY = 86_400


def examine_key(settings: Settings) -> list[Finding]:
    """Return what is to be said of SUPABASE_SERVICE_ROLE_KEY. Asks nobody."""
    key = settings.service_role_key.get_secret_value()
    if key.startswith("sb_"):
        detail = (
            "sb_secret_… key: it lasts until it is revoked; Realtime ends its connections after 24 hours,"
            " and the listener renews its own every 20"
        )
        return [Finding("key", "ok", detail)]
    try:
        claims = jwt.decode(key, options={"verify_signature": False})
        header = jwt.get_unverified_header(key)
    except jwt.PyJWTError:
        return [Finding("key", "problem", "SUPABASE_SERVICE_ROLE_KEY is a JWT that cannot be read", _NEW)]
    findings = [_lasts(claims), *_whose(claims, settings.supabase_url)]
    secret = settings.jwt_secret
    if secret is not None and header.get("alg") == "HS256" and not _signed(key, secret.get_secret_value()):
        detail = "SUPABASE_SERVICE_ROLE_KEY is not signed with SUPABASE_JWT_SECRET"
        remedy = "take both from the same project; after a rotation of the secret, both anew"
        findings.append(Finding("key", "problem", detail, remedy))
    return findings


def _lasts(claims: dict[str, Any]) -> Finding:
    expires, role = claims.get("exp"), claims.get("role")
    if not isinstance(expires, int | float) or not isinstance(role, str):
        detail = "SUPABASE_SERVICE_ROLE_KEY has no role, or no end (exp): Realtime refuses such a token"
        return Finding("key", "problem", detail, _NEW)
    left = expires - time.time()
    until = datetime.fromtimestamp(min(expires, 253_402_300_799), UTC).date()
    if left < 0:
        return Finding("key", "problem", f"SUPABASE_SERVICE_ROLE_KEY has expired ({until})", _NEW)
    if role != "service_role":
        detail = (
            f"SUPABASE_SERVICE_ROLE_KEY is of role {role}: grants and policies are examined for service_role"
        )
        return Finding("key", "warning", detail, _NEW)
    if left < SOON_DAYS * _DAY:
        detail = f"SUPABASE_SERVICE_ROLE_KEY expires on {until}; Realtime refuses it from then on"
        return Finding("key", "warning", detail, _NEW)
    detail = f"JWT of role {role}, until {until}; such keys are being replaced by sb_secret_… keys"
    return Finding("key", "ok", detail)


def _whose(claims: dict[str, Any], url: str) -> list[Finding]:
    """Compare the project that the key names with the one in the URL."""
    host = urlsplit(url).hostname or ""
    project = claims.get("ref")
    if not isinstance(project, str) or not host.endswith(_HOSTED) or host == f"{project}{_HOSTED}":
        return []
    detail = (
        f"SUPABASE_SERVICE_ROLE_KEY is of project {project}, and SUPABASE_URL of {host.partition('.')[0]}"
    )
    return [Finding("key", "problem", detail, "take both from the same project")]


def _signed(key: str, secret: str) -> bool:
    try:
        jwt.decode(key, secret, algorithms=["HS256"], options={"verify_exp": False, "verify_aud": False})
    except jwt.InvalidSignatureError:
        return False
    except jwt.PyJWTError:
        pass  # it is told elsewhere what else is wrong with it
    return True


async def examine_published_keys(settings: Settings) -> list[Finding]:
    """Return what is to be said of the JWKS, by which operators' tokens are verified over HTTP."""
    url = f"{settings.supabase_url}/auth/v1/.well-known/jwks.json"
    by_secret = settings.jwt_secret is not None
    without = (
        "without them tokens of users and operators are refused; service_role's need SUPABASE_JWT_SECRET"
    )
    try:
        # No redirects, as where tokens are verified.
        async with httpx.AsyncClient(timeout=_TIMEOUT) as client:
            answer = await client.get(url)
        answer.raise_for_status()
        said = answer.json()
        keys = said["keys"] if isinstance(said, dict) else None
    except (httpx.HTTPError, ValueError, KeyError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        why = status or type(error).__name__
        detail = f"the project's public keys cannot be had from {url} ({why})"
        if by_secret:
            return [Finding("jwks", "note", detail, "tokens are verified by SUPABASE_JWT_SECRET")]
        return [Finding("jwks", "note", detail, f"check SUPABASE_URL: {without}")]
    known = [one for one in keys or () if isinstance(one, dict)]
    if known:
        kinds = sorted({str(one.get("alg") or one.get("kty")) for one in known})
        return [Finding("jwks", "ok", f"{len(known)} public keys ({listed(kinds)})")]
    if by_secret:
        return [
            Finding("jwks", "ok", "the project publishes no keys: tokens are verified by SUPABASE_JWT_SECRET")
        ]
    remedy = "set SUPABASE_JWT_SECRET, or have the project sign with ES256 (project settings, JWT keys)"
    return [Finding("jwks", "note", f"the project publishes no keys: {without}", remedy)]
