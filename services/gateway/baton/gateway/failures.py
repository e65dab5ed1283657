"""Failures as OpenAI's clients expect them."""

from __future__ import annotations

import logging
import math
from types import MappingProxyType
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from baton.core.errors import BatonError, ErrorReason, error_for
from baton.rpc.logs import log_failure
from baton.rpc.tenants import RateLimited
from baton.wire.errors import CATALOGUE, Retry, public_message

logger = logging.getLogger(__name__)
_CODES = MappingProxyType({
    ErrorReason.INVALID_REQUEST: "invalid_value",
    ErrorReason.PROMPT_TOO_LONG: "context_length_exceeded",
    ErrorReason.UNAUTHENTICATED: "invalid_api_key",
})
_TYPES = MappingProxyType({
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    429: "rate_limit_error",
    501: "invalid_request_error",
    503: "service_unavailable_error",
})
_HTTP_TEXTS = MappingProxyType({
    404: ("no such path here", "not_found"),
    405: ("the method is not allowed on this path", "method_not_allowed"),
})
DEFAULT_RETRY_AFTER_S = 1.0


class HttpError(Exception):
    """A failure specific to HTTP, such as an unknown path."""

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code


def error_body(error: BatonError) -> dict[str, Any]:
    """The error as JSON: {"error": {...}}."""
    status = CATALOGUE[error.reason].http_status
    return _body(
        public_message(error),
        _TYPES.get(status, "server_error"),
        "rate_limit_exceeded"
        if isinstance(error, RateLimited)
        else _CODES.get(error.reason, error.reason.name.lower()),
    )


def error_response(error: BatonError) -> Response:
    """The error as a response; overload says when to retry."""
    spec = CATALOGUE[error.reason]
    headers: dict[str, str] = {}
    if spec.http_status in {429, 503}:
        delay_s = DEFAULT_RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
        headers["retry-after"] = str(max(1, math.ceil(delay_s)))
        headers["retry-after-ms"] = str(max(0, round(delay_s * 1e3)))
    elif spec.retry is Retry.NEVER:
        headers["x-should-retry"] = "false"  # OpenAI's clients retry any status from 500 up
    return json_response(error_body(error), spec.http_status, headers)


def http_error_response(error: HttpError) -> Response:
    """The error as a response."""
    body = _body(error.message, _TYPES.get(error.status, "invalid_request_error"), error.code)
    return json_response(body, error.status)


def json_response(
    body: object, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """A JSON response."""
    return Response(orjson.dumps(body), status, headers, media_type="application/json")


async def respond_to_failure(request: Request, error: Exception) -> Response:
    """Starlette's exception handler, for every exception of a handler."""
    match error:
        case BatonError():
            return error_response(error)
        case HttpError():
            return http_error_response(error)
        case HTTPException(status_code=status):
            text, code = _HTTP_TEXTS.get(status, ("the request cannot be served", "http_error"))
            return http_error_response(HttpError(status, text, code))
        case ClientDisconnect():
            return Response(status_code=499)  # the client is gone; this is for the metrics
    log_failure(logger, "request failed", error, route=request.url.path)
    return error_response(error_for(ErrorReason.INTERNAL, ""))  # reveals nothing of the defect


def _body(message: str, kind: str, code: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
