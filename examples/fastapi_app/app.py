"""The application: `uvicorn --factory examples.fastapi_app.app:create_app`."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Response
from fastapi.middleware.cors import CORSMiddleware
from sqlalchemy import text

from config.settings import Settings, load_settings
from examples.fastapi_app import errors
from examples.fastapi_app.files import files
from examples.fastapi_app.people import auth, users
from examples.fastapi_app.posts import posts
from examples.fastapi_app.services import Here, Services
from examples.fastapi_app.settings import ApiSettings
from examples.fastapi_app.stats import stats
from worker.database import DATABASE_ERRORS


def create_app(settings: Settings | None = None, api: ApiSettings | None = None) -> FastAPI:
    """Make it.

    Args:
        settings: the worker's; by default from the environment and `.env`.
        api: this API's own; as above.
    """
    settings = settings or load_settings()
    own = api or ApiSettings.load()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        async with Services.open(settings, own) as services:
            app.state.services = services
            yield

    app = FastAPI(title="Posts", lifespan=lifespan)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(own.cors_origins),
        allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
        allow_headers=["Authorization", "Content-Type"],
    )
    errors.install(app)
    for router in (auth, users, posts, files, stats):
        app.include_router(router)
    app.get("/health", tags=["health"])(health)
    return app


async def health(here: Here, response: Response) -> dict[str, bool]:
    """Tell whether requests can be served."""
    try:
        async with here.engine.connect() as connection:
            await connection.execute(text("select 1"))
        database = True
    except DATABASE_ERRORS:
        database = False
    response.status_code = 200 if database else 503
    return {"database": database, "feed": here.feed.connected}
