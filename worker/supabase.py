"""The service-role client that handlers may ask for: made once a process, when first asked for."""

from supabase import AsyncClient
from supabase.lib.client_options import AsyncClientOptions

from config.settings import Settings


class SupabaseClients:
    """Makes the client, and closes it with the process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._client: AsyncClient | None = None

    def get(self) -> AsyncClient:
        """Give the client."""
        if self._client is None:
            options = AsyncClientOptions(auto_refresh_token=False, persist_session=False)
            key = self._settings.service_role_key.get_secret_value()
            self._client = AsyncClient(self._settings.supabase_url, key, options)
        return self._client

    async def close(self) -> None:
        """Close what the client has opened."""
        if self._client is not None:
            await self._client.auth.close()
            self._client = None
