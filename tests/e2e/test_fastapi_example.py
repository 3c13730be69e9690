"""The example API, over HTTP, beside a real listener and worker that derive what it shows."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.e2e.supabase_services import Services, supabase_services
from tests.stack import ROOT, SECRET, Project, Servers, only_environment, project
from worker.web import serve

pytest.importorskip("fastapi", reason="requirements.lock has changed: make setup")

from examples.fastapi_app.app import create_app
from examples.fastapi_app.settings import ApiSettings

ANON, SERVICE = "sb_publishable_of_everybody", "sb_secret_of_nobody"
SCHEMA = (ROOT / "examples/fastapi_app/schema.sql").read_text()
SLOT = "of_the_fastapi_example"
ORIGIN = "https://posts.example"


@dataclass
class Api:
    """The API of a project, and somebody who calls it."""

    project: Project
    supabase: Services
    http: httpx.AsyncClient

    async def person(self, name: str) -> dict[str, str]:
        """Sign somebody up, with a profile; gives the headers of their requests."""
        email = f"{name.split(maxsplit=1)[0]}@example.com"
        made = await self.http.post("/auth/sign-up", json={"email": email, "password": "long enough"})
        assert made.status_code == 201, made.text
        own = {"Authorization": f"Bearer {made.json()['access_token']}"}
        made = await self.http.post("/users", json={"name": name}, headers=own)
        assert made.status_code == 201, made.text
        return own


@pytest.fixture
async def api(shared: Servers) -> AsyncIterator[Api]:
    async with (
        supabase_services(SECRET, ANON, SERVICE) as supabase,
        project(
            shared,
            "select 1",
            "examples.fastapi_app.handlers",
            WORKER_DELIVERY="proven",
            WORKER_SLOT=SLOT,
        ) as made,
    ):
        await made.db.execute(SCHEMA)
        environment = {
            name: value for name, value in made.environment.items() if name.isupper() and name != "PATH"
        }
        environment |= {
            "SUPABASE_URL": supabase.url,
            "SUPABASE_JWT_SECRET": SECRET,
            "SUPABASE_SERVICE_ROLE_KEY": SERVICE,
            "SUPABASE_ANON_KEY": ANON,
            "API_CORS_ORIGINS": ORIGIN,
            "API_MAX_FILE_BYTES": "1000",
        }
        with only_environment(environment):
            app = create_app(None, ApiSettings.load())
        async with (
            app.router.lifespan_context(app),
            serve(app, "127.0.0.1", 0) as served,
            httpx.AsyncClient(base_url=served.url, trust_env=False, timeout=30) as http,
        ):
            yield Api(made, supabase, http)
        await made.kill_all(SLOT)


def error(answer: httpx.Response) -> tuple[int, str]:
    """What an answer refuses with; each says in words what to do."""
    told = answer.json()["error"]
    assert told["message"]
    return answer.status_code, told["code"]


async def test_people_sign_up_in_and_out(api: Api) -> None:
    http = api.http
    ada = {"email": "ada@example.com", "password": "long enough"}
    assert error(await http.post("/auth/sign-up", json=ada | {"password": "short"})) == (422, "invalid")
    signed = (await http.post("/auth/sign-up", json=ada)).json()
    assert error(await http.post("/auth/sign-up", json=ada)) == (422, "invalid")
    wrong = await http.post("/auth/sign-in", json=ada | {"password": "not this one"})
    assert error(wrong) == (400, "bad_request")
    assert wrong.json()["error"]["message"] == "Invalid login credentials"
    signed = (await http.post("/auth/sign-in", json=ada)).json()
    own = {"Authorization": f"Bearer {signed['access_token']}"}
    me = (await http.get("/auth/me", headers=own)).json()
    assert (me["email"], me["role"], me["name"]) == ("ada@example.com", "authenticated", None)
    fresh = (await http.post("/auth/refresh", json={"refresh_token": signed["refresh_token"]})).json()
    assert (await http.post("/auth/sign-out", headers=own)).status_code == 204
    again = await http.post("/auth/refresh", json={"refresh_token": fresh["refresh_token"]})
    assert error(again) == (400, "bad_request")
    for email in ("ada@example.com", "nobody@example.com"):
        assert (await http.post("/auth/reset", json={"email": email})).status_code == 202
    assert api.supabase.mails == ["ada@example.com", "nobody@example.com"]
    api.supabase.away.set()
    assert error(await http.post("/auth/sign-in", json=ada)) == (503, "unavailable")


async def test_without_a_good_token_there_is_nothing(api: Api) -> None:
    await api.person("ada")
    old = api.supabase.token("ada@example.com", seconds=-60)
    for headers in ({}, {"Authorization": f"Bearer {old}"}, {"Authorization": f"Bearer {old}x"}):
        for path in ("/auth/me", "/users", "/posts", "/files", "/stats/authors"):
            assert error(await api.http.get(path, headers=headers)) == (401, "not_signed_in")


async def test_profiles_are_read_by_all_and_changed_by_their_own(api: Api) -> None:
    ada, bob = await api.person("Ada"), await api.person("Bob 100%")
    http = api.http
    assert error(await http.post("/users", json={"name": "Ada"}, headers=ada)) == (409, "conflict")
    found = (await http.get("/users", params={"name": "0%"}, headers=ada)).json()
    assert [one["name"] for one in found] == ["Bob 100%"]
    first = (await http.get("/users", params={"limit": 1}, headers=ada)).json()
    second = (await http.get("/users", params={"limit": 1, "after": first[0]["id"]}, headers=ada)).json()
    assert {one["name"] for one in first + second} == {"Ada", "Bob 100%"}
    changed = (await http.patch("/users/me", json={"name": "Bob"}, headers=bob)).json()
    assert (await http.get(f"/users/{changed['id']}", headers=ada)).json()["name"] == "Bob"
    assert error(await http.patch("/users/me", json={"name": ""}, headers=bob)) == (422, "invalid")
    assert (await http.delete("/users/me", headers=bob)).status_code == 204
    assert error(await http.get(f"/users/{changed['id']}", headers=ada)) == (404, "not_found")
    assert set(api.supabase.users) == {"Ada@example.com"}


async def test_posts_are_found_page_by_page_and_drafts_only_by_their_author(api: Api) -> None:
    ada, bob = await api.person("ada"), await api.person("bob")
    http = api.http
    numbers = []
    for n in range(5):
        post = {"title": f"Post {n}", "body": "about bread" if n % 2 else "about cake", "published": n != 4}
        made = await http.post("/posts", json=post, headers=ada)
        numbers.append(made.json()["id"])

    async def pages(headers: dict[str, str], **query: Any) -> list[str]:
        titles, before = [], None
        while True:
            asked = query | ({} if before is None else {"before": before})
            page = (await http.get("/posts", params={"limit": 2} | asked, headers=headers)).json()
            titles += [one["title"] for one in page["posts"]]
            before = page["next"]
            if before is None:
                return titles

    assert await pages(ada) == ["Post 4", "Post 3", "Post 2", "Post 1", "Post 0"]
    assert await pages(bob) == ["Post 3", "Post 2", "Post 1", "Post 0"]
    assert await pages(bob, q="bread") == ["Post 3", "Post 1"]
    assert await pages(bob, q="post -cake") == ["Post 3", "Post 1"]
    assert error(await http.get(f"/posts/{numbers[4]}", headers=bob)) == (404, "not_found")
    for attempt in (
        http.patch(f"/posts/{numbers[0]}", json={"title": "mine"}, headers=bob),
        http.delete(f"/posts/{numbers[0]}", headers=bob),
    ):
        assert error(await attempt) == (404, "not_found")
    changed = (await http.patch(f"/posts/{numbers[4]}", json={"published": True}, headers=ada)).json()
    assert (changed["title"], changed["published"]) == ("Post 4", True)
    assert (await http.get(f"/posts/{numbers[4]}", headers=bob)).status_code == 200
    assert (await http.delete(f"/posts/{numbers[4]}", headers=ada)).status_code == 204
    assert await pages(ada, author=changed["author_id"], q='"about cake"') == ["Post 2", "Post 0"]
    assert error(await http.post("/posts", json={"title": "x" * 201}, headers=ada)) == (422, "invalid")


async def test_files_belong_to_whoever_has_uploaded_them(api: Api) -> None:
    ada, bob = await api.person("ada"), await api.person("bob")
    http = api.http
    kind = {"Content-Type": "text/plain"}
    made = await http.put("/files/notes.txt", content=b"some notes", headers=ada | kind)
    assert made.status_code == 201, made.text
    file = made.json()
    assert (file["name"], file["size"], file["content_type"]) == ("notes.txt", 10, "text/plain")
    assert list(api.supabase.objects.values()) == [b"some notes"]
    assert error(await http.put("/files/big", content=b"x" * 1001, headers=ada)) == (413, "too_large")
    assert (await http.get("/files", headers=bob)).json() == []
    assert error(await http.delete(f"/files/{file['id']}", headers=bob)) == (404, "not_found")
    assert error(await http.post(f"/files/{file['id']}/link", headers=bob)) == (404, "not_found")
    link = (await http.post(f"/files/{file['id']}/link", headers=ada)).json()
    assert file["id"] in link["url"]
    assert "token=" in link["url"]
    api.supabase.away.set()
    assert error(await http.delete(f"/files/{file['id']}", headers=ada)) == (503, "unavailable")
    assert error(await http.put("/files/other", content=b"x", headers=ada)) == (503, "unavailable")
    api.supabase.away.clear()
    # What Storage did not do has not happened here either.
    assert [one["name"] for one in (await http.get("/files", headers=ada)).json()] == ["notes.txt"]
    assert (await http.delete(f"/files/{file['id']}", headers=ada)).status_code == 204
    assert api.supabase.objects == {}


@asynccontextmanager
async def stream(api: Api, headers: dict[str, str], author: str) -> AsyncIterator[AsyncIterator[Any]]:
    async def events(answer: httpx.Response) -> AsyncIterator[Any]:
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))

    asked = api.http.stream("GET", "/stats/stream", params={"author": author}, headers=headers)
    async with asked as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield events(answer)


async def until(events: AsyncIterator[Any], **wanted: int) -> None:
    async for told in events:
        if told is not None and told | wanted == told:
            return
    raise AssertionError("the stream ended")


async def test_what_the_worker_derives_is_read_and_streamed(api: Api) -> None:
    await api.project.listener()
    await api.project.worker()
    ada, bob = await api.person("ada"), await api.person("bob")
    author = (await api.http.get("/auth/me", headers=ada)).json()["id"]
    async with stream(api, bob, author) as events:
        assert await anext(events) is None
        post = {"title": "One", "body": "four words of text", "published": True}
        made = (await api.http.post("/posts", json=post, headers=ada)).json()
        await until(events, posts=1, published=1, words=4)
        # The one who listens has lost the connection: nothing is missed for it.
        await api.project.db.execute(
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity where query like 'LISTEN%'"
        )
        await api.http.post("/posts", json=post | {"published": False}, headers=ada)
        await until(events, posts=2, published=1, words=8)
        await api.http.delete(f"/posts/{made['id']}", headers=ada)
        await until(events, posts=1, published=0, words=4)
    shown = (await api.http.get(f"/stats/authors/{author}", headers=bob)).json()
    assert (shown["posts"], shown["words"]) == (1, 4)
    assert [one["author_id"] for one in (await api.http.get("/stats/authors", headers=bob)).json()] == [
        author
    ]


async def test_health_cors_and_failures_without_traces(api: Api) -> None:
    health = await api.http.get("/health")
    assert (health.status_code, health.json()["database"]) == (200, True)
    asked = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    assert (await api.http.options("/posts", headers=asked)).headers["access-control-allow-origin"] == ORIGIN
    other = await api.http.options("/posts", headers=asked | {"Origin": "https://elsewhere.example"})
    assert "access-control-allow-origin" not in other.headers
    assert error(await api.http.get("/nowhere")) == (404, "not_found")
    ada = await api.person("ada")
    await api.project.db.execute("alter table posts rename to posts_of_old")
    answer = await api.http.get("/posts", headers=ada)
    assert error(answer) == (500, "internal")
    assert "posts" not in answer.text.replace("failed", "")
    with pytest.raises(ValueError, match="name the origins"):
        ApiSettings(SUPABASE_ANON_KEY="x", API_CORS_ORIGINS="*")  # type: ignore[call-arg]
