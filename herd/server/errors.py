"""Errors as OpenAI's API says them: `{"error": {"message", "type", "param", "code"}}`."""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from herd.errors import HerdError, LibraryError
from herd.server.asks import RETRY_S, Busy, TooLong
from herd.server.library import Unknown

_log = logging.getLogger("herd.server")


class ApiError(Exception):
    """What a client is told. param: the field at fault; code: a name of the error for programs. retry_s: after which
    it may ask again, if the status is 429 or 503."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_s: int = RETRY_S
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self._retry_s = status, param, code, retry_s

    @property
    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        if self.status == 401:
            return {"WWW-Authenticate": 'Basic realm="herd", charset="UTF-8"'}
        return {"Retry-After": str(self._retry_s)} if self.status in (429, 503) else {}


def told(error: BaseException) -> ApiError:
    """What a client is told of any error."""
    match error:
        case ApiError():
            return error
        case Busy():
            return ApiError(
                503 if error.stopping else 429, str(error), code="rate_limit_exceeded", retry_s=error.retry_s
            )
        case TooLong():
            return ApiError(400, str(error), param="messages", code="context_length_exceeded")
        case Unknown():
            return ApiError(404, str(error), code="not_found")
        case HerdError() if not isinstance(error, LibraryError):
            return ApiError(400, str(error))
        case RequestValidationError():
            return _invalid(error)
        case HTTPException():
            if isinstance(error.__cause__, ApiError):  # of a body that was cut while it was parsed
                return error.__cause__
            return ApiError(error.status_code, str(error.detail))
    _log.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed at this request; its log says why")


def response(error: BaseException) -> JSONResponse:
    """The response to a request that failed."""
    said = told(error)
    headers = {**(getattr(error, "headers", None) or {}), **said.headers}
    return JSONResponse(said.body, said.status, headers)


def install(app: FastAPI) -> None:
    """Answer all errors of an app like this."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        return response(error)

    for kind in (ApiError, HerdError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, handle)


def _invalid(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    places = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    param = ".".join(places) or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unknown field: {param}. It may change what is meant, so it is not ignored.", param=param)
    more = "" if len(error.errors()) == 1 else f" (and {len(error.errors()) - 1} more)"
    return ApiError(400, f"{param or 'the body'}: {first['msg']}{more}", param=param)
