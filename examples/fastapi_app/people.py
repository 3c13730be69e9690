"""Signing up and in, by Supabase Auth; and the profiles of people."""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

import httpx
from fastapi import APIRouter, HTTPException, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, SecretStr
from sqlalchemy import delete, select, update

from examples.fastapi_app.services import Caller, Here, Me, Own, ServiceClient, Services
from examples.fastapi_app.tables import Profile

auth = APIRouter(prefix="/auth", tags=["auth"])
users = APIRouter(prefix="/users", tags=["users"])

Name = Annotated[str, Field(min_length=1, max_length=80)]


class Credentials(BaseModel):
    """Of a person."""

    email: Annotated[str, Field(pattern=r"^[^@\s]+@[^@\s]+$", max_length=254)]
    password: Annotated[SecretStr, Field(min_length=8, max_length=72)]

    def told(self) -> dict[str, str]:
        """As Auth wants to have them."""
        return {"email": self.email, "password": self.password.get_secret_value()}


class Address(BaseModel):
    """Of somebody who has forgotten a password."""

    email: Annotated[str, Field(pattern=r"^[^@\s]+@[^@\s]+$", max_length=254)]


class Refresh(BaseModel):
    """What was given with a token, for the next one."""

    refresh_token: SecretStr


class Signed(BaseModel):
    """Signed in."""

    access_token: str
    refresh_token: str
    expires_in: int


async def _ask(here: Services, method: str, path: str, **request: Any) -> dict[str, Any]:  # noqa: ANN401 - handed on
    """Ask Auth; what it refuses is our answer, in its words."""
    try:
        answer = await here.auth.request(method, path, **request)
    except httpx.HTTPError:
        raise HTTPException(503, "Supabase Auth cannot be reached just now: try again") from None
    if answer.status_code >= 500:  # noqa: PLR2004 - server errors
        raise HTTPException(503, "Supabase Auth cannot answer just now: try again")
    told: dict[str, Any] = answer.json() if answer.content else {}
    if answer.is_error:
        words = told.get("msg") or told.get("error_description") or told.get("message") or "refused"
        raise HTTPException(answer.status_code, str(words))
    return told


def _signed(told: dict[str, Any]) -> Signed | None:
    return Signed.model_validate(told) if "access_token" in told else None


@auth.post("/sign-up", status_code=201)
async def sign_up(wanted: Credentials, here: Here) -> Signed | None:
    """Make a user; the answer is null where the project wants the address confirmed first."""
    return _signed(await _ask(here, "POST", "/signup", json=wanted.told()))


@auth.post("/sign-in")
async def sign_in(wanted: Credentials, here: Here) -> Signed:
    """Sign in by password."""
    grant = {"grant_type": "password"}
    return Signed.model_validate(await _ask(here, "POST", "/token", params=grant, json=wanted.told()))


@auth.post("/refresh")
async def refresh(given: Refresh, here: Here) -> Signed:
    """Get a new token before the old one expires."""
    told = {"refresh_token": given.refresh_token.get_secret_value()}
    grant = {"grant_type": "refresh_token"}
    return Signed.model_validate(await _ask(here, "POST", "/token", params=grant, json=told))


@auth.post("/sign-out", status_code=204)
async def sign_out(request: Request, _: Caller, here: Here) -> Response:
    """End the caller's sessions: no new token is given for them. The old one ends when it expires."""
    await _ask(here, "POST", "/logout", headers={"Authorization": request.headers["authorization"]})
    return Response(status_code=204)


@auth.post("/reset", status_code=202)
async def reset(wanted: Address, here: Here) -> dict[str, str]:
    """Send a mail for a new password. The answer does not tell whether anybody has that address."""
    where = {"redirect_to": here.api.reset_url} if here.api.reset_url else {}
    try:
        await _ask(here, "POST", "/recover", params=where, json={"email": wanted.email})
    except HTTPException as refused:
        if refused.status_code in (429, 503):
            raise
    return {"message": "if somebody has this address, a mail is on its way"}


@auth.get("/me")
async def me(caller: Caller, own: Me, session: Own) -> dict[str, Any]:
    """Tell who the caller is."""
    profile = await session.get(Profile, own)
    return {
        "id": str(own),
        "email": caller.claims.get("email"),
        "role": caller.role,
        "name": None if profile is None else profile.name,
    }


class ProfileOut(BaseModel):
    """A person, as others see them."""

    model_config = ConfigDict(from_attributes=True)

    id: UUID
    name: str
    created_at: datetime


class ProfileIn(BaseModel):
    """What a person says of themselves."""

    name: Name


@users.post("", status_code=201, response_model=ProfileOut)
async def create(given: ProfileIn, me: Me, session: Own) -> Profile:
    """Make the caller's profile."""
    profile = Profile(id=me, name=given.name)
    session.add(profile)
    await session.flush()
    await session.refresh(profile)
    return profile


@users.get("", response_model=list[ProfileOut])
async def find(
    session: Own,
    name: Annotated[str, Query(max_length=80)] = "",
    after: UUID | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Sequence[Profile]:
    """List people, by a part of the name; `after` is the last id of the page before."""
    wanted = select(Profile).order_by(Profile.id).limit(limit)
    if name:
        wanted = wanted.where(Profile.name.icontains(name, autoescape=True))
    if after is not None:
        wanted = wanted.where(Profile.id > after)
    return (await session.scalars(wanted)).all()


@users.get("/{user}", response_model=ProfileOut)
async def read(user: UUID, session: Own) -> Profile:
    """Show one."""
    profile = await session.get(Profile, user)
    if profile is None:
        raise HTTPException(404, "nobody has this id")
    return profile


@users.patch("/me", response_model=ProfileOut)
async def change(given: ProfileIn, me: Me, session: Own) -> Profile:
    """Change the caller's name."""
    own = update(Profile).where(Profile.id == me).values(name=given.name).returning(Profile)
    profile = (await session.scalars(own)).one_or_none()
    if profile is None:
        raise HTTPException(404, "make your profile first")
    return profile


@users.delete("/me", status_code=204)
async def leave(me: Me, session: Own, client: ServiceClient) -> Response:
    """Delete the caller: profile and posts, and last the user in Auth."""
    await session.execute(delete(Profile).where(Profile.id == me))
    await client.auth.admin.delete_user(str(me))
    return Response(status_code=204)
