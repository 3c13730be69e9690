"""Every failure as JSON: what kind, and what to do about it. Never a stack trace, a statement or a value."""

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from worker.database import DATABASE_ERRORS, explain, is_away, sqlstate_of

log = structlog.get_logger(__name__)

_KINDS = {
    400: "bad_request",
    401: "not_signed_in",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    409: "conflict",
    413: "too_large",
    422: "invalid",
    429: "too_many_requests",
    503: "unavailable",
}
_OF_DATABASE = {
    "42501": (403, "the policies of the database do not allow this"),
    "23505": (409, "there is one already"),
    "23503": (409, "something that this belongs to is not there; make your profile first"),
    "23514": (422, "a value is outside its limits"),
    "22001": (422, "a value is too long"),
}


def problem(status: int, message: str, *, kind: str | None = None, **more: object) -> JSONResponse:
    """Make the answer of a failure."""
    told = {"code": kind or _KINDS.get(status, "error"), "message": message} | more
    return JSONResponse({"error": told}, status)


async def _http(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for these alone
    answer = problem(error.status_code, str(error.detail))
    answer.headers.update(error.headers or {})
    return answer


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for these alone
    # Without the input: it may be a password.
    fields = [{"where": ".".join(map(str, one["loc"])), "message": one["msg"]} for one in error.errors()]
    return problem(422, "the request is not as it has to be", fields=fields)


async def _database(request: Request, error: Exception) -> JSONResponse:
    known = _OF_DATABASE.get(sqlstate_of(error) or "")
    if known is not None:
        return problem(*known)
    if is_away(error):
        log.warning("the database is away", reason=explain(error))
        return problem(503, "the database cannot be reached just now: try again")
    return await _unexpected(request, error)


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    log.error(
        "request failed", method=request.method, path=request.url.path, error_class=type(error).__name__
    )
    return problem(500, "this failed, and we have been told", kind="internal")


def install(app: FastAPI) -> None:
    """Have an application answer so."""
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    for kind in DATABASE_ERRORS:
        app.add_exception_handler(kind, _database)
    app.add_exception_handler(Exception, _unexpected)
