"""Calls to peers: whatever ends one is raised as a BatonError."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeVar, cast

import grpc

from baton.wire.errors import Metadata, error_from_rpc, rpc_errors

_EOF = cast("Any", grpc.aio).EOF
AnswerT = TypeVar("AnswerT")


class CallTerms(NamedTuple):
    """What goes with one call, besides its request."""

    timeout_s: float | None
    """None sets no limit."""
    metadata: Metadata


async def ask(
    method: Callable[..., Awaitable[AnswerT]], request: object, timeout_s: float
) -> AnswerT:
    """Makes a unary call.

    Raises:
        BatonError: the call failed.
    """
    with rpc_errors():
        return await method(request, timeout=timeout_s)


async def read(call: Any) -> Any:
    """The next message of a stream, None at its end.

    Raises:
        BatonError: the call failed.
    """
    with rpc_errors():
        message = await call.read()
    return None if message is _EOF else message


async def write(call: Any, message: object) -> None:
    """Sends one message of a stream.

    Raises:
        BatonError: the call failed, or the peer ended it.
    """
    with rpc_errors():
        try:
            await call.write(message)
        except asyncio.InvalidStateError:
            # Where a peer ends a call between two writes, gRPC says no more than that it is over.
            if call.done() and await call.code() is not grpc.StatusCode.OK:
                raise await _failure(call) from None
            raise


async def _failure(call: Any) -> Exception:
    error = grpc.aio.AioRpcError(
        await call.code(),
        await call.initial_metadata(),
        await call.trailing_metadata(),
        await call.details(),
        None,
    )
    return error_from_rpc(error)
