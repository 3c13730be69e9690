"""The tables of schema.sql as models: for the API and for the handler."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import DateTime, ForeignKey, Identity, func
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """All tables."""

    type_annotation_map = {datetime: DateTime(timezone=True)}  # noqa: RUF012 - as SQLAlchemy wants it


class Profile(Base):
    """A person, by the id that Auth has given."""

    __tablename__ = "profiles"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Post(Base):
    """What a person has written."""

    __tablename__ = "posts"

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    author_id: Mapped[UUID] = mapped_column(ForeignKey("profiles.id"))
    title: Mapped[str]
    body: Mapped[str] = mapped_column(default="")
    published: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now(), onupdate=func.now())


class File(Base):
    """A file in Storage."""

    __tablename__ = "files"

    id: Mapped[UUID] = mapped_column(primary_key=True, server_default=func.gen_random_uuid())
    owner_id: Mapped[UUID] = mapped_column(ForeignKey("profiles.id"))
    name: Mapped[str]
    content_type: Mapped[str]
    size: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())

    @property
    def path(self) -> str:
        """Where its content is, within the bucket."""
        return f"{self.owner_id}/{self.id}"


class AuthorStats(Base):
    """What the worker keeps of each author."""

    __tablename__ = "derived_author_stats"

    author_id: Mapped[UUID] = mapped_column(primary_key=True)
    posts: Mapped[int]
    published: Mapped[int]
    words: Mapped[int]
    latest_at: Mapped[datetime | None]
