"""What this API needs to know besides the worker's own settings, which it shares."""

from typing import Annotated, Self

from pydantic import AliasChoices, Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

ANON_KEY = AliasChoices("SUPABASE_ANON_KEY", "SUPABASE_PUBLISHABLE_KEY")


class ApiSettings(BaseSettings):
    """Read from the environment and `.env`, like the worker's."""

    model_config = SettingsConfigDict(env_file=".env", extra="ignore", frozen=True)

    anon_key: SecretStr = Field(validation_alias=ANON_KEY)
    """What browsers have, too: people sign in with it."""
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field((), validation_alias="API_CORS_ORIGINS")
    """Addresses of pages that may call this API, separated by commas; none by default, and never `*`."""
    bucket: str = Field("files", validation_alias="API_BUCKET")
    """A private bucket of Storage."""
    most_bytes: int = Field(10 * 1024 * 1024, validation_alias="API_MAX_FILE_BYTES", gt=0)
    """Of one file."""
    reset_url: str | None = Field(None, validation_alias="API_RESET_URL")
    """The page to which the mail for a new password leads."""

    @classmethod
    def load(cls) -> Self:
        """Read them.

        Raises:
            pydantic.ValidationError: one is missing, or makes no sense.
        """
        return cls()  # type: ignore[call-arg] # pydantic-settings takes them from the environment

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(one.strip() for one in value.split(",") if one.strip())
        return value

    @field_validator("cors_origins")
    @classmethod
    def _named(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "*" in value:
            raise ValueError("name the origins: with * every page in the world may call this API")
        return value
