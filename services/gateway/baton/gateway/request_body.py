"""Reads the body of a request, within bounds of type, size, time and depth."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from starlette.requests import Request

from baton.client import InvalidRequest
from baton.gateway.failures import HttpError


async def read_json(request: Request, max_bytes: int, timeout_s: float) -> Any:
    """The JSON value in the body.

    Raises:
        HttpError: the content type is not application/json, the body is too large, or it arrives
            too slowly.
        InvalidRequest: the body is not JSON, or nested too deeply.
    """
    # A web page of another origin can send any other type, or none, without the browser asking.
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        text = "send the body as 'Content-Type: application/json'"
        raise HttpError(415, text, "unsupported_media_type")
    data = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                data += part
                if len(data) > max_bytes:
                    text = f"the body is larger than {max_bytes} bytes"
                    raise HttpError(413, text, "request_too_large")
    except TimeoutError as error:
        raise HttpError(408, "the body did not arrive in time", "request_timeout") from error
    try:
        body = orjson.loads(data)
        orjson.dumps(body)  # refuses nesting deeper than the code behind can walk
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error.msg}") from error
    except orjson.JSONEncodeError as error:
        raise InvalidRequest("the body is nested too deeply") from error
    return body
