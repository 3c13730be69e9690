"""Signing and checking of the tokens that clients present, with the real server's words of refusal.

It knows HS256 with one secret. It does not fetch keys and knows no asymmetric algorithm.
"""

import time
from collections.abc import Mapping
from typing import Any

import jwt
import msgspec

MINIMUM_SECRET_BYTES = 32
_TEN_YEARS = 10 * 365 * 24 * 3600


class TokenError(Exception):
    """A token that is refused.

    Attributes:
        code: the word before the colon in a refused join, as `MalformedJWT`.
        text: the sentence, as it stands in handshake refusals.
        join_text: the sentence in join replies and system frames, which counts the seconds.
    """

    def __init__(self, code: str, text: str, join_text: str | None = None) -> None:
        super().__init__(text)
        self.code = code
        self.text = text
        self.join_text = join_text or text


def sign(claims: Mapping[str, Any], secret: str) -> str:
    """A signed token with exactly these claims, whether or not the server would accept them."""
    return jwt.encode(dict(claims), secret, algorithm="HS256")


def project_key(role: str, secret: str) -> str:
    """A long-lived key of `role`, as the legacy `anon` and `service_role` keys of a project are."""
    now = int(time.time())
    return sign({"role": role, "iss": "standin", "iat": now, "exp": now + _TEN_YEARS}, secret)


def verify(token: str, secret: str) -> dict[str, Any]:
    """The claims of `token`.

    Raises:
        TokenError: malformed, wrongly signed, without `role` or `exp`, or expired.
    """
    try:
        payload = jwt.PyJWS().decode(token, secret, algorithms=["HS256"])
        claims = msgspec.json.decode(payload, type=dict[str, Any])
    except jwt.InvalidSignatureError:
        raise TokenError("JwtSignatureError", "Failed to validate JWT signature") from None
    except jwt.InvalidAlgorithmError:
        raise TokenError("JwtSignerError", "Failed to generate JWT signer") from None
    except (jwt.InvalidTokenError, msgspec.DecodeError):
        raise TokenError("MalformedJWT", "The token provided is not a valid JWT") from None
    expiry = claims.get("exp")
    if claims.get("role") is None or isinstance(expiry, bool) or not isinstance(expiry, int | float):
        raise TokenError("InvalidJWTToken", "Fields `role` and `exp` are required in JWT")
    check_expiry(claims)
    return claims


def check_expiry(claims: Mapping[str, Any]) -> None:
    """Raise TokenError if the token of these claims has expired."""
    seconds = int(time.time()) - int(claims["exp"])
    if seconds >= 0:
        raise TokenError("InvalidJWTToken", "Token has expired", expired_text(seconds))


def expired_text(seconds: int) -> str:
    """What join replies and system frames say about a token that expired `seconds` ago."""
    return f"Token has expired {seconds} seconds ago"


def gateway_role(api_key: str, api_keys: Mapping[str, str] | None) -> str | None:
    """The role that the hosted gateway gives to an opaque `sb_…` key, or None where it refuses the key."""
    if api_keys is not None:
        return api_keys.get(api_key)
    if api_key.startswith("sb_secret_"):
        return "service_role"
    if api_key.startswith("sb_publishable_"):
        return "anon"
    return None
