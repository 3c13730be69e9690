"""What the whole process has once: engine, keys, clients, the feed of derived changes."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated
from uuid import UUID

import httpx
from fastapi import Depends, HTTPException, Request
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from supabase import AsyncClient

from config.settings import Settings
from examples.fastapi_app.feed import Feed
from examples.fastapi_app.settings import ApiSettings
from worker.database import make_engine
from worker.sessions import session_as
from worker.supabase import SupabaseClients
from worker.tokens import Identity, Tokens
from worker.web import Bearer


@dataclass
class Services:
    """Of one process."""

    settings: Settings
    api: ApiSettings
    engine: AsyncEngine
    bearer: Bearer
    auth: httpx.AsyncClient
    """Speaks to Supabase Auth as anybody may."""
    clients: SupabaseClients
    feed: Feed

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings, api: ApiSettings) -> AsyncGenerator["Services"]:
        """Open them, and close them again."""
        url = settings.database_url.get_secret_value()
        direct = settings.database_direct_url
        engine = make_engine(url, name="fastapi_app", size=5)
        secret = settings.jwt_secret
        tokens = Tokens(settings.supabase_url, secret=secret.get_secret_value() if secret else None)
        clients = SupabaseClients(settings)
        key = api.anon_key.get_secret_value()
        auth = httpx.AsyncClient(
            base_url=f"{settings.supabase_url}/auth/v1", headers={"apikey": key}, timeout=10, trust_env=False
        )
        feed = Feed(direct.get_secret_value() if direct else url)
        try:
            async with auth, feed.running():
                yield cls(settings, api, engine, Bearer(tokens), auth, clients, feed)
        finally:
            await clients.close()
            await engine.dispose()


def services(request: Request) -> Services:
    """Give those of the process."""
    found: Services = request.app.state.services
    return found


Here = Annotated[Services, Depends(services)]


async def identity(request: Request, here: Here) -> Identity:
    """Tell whose request it is, or answer 401."""
    return await here.bearer(request)


Caller = Annotated[Identity, Depends(identity)]


def person(caller: Caller) -> UUID:
    """Give the id of the caller, who must be somebody: the project's own keys are nobody."""
    if caller.subject is None:
        raise HTTPException(403, "sign in: this belongs to a person")
    return UUID(caller.subject)


Me = Annotated[UUID, Depends(person)]


async def session(caller: Caller, here: Here) -> AsyncIterator[AsyncSession]:
    """Give a session in which the caller's rights hold: policies decide, not this code."""
    async with session_as(here.engine, caller.role, caller.claims) as made:
        yield made


# Within the function: committed before the answer is sent, which says that it is done.
Own = Annotated[AsyncSession, Depends(session, scope="function")]


def service_client(here: Here) -> AsyncClient:
    """Give the client with the service key. It may do everything: look who is asking, first."""
    return here.clients.get()


ServiceClient = Annotated[AsyncClient, Depends(service_client)]
