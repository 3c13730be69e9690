"""Files of people: a row under row-level security says whose it is, Storage has the content.

Row and content are two systems. The row is written first and committed last, so that a failure of Storage
leaves no row; content without a row, after a crash in between, belongs to nobody and is never shown.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, HTTPException, Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict
from sqlalchemy import delete, select
from storage3.exceptions import StorageApiError

from examples.fastapi_app.services import Here, Me, Own, ServiceClient
from examples.fastapi_app.tables import File

files = APIRouter(prefix="/files", tags=["files"])


class FileOut(BaseModel):
    """A file."""

    model_config = ConfigDict(from_attributes=True)

    id: UUID
    name: str
    content_type: str
    size: int
    created_at: datetime


class Link(BaseModel):
    """Where a file can be had, for a while, by whoever has the link."""

    url: str
    expires_in: int


@files.put("/{name}", status_code=201, response_model=FileOut)
async def upload(
    name: Annotated[str, Path(max_length=200)],
    request: Request,
    me: Me,
    session: Own,
    here: Here,
    client: ServiceClient,
) -> File:
    """Keep the body of the request as a file of the caller."""
    content = await _body(request, here.api.most_bytes)
    kind = request.headers.get("content-type", "application/octet-stream")
    file = File(owner_id=me, name=name, content_type=kind, size=len(content))
    session.add(file)
    await session.flush()  # may it? The policy answers before anything is stored
    await session.refresh(file)
    try:
        await client.storage.from_(here.api.bucket).upload(file.path, content, {"content-type": kind})
    except StorageApiError:
        raise HTTPException(503, "Storage did not take the file: try again") from None
    return file


async def _body(request: Request, most: int) -> bytes:
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > most:
            raise HTTPException(413, f"a file may have {most} bytes at most")
    return bytes(content)


@files.get("", response_model=list[FileOut])
async def find(session: Own, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> Sequence[File]:
    """List the caller's files, newest first."""
    return (await session.scalars(select(File).order_by(File.created_at.desc()).limit(limit))).all()


@files.post("/{number}/link")
async def link(
    number: UUID,
    session: Own,
    here: Here,
    client: ServiceClient,
    seconds: Annotated[int, Query(ge=10, le=86_400)] = 300,
) -> Link:
    """Make a link to one of the caller's files."""
    file = await session.get(File, number)
    if file is None:
        raise HTTPException(404, "there is no such file of yours")
    made = await client.storage.from_(here.api.bucket).create_signed_url(file.path, seconds)
    if made["signedURL"] is None:
        raise HTTPException(503, "Storage made no link: try again")
    return Link(url=made["signedURL"], expires_in=seconds)


@files.delete("/{number}", status_code=204)
async def remove(number: UUID, session: Own, here: Here, client: ServiceClient) -> Response:
    """Delete one of the caller's."""
    gone = (await session.scalars(delete(File).where(File.id == number).returning(File))).one_or_none()
    if gone is None:
        raise HTTPException(404, "there is no such file of yours")
    try:
        await client.storage.from_(here.api.bucket).remove([gone.path])
    except StorageApiError:
        raise HTTPException(503, "Storage did not delete the file: try again") from None
    return Response(status_code=204)
