"""Tokens of Supabase, with a key set from a real HTTP server: the good ones, and every forgery we know of."""

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from worker.errors import KeysUnavailable, TokenRefused
from worker.tokens import PublishedKeys, Tokens
from worker.web import Bearer, health_app, serve

SECRET = "the secret of a project, of more than 32 bytes"
KEYS: dict[str, Any] = {
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "RS256": rsa.generate_private_key(65537, 2048),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}


def published(algorithm: str, key_id: str, key: Any = None, **more: Any) -> dict[str, Any]:
    public = (key or KEYS[algorithm]).public_key()
    made = jwt.get_algorithm_by_name(algorithm).to_jwk(public, as_dict=True)
    return {**made, "kid": key_id, "alg": algorithm, "use": "sig"} | more


class Project:
    """What a project publishes."""

    def __init__(self) -> None:
        self.url = ""
        self.keys: list[dict[str, Any]] = [published(name, f"key-{name}") for name in KEYS]
        self.fetched = 0
        self.clock = 1000.0
        self.answer: Response | None = None

    async def publish(self, _request: Request) -> Response:
        self.fetched += 1
        return self.answer or JSONResponse({"keys": self.keys})

    def tokens(self, **options: Any) -> Tokens:
        keys = PublishedKeys(f"{self.url}/auth/v1/.well-known/jwks.json", now=lambda: self.clock)
        return Tokens(self.url, keys=keys, **options)

    def claims(self, **changed: Any) -> dict[str, Any]:
        now = int(time.time())
        claims = {
            "iss": f"{self.url}/auth/v1",
            "sub": "8d1e7b9c-3a52-4c6f-9f10-7f8f6f2f4f11",
            "aud": "authenticated",
            "role": "authenticated",
            "iat": now,
            "exp": now + 3600,
            "app_metadata": {"provider": "email", "role": "operator"},
        } | changed
        return {name: value for name, value in claims.items() if value is not ...}

    def token(
        self, algorithm: str = "ES256", *, key: Any = None, kid: str | None = None, **claims: Any
    ) -> str:
        signed_with = key or (SECRET if algorithm == "HS256" else KEYS[algorithm])
        headers = {"kid": kid or f"key-{algorithm}"}
        return jwt.encode(self.claims(**claims), signed_with, algorithm, headers=headers)


@pytest.fixture
async def supabase() -> AsyncIterator[Project]:
    made = Project()
    app = Starlette(routes=[Route("/auth/v1/.well-known/jwks.json", made.publish)])
    async with serve(app, "127.0.0.1", 0) as served:
        made.url = served.url
        yield made


async def refusal(tokens: Tokens, token: str) -> str:
    with pytest.raises(TokenRefused) as refused:
        await tokens.verify(token)
    assert token not in str(refused.value)
    return refused.value.kind


@pytest.mark.parametrize("algorithm", KEYS)
async def test_a_user_is_known_by_a_published_key(supabase: Project, algorithm: str) -> None:
    identity = await supabase.tokens().verify(supabase.token(algorithm))
    assert (identity.subject, identity.role) == ("8d1e7b9c-3a52-4c6f-9f10-7f8f6f2f4f11", "authenticated")
    assert identity.claims["app_metadata"]["provider"] == "email"


async def test_a_user_is_known_by_the_secret_and_no_key_is_asked_for(supabase: Project) -> None:
    identity = await supabase.tokens(secret=SECRET).verify(supabase.token("HS256"))
    assert identity.role == "authenticated"
    assert supabase.fetched == 0


async def test_a_legacy_service_key_is_known_by_the_secret(supabase: Project) -> None:
    key = jwt.encode({"role": "service_role", "iss": "supabase", "exp": time.time() + 60}, SECRET, "HS256")
    identity = await supabase.tokens(secret=SECRET).verify(key)
    assert (identity.subject, identity.role) == (None, "service_role")
    assert identity.may_operate(None)


