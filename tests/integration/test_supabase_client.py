"""`context.supabase` against an HTTP server that answers as the documented APIs do, in good times and bad."""

import asyncio
import email
import json
import logging
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from postgrest.exceptions import APIError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from storage3.exceptions import StorageApiError
from supabase import AsyncClient

from config.settings import Settings
from worker.supabase import PatientTransport, SupabaseClients
from worker.web import serve

LEGACY = "eyJhbGciOiJIUzI1NiJ9.eyJyb2xlIjoic2VydmljZV9yb2xlIn0.c2lnbmF0dXJl"
SECRET_KEY = "sb_secret_0123456789abcdef_01234567"
USER = {
    "id": "8d1e7b9c-3a52-4c6f-9f10-7f8f6f2f4f11",
    "aud": "authenticated",
    "role": "authenticated",
    "email": "ada@example.com",
    "app_metadata": {},
    "user_metadata": {},
    "created_at": "2026-01-01T00:00:00Z",
}


class Api:
    """Storage, Auth and PostgREST of a project; `trouble` is answered first."""

    def __init__(self) -> None:
        self.url = ""
        self.key = LEGACY
        self.objects: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.bearers: set[str] = set()
        self.trouble: list[Response | None] = []
        self.silent = asyncio.Event()

    async def answer(self, request: Request) -> Response:
        path, body = request.url.path, await request.body()
        self.asked.append((request.method, path))
        public = "/object/public/" in path or (
            path.startswith("/storage/v1/object/sign/") and request.method == "GET"
        )
        if not public and request.headers.get("apikey") != self.key:
            return JSONResponse({"message": "Invalid API key"}, 401)
        self.bearers.add(request.headers.get("authorization", ""))
        if self.trouble:
            trouble = self.trouble.pop(0)
            if trouble is None:
                await self.silent.wait()
                return Response(status_code=499)
            return trouble
        service, _, rest = path.removeprefix("/").partition("/v1/")
        done: Response = getattr(self, service)(request, rest, body)
        return done

    def storage(self, request: Request, path: str, body: bytes) -> Response:  # noqa: PLR0911 - one for each call
        name = path.removeprefix("object/")
        match request.method, name.split("/", 1)[0]:
            case "POST", "list":
                bucket, prefix = name.removeprefix("list/"), json.loads(body)["prefix"]
                start = f"{bucket}/{prefix}".rstrip("/") + "/"
                found = [
                    {"name": one.removeprefix(start)} for one in sorted(self.objects) if one.startswith(start)
                ]
                return JSONResponse(found)
            case "POST", "sign":
                return JSONResponse({"signedURL": f"/{path}?token=of-this-object"})
            case "GET", "sign" | "public":
                return self._object(name.split("/", 1)[1])
            case "GET", _:
                return self._object(name)
            case "DELETE", bucket:
                gone = [
                    one for one in json.loads(body)["prefixes"] if self.objects.pop(f"{bucket}/{one}", None)
                ]
                return JSONResponse([{"name": one} for one in gone])
        if name in self.objects and request.headers.get("x-upsert") != "true":
            told = {"statusCode": "409", "error": "Duplicate", "message": "The resource already exists"}
            return JSONResponse(told, 400)
        self.objects[name] = _uploaded(request.headers["content-type"], body)
        return JSONResponse({"Key": name, "Id": "1"})

    def _object(self, name: str) -> Response:
        if name not in self.objects:
            told = {"statusCode": "404", "error": "not_found", "message": "Object not found"}
            return JSONResponse(told, 400)
        return Response(self.objects[name])

    def auth(self, request: Request, path: str, _body: bytes) -> Response:
        if path == "token":
            return JSONResponse({"access_token": "of.a.user", "token_type": "bearer", "expires_in": 3600,
                                 "refresh_token": "r", "user": USER})  # fmt: skip
        if path == "admin/users" and request.method == "GET":
            return JSONResponse({"users": [USER], "aud": "authenticated"})
        return JSONResponse({} if request.method == "DELETE" else USER)

    def rest(self, request: Request, path: str, body: bytes) -> Response:
        if path == "rpc/add":
            given = json.loads(body)
            return JSONResponse(given["a"] + given["b"])
        if path != "orders":
            return JSONResponse(
                {"code": "PGRST205", "message": "no such table", "hint": None, "details": None}, 404
            )
        return JSONResponse([{"id": 1, "asked": str(request.url.query)}])


