import time

import jwt
import pytest
from websockets.datastructures import Headers
from websockets.http11 import Request

from standin.server import handshake, tokens
from standin.server.behaviour import Behaviour

SECRET = "a-secret-of-the-tests-with-more-than-32-bytes"
LATER = int(time.time()) + 3600


def test_a_sound_token_gives_its_claims() -> None:
    claims = {"role": "anon", "exp": LATER, "sub": 5, "aud": "anybody"}
    assert tokens.verify(tokens.sign(claims, SECRET), SECRET) == claims


@pytest.mark.parametrize(
    ("token", "code", "text"),
    [
        ("xxx", "MalformedJWT", "The token provided is not a valid JWT"),
        ("a.b.c", "MalformedJWT", "The token provided is not a valid JWT"),
        (
            tokens.sign({"role": "anon", "exp": LATER}, SECRET + "x"),
            "JwtSignatureError",
            "Failed to validate JWT signature",
        ),
        (
            jwt.encode({"role": "anon", "exp": LATER}, SECRET + SECRET, algorithm="HS512"),
            "JwtSignerError",
            "Failed to generate JWT signer",
        ),
        (
            tokens.sign({"role": "anon"}, SECRET),
            "InvalidJWTToken",
            "Fields `role` and `exp` are required in JWT",
        ),
        (
            tokens.sign({"exp": LATER}, SECRET),
            "InvalidJWTToken",
            "Fields `role` and `exp` are required in JWT",
        ),
        (
            tokens.sign({"role": "anon", "exp": True}, SECRET),
            "InvalidJWTToken",
            "Fields `role` and `exp` are required in JWT",
        ),
        (tokens.sign({"role": "anon", "exp": 1}, SECRET), "InvalidJWTToken", "Token has expired"),
    ],
)
def test_refused_tokens(token: str, code: str, text: str) -> None:
    with pytest.raises(tokens.TokenError) as caught:
        tokens.verify(token, SECRET)
    assert (caught.value.code, caught.value.text) == (code, text)


def test_in_joins_expiry_is_told_in_seconds() -> None:
    with pytest.raises(tokens.TokenError) as caught:
        tokens.verify(tokens.sign({"role": "anon", "exp": int(time.time()) - 100}, SECRET), SECRET)
    assert caught.value.join_text in (
        "Token has expired 100 seconds ago",
        "Token has expired 101 seconds ago",
    )


def judged(
    path: str, behaviour: Behaviour | None = None, **headers: str
) -> handshake.Accepted | handshake.Refused:
    named = Headers([(name.replace("_", "-"), value) for name, value in headers.items()])
    return handshake.judge(Request(path, named), SECRET, behaviour or Behaviour())


def test_keys_of_the_gateway_are_known_on_its_path_only() -> None:
    through = judged("/realtime/v1/websocket?apikey=sb_secret_x")
    assert isinstance(through, handshake.Accepted)
    assert through.claims["role"] == "service_role"
    bare = judged("/socket/websocket?apikey=sb_secret_x")
    assert isinstance(bare, handshake.Refused)
    assert bare.body == b'{"error":"The token provided is not a valid JWT"}'


def test_configured_keys_are_the_only_ones() -> None:
    behaviour = Behaviour(api_keys={"sb_secret_mine": "service_role"})
    assert isinstance(judged("/realtime/v1/websocket?apikey=sb_secret_mine", behaviour), handshake.Accepted)
    other = judged("/realtime/v1/websocket?apikey=sb_secret_other", behaviour)
    assert isinstance(other, handshake.Refused)
    assert other.status == 401


@pytest.mark.parametrize(
    ("path", "status", "body"),
    [
        ("/socket/websocket?vsn=1.0.0", 401, b'{"error":"API key is missing"}'),
        ("/socket/websocket?apikey=x&vsn=3.0.0", 403, b""),
        ("/elsewhere", 404, b"Not Found"),
    ],
)
def test_refused_handshakes(path: str, status: int, body: bytes) -> None:
    verdict = judged(path)
    assert isinstance(verdict, handshake.Refused)
    assert (verdict.response().status_code, verdict.response().body) == (status, body)


def test_the_key_may_be_in_a_header_and_the_version_left_out() -> None:
    verdict = judged("/socket/websocket", x_api_key=tokens.project_key("anon", SECRET))
    assert isinstance(verdict, handshake.Accepted)
    assert (verdict.version, verdict.claims["role"]) == (1, "anon")
