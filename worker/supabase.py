"""The service-role client that handlers may ask for: made once a process, when first asked for.

What it can do is the library's business. Decided here is how it behaves over a network, in a process that
many handlers share: patient where that is safe, silent about its key, and nobody's but the service's.
"""

import asyncio
import email.utils
import random
import time
from typing import Any, Final

import httpx
import structlog
from supabase import AsyncClient
from supabase.lib.client_options import AsyncClientOptions

from config.settings import Settings

log = structlog.get_logger(__name__)

_ATTEMPTS: Final = 4
_FIRST_SECONDS: Final = 0.5
_MOST_SECONDS: Final = 8.0
_TIMEOUT: Final = httpx.Timeout(20.0, connect=5.0, pool=10.0)
_CONNECTIONS: Final = httpx.Limits(max_connections=50, max_keepalive_connections=10)
_REPLAYED_BYTES: Final = 8 * 1024 * 1024
"""Larger bodies are sent once: to keep one for another try would hold it in memory."""

_REFUSED: Final = frozenset({429})
"""The request was not looked at: whatever it is, it may be sent again."""
_TROUBLE: Final = frozenset({500, 502, 503, 504, 520, 522, 524})
_NOT_SENT: Final = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_REPEATABLE: Final = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})
# Of Storage these only read, although they are POST.
_READING: Final = ("/storage/v1/object/list/", "/storage/v1/object/list-v2/", "/storage/v1/object/sign/")


class SupabaseClients:
    """Makes the client, and closes it with the process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._client: AsyncClient | None = None
        self._http: httpx.AsyncClient | None = None

    def get(self) -> AsyncClient:
        """Give the client."""
        if self._client is None:
            # No redirects: the key is in a header that httpx would send along to wherever one leads.
            self._http = httpx.AsyncClient(
                timeout=_TIMEOUT, transport=PatientTransport(httpx.AsyncHTTPTransport(limits=_CONNECTIONS))
            )
            options = AsyncClientOptions(
                auto_refresh_token=False,
                persist_session=False,
                postgrest_client_retry=False,  # its own retries would multiply ours
                httpx_client=self._http,
            )
            key = self._settings.service_role_key.get_secret_value()
            self._client = _ServiceClient(self._settings.supabase_url, key, options)
        return self._client

    async def close(self) -> None:
        """Close what the client has opened."""
        if self._http is not None:
            await self._http.aclose()
            self._client = self._http = None


class _ServiceClient(AsyncClient):
    """Stays the service's: the library would take on the identity of whoever signs in through it."""

    def _listen_to_auth_events(self, event: Any, session: Any) -> None:  # noqa: ANN401 - as the library has it
        pass


class PatientTransport(httpx.AsyncBaseTransport):
    """Sends a request again where that can do no harm, with growing waits, and at most so often.

    A request that may have been carried out is sent again only if doing so twice is the same as once: another
    POST could make another user. Those failures are the handler's, and its change is tried again.
    """

    def __init__(
        self,
        inner: httpx.AsyncBaseTransport,
        *,
        attempts: int = _ATTEMPTS,
        first_seconds: float = _FIRST_SECONDS,
        most_seconds: float = _MOST_SECONDS,
    ) -> None:
        """Make it.

        Args:
            inner: what sends a request once.
            attempts: at most, the first included.
            first_seconds: longest first wait; each next may be twice as long (full jitter).
            most_seconds: longest wait, also if the server asks for a longer one.
        """
        self._inner = inner
        self._attempts = attempts
        self._first = first_seconds
        self._most = most_seconds

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request until it is answered for good."""
        attempts = self._attempts if await _replayable(request) else 1
        for attempt in range(1, attempts):
            try:
                answer = await self._inner.handle_async_request(request)
            except httpx.TransportError as error:
                if not (isinstance(error, _NOT_SENT) or _repeatable(request)):
                    raise
                wait, why = self._backoff(attempt), type(error).__name__
            else:
                if not _again(request, answer.status_code):
                    return answer
                wait, why = self._asked(answer, attempt), str(answer.status_code)
                await answer.aclose()
            # The path may name a person's file.
            log.info(
                "Supabase did not answer: asking again",
                method=request.method,
                cause=why,
                seconds=round(wait, 2),
            )
            await asyncio.sleep(wait)
        return await self._inner.handle_async_request(request)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._inner.aclose()

    def _backoff(self, attempt: int) -> float:
        most = min(self._first * 2 ** (attempt - 1), self._most)
        return random.uniform(0, most)  # noqa: S311 - jitter, not a secret

    def _asked(self, answer: httpx.Response, attempt: int) -> float:
        """Give the wait that the server asks for, if it does."""
        asked = answer.headers.get("retry-after", "")
        if asked.isdecimal():
            return min(float(asked), self._most)
        moment = email.utils.parsedate_tz(asked) if asked else None
        if moment is not None:
            return min(max(email.utils.mktime_tz(moment) - time.time(), 0.0), self._most)
        return self._backoff(attempt)


async def _replayable(request: httpx.Request) -> bool:
    length = request.headers.get("content-length", "")
    if "transfer-encoding" in request.headers or (length.isdecimal() and int(length) > _REPLAYED_BYTES):
        return False
    await request.aread()
    return True


def _again(request: httpx.Request, status: int) -> bool:
    return status in _REFUSED or (status in _TROUBLE and _repeatable(request))


def _repeatable(request: httpx.Request) -> bool:
    if request.method in _REPEATABLE:
        return True
    # What may replace an object may replace it with itself.
    upsert = request.headers.get("x-upsert") == "true"
    return request.method == "POST" and (upsert or any(path in request.url.path for path in _READING))