def _uploaded(content_type: str, body: bytes) -> bytes:
    """The file in a form of several parts."""
    form = email.message_from_bytes(b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + body)
    (file,) = [part for part in form.walk() if part.get_filename() is not None]
    content = file.get_payload(decode=True)
    assert isinstance(content, bytes)
    return content


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    made = Api()
    methods = ["GET", "POST", "PUT", "DELETE", "PATCH"]
    app = Starlette(routes=[Route("/{path:path}", made.answer, methods=methods)])
    async with serve(app, "127.0.0.1", 0) as served:
        made.url = served.url
        yield made
        made.silent.set()


def settings(api: Api, key: str = LEGACY) -> Settings:
    api.key = key
    return Settings(
        _env_file=None,  # type: ignore[call-arg] # as config.settings does
        supabase_url=api.url,
        service_role_key=key,
        database_url="postgresql://u:p@127.0.0.1:1/x",
        redis_url="redis://127.0.0.1:1",
    )


@pytest.fixture
async def supabase(api: Api) -> AsyncIterator[AsyncClient]:
    clients = SupabaseClients(settings(api))
    yield clients.get()
    await clients.close()


async def test_storage(supabase: AsyncClient, api: Api) -> None:
    bucket = supabase.storage.from_("bills")
    await bucket.upload("2026/1.txt", b"one", {"content-type": "text/plain"})
    await bucket.upload("2026/2.txt", b"two")
    with pytest.raises(StorageApiError, match="already exists"):
        await bucket.upload("2026/1.txt", b"again")
    await bucket.upload("2026/1.txt", b"uno", {"upsert": "true"})
    assert await bucket.download("2026/1.txt") == b"uno"
    assert [one["name"] for one in await bucket.list("2026")] == ["1.txt", "2.txt"]
    signed = (await bucket.create_signed_url("2026/2.txt", 60))["signedURL"]
    public = await bucket.get_public_url("2026/2.txt")
    async with httpx.AsyncClient(trust_env=False) as stranger:
        assert (await stranger.get(signed)).content == b"two"
        assert (await stranger.get(public)).content == b"two"
    assert api.key not in signed + public
    await bucket.remove(["2026/1.txt", "2026/2.txt"])
    assert api.objects == {}
    with pytest.raises(StorageApiError, match="not found"):
        await bucket.download("2026/1.txt")


async def test_users(supabase: AsyncClient) -> None:
    admin = supabase.auth.admin
    made = await admin.create_user({"email": "ada@example.com", "email_confirm": True})
    assert made.user.email == "ada@example.com"
    assert (await admin.get_user_by_id(USER["id"])).user.id == USER["id"]  # type: ignore[arg-type] # a text
    assert [one.email for one in await admin.list_users()] == ["ada@example.com"]
    await admin.delete_user(str(USER["id"]))


async def test_rows_and_functions(supabase: AsyncClient) -> None:
    rows = (await supabase.table("orders").select("id").eq("status", "paid").execute()).data
    assert rows == [{"id": 1, "asked": "select=id&status=eq.paid"}]
    assert (await supabase.rpc("add", {"a": 1, "b": 2}).execute()).data == 3
    with pytest.raises(APIError, match="no such table"):
        await supabase.table("nothing").select("*").execute()


@pytest.mark.parametrize("key", [LEGACY, SECRET_KEY], ids=["legacy", "sb_secret"])
async def test_both_kinds_of_key(api: Api, key: str) -> None:
    clients = SupabaseClients(settings(api, key))
    try:
        supabase = clients.get()
        assert clients.get() is supabase
        await supabase.table("orders").select("id").execute()
        await supabase.storage.from_("bills").list("")
        await supabase.auth.admin.list_users()
    finally:
        await clients.close()
    assert api.bearers == {f"Bearer {key}"}


