"""Auth and Storage of a project, so far as an API needs them: users, tokens and objects in memory."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email import message_from_bytes
from typing import Any

import jwt
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from worker.web import serve


class Services:
    """Of one project."""

    def __init__(self, secret: str, anon_key: str, service_key: str) -> None:
        self.secret = secret
        self.keys = {anon_key, service_key}
        self.service_key = service_key
        self.url = ""
        self.users: dict[str, tuple[str, str]] = {}
        """Address to id and password."""
        self.refresh: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}
        self.mails: list[str] = []
        self.away = asyncio.Event()

    def token(self, email: str, *, seconds: float = 3600.0) -> str:
        """Sign a token of a user."""
        claims = {
            "sub": self.users[email][0],
            "email": email,
            "role": "authenticated",
            "aud": "authenticated",
            "iss": f"{self.url}/auth/v1",
            "exp": time.time() + seconds,
        }
        return jwt.encode(claims, self.secret, "HS256")

    async def answer(self, request: Request) -> Response:
        """Answer as Kong in front of them would."""
        body = await request.body()
        if self.away.is_set():
            return JSONResponse({"message": "upstream"}, 502)
        if request.headers.get("apikey") not in self.keys:
            return JSONResponse({"message": "Invalid API key"}, 401)
        _, service, _, path = request.url.path.split("/", 3)
        return (self._auth if service == "auth" else self._storage)(request, path, body)

    def _auth(self, request: Request, path: str, body: bytes) -> Response:  # noqa: PLR0911 - one for each call
        told: dict[str, Any] = json.loads(body or b"{}")
        match request.method, path:
            case "POST", "signup":
                if told["email"] in self.users:
                    return _refused(422, "user_already_exists", "User already registered")
                self.users[told["email"]] = (str(uuid.uuid4()), told["password"])
                return self._session(told["email"])
            case "POST", "token" if request.query_params["grant_type"] == "password":
                if self.users.get(told["email"], ("", None))[1] != told["password"]:
                    return _refused(400, "invalid_credentials", "Invalid login credentials")
                return self._session(told["email"])
            case "POST", "token":
                email = self.refresh.pop(told["refresh_token"], None)
                if email is None:
                    return _refused(400, "refresh_token_not_found", "Invalid Refresh Token")
                return self._session(email)
            case "POST", "logout":
                token = request.headers["authorization"].removeprefix("Bearer ")
                email = jwt.decode(token, options={"verify_signature": False})["email"]
                self.refresh = {one: whose for one, whose in self.refresh.items() if whose != email}
                return Response(status_code=204)
            case "POST", "recover":
                self.mails.append(told["email"])
                return JSONResponse({})
        assert request.headers["apikey"] == self.service_key
        user = path.removeprefix("admin/users/")
        self.users = {email: one for email, one in self.users.items() if one[0] != user}
        return JSONResponse({})

    def _session(self, email: str) -> Response:
        fresh = uuid.uuid4().hex
        self.refresh[fresh] = email
        return JSONResponse(
            {"access_token": self.token(email), "refresh_token": fresh, "expires_in": 3600, "user": {}}
        )

    def _storage(self, request: Request, path: str, body: bytes) -> Response:
        name = path.removeprefix("object/")
        if request.method == "DELETE":
            gone = [one for one in json.loads(body)["prefixes"] if self.objects.pop(f"{name}/{one}", None)]
            return JSONResponse([{"name": one} for one in gone])
        if name.startswith("sign/"):
            return JSONResponse({"signedURL": f"/object/{name}?token=of-this-object"})
        form = message_from_bytes(
            b"Content-Type: " + request.headers["content-type"].encode() + b"\r\n\r\n" + body
        )
        (file,) = [part for part in form.walk() if part.get_filename() is not None]
        content = file.get_payload(decode=True)
        assert isinstance(content, bytes)
        self.objects[name] = content
        return JSONResponse({"Key": name, "Id": "1"})


def _refused(status: int, code: str, words: str) -> Response:
    return JSONResponse({"code": status, "error_code": code, "msg": words}, status)


@asynccontextmanager
async def supabase_services(secret: str, anon_key: str, service_key: str) -> AsyncIterator[Services]:
    """Serve them."""
    made = Services(secret, anon_key, service_key)
    routes = [Route("/{path:path}", made.answer, methods=["GET", "POST", "PUT", "DELETE"])]
    async with serve(Starlette(routes=routes), "127.0.0.1", 0) as served:
        made.url = served.url
        yield made