async def test_only_the_service_key_and_the_named_role_may_operate(supabase: Project) -> None:
    tokens = supabase.tokens()
    operator = await tokens.verify(supabase.token())
    assert operator.may_operate("operator")
    assert not operator.may_operate(None)
    assert not operator.may_operate("admin")
    # Users write user_metadata themselves.
    vain = await tokens.verify(supabase.token(app_metadata={}, user_metadata={"role": "operator"}))
    assert not vain.may_operate("operator")
    assert not (await tokens.verify(supabase.token(app_metadata=...))).may_operate("operator")
    assert not (await tokens.verify(supabase.token(app_metadata={"role": ["operator"]}))).may_operate(
        "operator"
    )


@pytest.mark.parametrize(
    ("claims", "kind"),
    [
        ({"exp": time.time() - 60}, "expired"),
        ({"exp": ...}, "malformed"),
        ({"exp": "soon"}, "malformed"),
        ({"nbf": time.time() + 3600}, "not yet"),
        ({"iat": time.time() + 3600}, "not yet"),
        ({"aud": "somebody"}, "audience"),
        ({"aud": ...}, "audience"),
        ({"aud": {"authenticated": 1}}, "audience"),
        ({"iss": "https://evil.example/auth/v1"}, "issuer"),
        ({"iss": ...}, "issuer"),
        ({"sub": ...}, "claims"),
        ({"sub": ""}, "claims"),
        ({"role": ...}, "claims"),
        ({"role": 7}, "claims"),
        ({"sub": ..., "role": "service_role"}, "claims"),
    ],
    # By name: the times differ from one process to the next, and tests must be called the same in both.
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
async def test_a_token_with_wrong_claims_is_refused(
    supabase: Project, claims: dict[str, Any], kind: str
) -> None:
    tokens = supabase.tokens()
    assert await refusal(tokens, supabase.token(**claims)) == kind
    await tokens.verify(supabase.token())


async def test_clocks_may_differ_a_little(supabase: Project) -> None:
    tokens, now = supabase.tokens(leeway=30), time.time()
    await tokens.verify(supabase.token(exp=now - 20))
    await tokens.verify(supabase.token(nbf=now + 20, iat=now + 20))
    assert await refusal(supabase.tokens(leeway=5), supabase.token(exp=now - 20)) == "expired"


async def test_audience_and_issuer_can_be_given(supabase: Project) -> None:
    tokens = supabase.tokens(audience="shop", issuers=["https://auth.shop.example/auth/v1"])
    await tokens.verify(supabase.token(aud=["x", "shop"], iss="https://auth.shop.example/auth/v1"))
    assert await refusal(tokens, supabase.token(aud="shop")) == "issuer"
    assert await refusal(tokens, supabase.token(iss="https://auth.shop.example/auth/v1")) == "audience"


async def test_an_unsigned_token_is_refused(supabase: Project) -> None:
    for name in ("none", "None", "NONE"):
        header = {"alg": name, "typ": "JWT", "kid": "key-ES256"}
        token = f"{encoded(header)}.{encoded(supabase.claims(role='service_role'))}."
        assert await refusal(supabase.tokens(secret=SECRET), token) == "algorithm"
    unsigned = supabase.token().rpartition(".")[0] + "."
    assert await refusal(supabase.tokens(), unsigned) in {"signature", "malformed"}


def encoded(part: Any) -> str:
    return jwt.utils.base64url_encode(json.dumps(part).encode()).decode()


@pytest.mark.parametrize("form", [PublicFormat.SubjectPublicKeyInfo, PublicFormat.PKCS1])
async def test_a_public_key_is_no_secret(supabase: Project, form: PublicFormat) -> None:
    pem = KEYS["RS256"].public_key().public_bytes(Encoding.PEM, form)
    signing = f"{encoded({'alg': 'HS256', 'kid': 'key-RS256'})}.{encoded(supabase.claims())}"
    token = f"{signing}.{jwt.utils.base64url_encode(hmac_sha256(pem, signing.encode())).decode()}"
    assert await refusal(supabase.tokens(), token) == "algorithm"
    assert await refusal(supabase.tokens(secret=SECRET), token) == "signature"


def hmac_sha256(key: bytes, text: bytes) -> bytes:
    return hmac.digest(key, text, "sha256")


async def test_forgeries_are_refused(supabase: Project) -> None:
    tokens = supabase.tokens(secret=SECRET)
    stranger = ec.generate_private_key(ec.SECP256R1())
    assert await refusal(tokens, supabase.token(key=stranger)) == "signature"
    assert (
        await refusal(tokens, supabase.token("HS256", key="another secret of more than 32 bytes"))
        == "signature"
    )
    good = supabase.token().split(".")
    forged = f"{good[0]}.{encoded(supabase.claims(role='service_role'))}.{good[2]}"
    assert await refusal(tokens, forged) == "signature"
    # A key of its own, or where to find one.
    headers = {"kid": "mine", "jwk": published("ES256", "mine", stranger), "jku": "http://127.0.0.1:9/jwks"}
    own = jwt.encode(supabase.claims(), stranger, "ES256", headers=headers)
    assert await refusal(tokens, own) == "unknown key"


async def test_a_key_serves_its_own_algorithm_only(supabase: Project) -> None:
    assert await refusal(supabase.tokens(), supabase.token("ES256", kid="key-RS256")) == "algorithm"
    other = jwt.encode(supabase.claims(), KEYS["RS256"], "RS512", headers={"kid": "key-RS256"})
    assert await refusal(supabase.tokens(), other) == "algorithm"


async def test_a_symmetric_key_in_the_key_set_is_not_used(supabase: Project) -> None:
    secret = jwt.utils.base64url_encode(b"x" * 32).decode()
    supabase.keys.append({"kty": "oct", "k": secret, "kid": "open", "alg": "HS256"})
    supabase.keys.append(published("RS256", "odd", alg="HS256"))
    for key_id in ("open", "odd"):
        token = jwt.encode(supabase.claims(), b"x" * 32, "HS256", headers={"kid": key_id})
        assert await refusal(supabase.tokens(), token) == "algorithm"
    assert await refusal(supabase.tokens(), supabase.token("RS256", kid="odd")) == "unknown key"


@pytest.mark.parametrize(
    "text",
    ["", "x", "a.b.c", "....", "é.é.é", "sb_secret_123", "e30.e30.e30", "A" * 20_000],
    ids=lambda t: t[:12],
)
async def test_what_is_no_token_is_refused(supabase: Project, text: str) -> None:
    with pytest.raises(TokenRefused):
        await supabase.tokens(secret=SECRET).verify(text)


async def test_an_extension_that_must_be_understood_is_refused(supabase: Project) -> None:
    headers = {"kid": "key-ES256", "crit": ["b64"], "b64": True}
    token = jwt.encode(supabase.claims(), KEYS["ES256"], "ES256", headers=headers)
    assert await refusal(supabase.tokens(), token) == "malformed"


async def test_keys_are_fetched_once_for_many(supabase: Project) -> None:
    tokens = supabase.tokens()
    await asyncio.gather(*(tokens.verify(supabase.token(name)) for name in KEYS for _ in range(10)))
    assert supabase.fetched == 1
    supabase.clock += 601
    await tokens.verify(supabase.token())
    assert supabase.fetched == 2


async def test_a_rotated_key_is_found_and_a_revoked_one_ends(supabase: Project) -> None:
    tokens, old = supabase.tokens(), supabase.token()
    await tokens.verify(old)
    new = ec.generate_private_key(ec.SECP256R1())
    supabase.keys = [published("ES256", "new", new)]
    supabase.clock += 11
    await tokens.verify(supabase.token(key=new, kid="new"))
    assert supabase.fetched == 2
    assert await refusal(tokens, old) == "unknown key"


async def test_made_up_key_ids_do_not_make_us_call_the_project_for_each(supabase: Project) -> None:
    tokens = supabase.tokens()
    for number in range(20):
        assert await refusal(tokens, supabase.token(kid=f"made-up-{number}")) == "unknown key"
    assert supabase.fetched == 1
    await tokens.verify(supabase.token())
    supabase.clock += 11
    assert await refusal(tokens, supabase.token(kid="made-up")) == "unknown key"
    assert supabase.fetched == 2


async def test_known_keys_outlive_an_outage_for_an_hour(supabase: Project) -> None:
    tokens = supabase.tokens()
    await tokens.verify(supabase.token())
    supabase.answer = Response(status_code=500)
    supabase.clock += 3000
    await tokens.verify(supabase.token())
    supabase.clock += 700
    with pytest.raises(KeysUnavailable):
        await tokens.verify(supabase.token())
    supabase.answer = None
    supabase.clock += 11
    await tokens.verify(supabase.token())


@pytest.mark.parametrize(
    "answer",
    [
        Response(status_code=503),
        Response("<html>", 200),
        Response("[]", 200),
        Response('{"keys": 1}', 200),
        Response(" " * 300_000, 200),
        Response(status_code=302, headers={"location": "http://127.0.0.1:9/"}),
    ],
    ids=["503", "html", "list", "number", "long", "redirect"],
)
async def test_a_project_that_publishes_no_keys_is_no_refusal(supabase: Project, answer: Response) -> None:
    supabase.answer = answer
    with pytest.raises(KeysUnavailable):
        await supabase.tokens().verify(supabase.token())


async def test_a_key_that_cannot_be_read_spoils_no_other(supabase: Project) -> None:
    supabase.keys[:0] = [{"kty": "EC", "kid": "broken", "crv": "P-256", "x": "!", "y": "!"}, {}, 7]  # type: ignore[list-item]
    await supabase.tokens().verify(supabase.token())


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 32 bytes"):
        Tokens("https://abc.supabase.co", secret="short")


@asynccontextmanager
async def guarded(bearer: Bearer) -> AsyncIterator[httpx.AsyncClient]:
    async def who(request: Request) -> Response:
        return JSONResponse((await bearer(request)).subject)

    class Idle:
        def live(self) -> tuple[bool, list[str]]:
            return True, []

        async def ready(self) -> tuple[bool, list[str]]:
            return True, []

        async def status(self) -> dict[str, Any]:
            return {}

    app = health_app(Idle(), routes=[Route("/who", who)])
    async with (
        serve(app, "127.0.0.1", 0) as served,
        httpx.AsyncClient(base_url=served.url, trust_env=False) as client,
    ):
        yield client


async def test_a_request_is_answered_by_who_sends_it(supabase: Project) -> None:
    bearer = Bearer(supabase.tokens(), allow=lambda identity: identity.may_operate("operator"))
    async with guarded(bearer) as client:

        async def ask(token: str) -> httpx.Response:
            return await client.get("/who", headers={"authorization": token})

        good = supabase.token()
        assert (await ask(f"Bearer {good}")).json() == supabase.claims()["sub"]
        assert (await ask(f"bearer  {good}")).status_code == 200
        expired = await ask(f"Bearer {supabase.token(exp=1)}")
        assert expired.status_code == 401
        assert expired.headers["www-authenticate"].startswith('Bearer error="invalid_token"')
        assert expired.json() == {"error": "the token is refused: it has expired"}
        for missing in ("", "Basic dTpw", "Bearer"):
            answer = await ask(missing)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        twice = await client.get("/who", headers=[("authorization", f"Bearer {good}")] * 2)
        assert twice.status_code == 401
        assert (await ask(f"Bearer {supabase.token(app_metadata={})}")).status_code == 403
        supabase.answer = Response(status_code=500)
        supabase.clock += 4000
        away = await ask(f"Bearer {good}")
        assert (away.status_code, away.headers["retry-after"]) == (503, "10")