async def test_it_stays_the_services_whoever_signs_in(supabase: AsyncClient, api: Api) -> None:
    await supabase.auth.sign_in_with_password({"email": "ada@example.com", "password": "x"})
    api.bearers.clear()
    await supabase.table("orders").select("id").execute()
    await supabase.storage.from_("bills").list("")
    assert api.bearers == {f"Bearer {LEGACY}"}


def later(status: int) -> Response:
    return Response(status_code=status, headers={"retry-after": "0"})


async def test_reading_goes_on_after_trouble(supabase: AsyncClient, api: Api) -> None:
    for status in (429, 500, 503):
        api.trouble = [later(status), later(status), later(status)]
        await supabase.storage.from_("bills").list("")
        await supabase.storage.from_("bills").create_signed_url("x", 60)
    assert len(api.asked) == 3 * 5


async def test_it_does_not_ask_for_ever(supabase: AsyncClient, api: Api) -> None:
    api.trouble = [later(429)] * 9
    with pytest.raises(StorageApiError):
        await supabase.storage.from_("bills").download("x")
    assert len(api.asked) == 4


async def test_what_may_have_been_done_is_not_done_twice(supabase: AsyncClient, api: Api) -> None:
    api.trouble = [later(503)]
    with pytest.raises(Exception, match="Service Unavailable"):
        await supabase.auth.admin.create_user({"email": "ada@example.com"})
    assert len(api.asked) == 1
    # Of 429 it is known that nothing was done, and an upload that may replace can do so with itself.
    api.trouble = [later(429)]
    await supabase.auth.admin.create_user({"email": "ada@example.com"})
    api.trouble = [later(502)]
    await supabase.storage.from_("bills").upload("1", b"one", {"upsert": "true"})
    assert api.objects == {"bills/1": b"one"}
    assert len(api.asked) == 5


async def test_a_server_that_is_silent_is_asked_again(api: Api) -> None:
    inner = httpx.AsyncHTTPTransport()
    transport = PatientTransport(inner, first_seconds=0.001)
    async with httpx.AsyncClient(transport=transport, timeout=0.2, headers={"apikey": api.key}) as client:
        api.trouble = [None]
        assert (await client.get(f"{api.url}/rest/v1/orders")).status_code == 200
        assert len(api.asked) == 2
        api.trouble = [None]
        with pytest.raises(httpx.ReadTimeout):
            await client.post(f"{api.url}/rest/v1/orders", json={})
        assert len(api.asked) == 3


async def test_nobody_there_is_tried_again_whatever_it_is(unused_port: int) -> None:
    tried = 0

    class Counted(httpx.AsyncHTTPTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            nonlocal tried
            tried += 1
            return await super().handle_async_request(request)

    transport = PatientTransport(Counted(), attempts=3, first_seconds=0.001)
    async with httpx.AsyncClient(transport=transport) as client:
        with pytest.raises(httpx.ConnectError):
            await client.post(f"http://127.0.0.1:{unused_port}/auth/v1/admin/users", json={})
    assert tried == 3


@pytest.fixture
def unused_port() -> Any:
    with socket.socket() as bound:  # bound, and listening to nobody
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


async def test_the_key_goes_nowhere_else(supabase: AsyncClient, api: Api) -> None:
    api.trouble = [Response(status_code=302, headers={"location": "http://127.0.0.1:9/"})]
    with pytest.raises(Exception, match=r"302|[Rr]edirect"):
        await supabase.storage.from_("bills").download("x")
    assert len(api.asked) == 1


async def test_no_key_is_logged(
    supabase: AsyncClient, api: Api, caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    caplog.set_level(logging.DEBUG)
    api.trouble = [later(429), later(500)]
    await supabase.storage.from_("bills").list("")
    api.trouble = [later(400)]
    with pytest.raises(Exception) as failed:  # noqa: PT011 - whatever it is, it must not tell
        await supabase.table("orders").select("id").execute()
    told = capsys.readouterr()
    texts = caplog.text + told.out + told.err + repr(failed.value) + str(failed.value)
    assert "asking again" in texts
    assert LEGACY not in texts
