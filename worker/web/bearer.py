"""The identity behind a request, from its `Authorization` header, as a dependency of Starlette or FastAPI.

It translates what `worker.tokens` says into HTTP; what tokens are trusted, and why, is decided there.
"""

from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.requests import Request

from worker.errors import KeysUnavailable, TokenRefused
from worker.tokens import Identity, Tokens

_RETRY_SECONDS = "10"


class Bearer:
    """Gives the identity of a request, or answers 401, 403 or 503 in its place.

    In FastAPI it is `Depends(Bearer(tokens))`, in Starlette `await bearer(request)`.
    """

    def __init__(self, tokens: Tokens, *, allow: Callable[[Identity], bool] | None = None) -> None:
        """Make it.

        Args:
            tokens: of the project.
            allow: tells whether somebody may do this at all; default is that every good token may.
        """
        self._tokens = tokens
        self._allow = allow

    async def __call__(self, request: Request) -> Identity:
        """Tell whose request it is.

        Raises:
            HTTPException: 401 without a good token, 403 without the right, 503 while nobody can tell.
        """
        # A second header of the name could be read by one server and not by the next.
        headers = request.headers.getlist("authorization")
        scheme, _, token = headers[0].partition(" ") if len(headers) == 1 else ("", "", "")
        if scheme.lower() != "bearer" or not token.strip():
            raise HTTPException(
                401, "send one header Authorization: Bearer with a token", {"WWW-Authenticate": "Bearer"}
            )
        try:
            identity = await self._tokens.verify(token.strip())
        except TokenRefused as refusal:
            demand = {
                "WWW-Authenticate": f'Bearer error="invalid_token", error_description="{refusal.reason}"'
            }
            raise HTTPException(401, str(refusal), demand) from None
        except KeysUnavailable as error:
            raise HTTPException(503, str(error), {"Retry-After": _RETRY_SECONDS}) from None
        if self._allow is not None and not self._allow(identity):
            raise HTTPException(403, "this token has not the right to do this")
        return identity
