"""KvTransferService: pushes of KV from prefill to decode workers, and probes of the way between.

Frames are protobuf on the wire, but this file writes and parses their outer layer itself, so that
the payload is not copied by the protobuf runtime: see `baton.wire.frames`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, Protocol, cast

import grpc

from baton.core.clock import Clock
from baton.core.errors import BatonError, InvalidRequest, KvTransferLost, Stalled
from baton.core.handoff.frames import Committed, PushAnswer, PushFrame
from baton.v1 import kv_transfer_pb2 as pb
from baton.wire.channel import ChannelPool
from baton.wire.errors import rpc_errors
from baton.wire.frames import MAX_PROBE_BYTES, decode_frame, encode_frame
from baton.wire.push_frames import (
    answer_from_pb,
    answer_to_pb,
    failure_to_pb,
    frame_from_bytes,
    frame_to_bytes,
)

SERVICE_NAME = "baton.v1.KvTransferService"
_LAST_WORD_S = 1.0
_PROBE_CHUNK_BYTES = 1 << 20
_PROBE_CALL_TIMEOUT_S = 20.0
_PROBE_TIMEOUT_S = 30.0
_EOF = cast("Any", grpc.aio).EOF


class PushServer(Protocol):
    """A decode worker's side."""

    def receive(self, frames: AsyncIterator[PushFrame]) -> AsyncGenerator[PushAnswer, None]:
        """Serves one push to its end. Closing it early ends the push."""

    def push_ended(self, num_bytes: int, error: BatonError | None) -> None:
        """Takes note of a push that ended: the bytes committed, and why it failed if it did."""


class PushCall(Protocol):
    """A prefill worker's side of one push. Every failure is a BatonError."""

    async def write(self, frame: PushFrame) -> None:
        """Sends a frame, once there is room for it.

        Raises:
            KvTransferLost: the decode worker has ended the push; `read` may know why.
        """

    async def end(self) -> None:
        """Sends no more frames."""

    async def read(self) -> PushAnswer:
        """The next answer. Raises the decode worker's reason where the push has failed."""

    def cancel(self) -> None:
        """Ends the push, in any state. Idempotent."""


class RpcPushCall:
    """A PushCall over gRPC, on the pool's bulk channel to `address`."""

    def __init__(self, channels: ChannelPool, address: str, timeout_s: float) -> None:
        start: Any = channels.get(address, is_bulk=True).stream_stream(
            f"/{SERVICE_NAME}/Push",
            request_serializer=None,
            response_deserializer=pb.PushResponse.FromString,
        )
        self._address = address
        self._call: Any = start(timeout=timeout_s)

    async def write(self, frame: PushFrame) -> None:
        """See PushCall."""
        try:
            with rpc_errors():
                await self._call.write(frame_to_bytes(frame))
        except asyncio.InvalidStateError as error:
            raise self._ended() from error

    async def end(self) -> None:
        """See PushCall."""
        await self._call.done_writing()

    async def read(self) -> PushAnswer:
        """See PushCall."""
        with rpc_errors():
            response = await self._call.read()
        if response is _EOF:
            raise self._ended()
        return answer_from_pb(response)

    def cancel(self) -> None:
        """See PushCall."""
        self._call.cancel()

    def _ended(self) -> BatonError:
        return KvTransferLost(f"the decode worker at {self._address} ended the push")


async def probe(
    channels: ChannelPool, address: str, num_bytes: int, clock: Clock
) -> tuple[int, float]:
    """Sends bytes that go nowhere, over the connection that pushes use.

    Returns:
        Bytes that arrived, and seconds from the first write to the answer.

    Raises:
        BatonError: the worker cannot be reached.
    """
    start: Any = channels.get(address, is_bulk=True).stream_unary(
        f"/{SERVICE_NAME}/Probe",
        request_serializer=None,
        response_deserializer=pb.ProbeResponse.FromString,
    )
    call = start(timeout=_PROBE_CALL_TIMEOUT_S)
    began_at_s = clock.now()
    try:
        with rpc_errors():
            for sent in range(0, max(1, num_bytes), _PROBE_CHUNK_BYTES):
                payload = bytes(min(_PROBE_CHUNK_BYTES, num_bytes - sent))
                # The payload is field 1 of its message, as a frame's header is.
                await call.write(encode_frame(payload, b""))
            await call.done_writing()
            answer = await call
    except asyncio.InvalidStateError as error:
        raise KvTransferLost(f"the decode worker at {address} ended the probe") from error
    finally:
        call.cancel()
    return int(answer.num_bytes), clock.now() - began_at_s


def add_push_server(server: grpc.aio.Server, implementation: PushServer, clock: Clock) -> str:
    """Adds the service to a gRPC server, on raw bytes; returns its full name."""
    adapter = _PushAdapter(implementation, clock)
    handlers = {
        "Push": grpc.stream_stream_rpc_method_handler(
            adapter.push,
            request_deserializer=None,
            response_serializer=pb.PushResponse.SerializeToString,
        ),
        "Probe": grpc.stream_unary_rpc_method_handler(
            adapter.probe,
            request_deserializer=None,
            response_serializer=pb.ProbeResponse.SerializeToString,
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))
    return SERVICE_NAME


class _PushAdapter:
    def __init__(self, server: PushServer, clock: Clock) -> None:
        self._server = server
        self._clock = clock

    async def push(
        self, requests: AsyncIterator[bytes], _context: Any
    ) -> AsyncGenerator[pb.PushResponse, None]:
        num_bytes, failure = 0, None
        try:
            async with (
                aclosing(frame_from_bytes(message) async for message in requests) as frames,
                aclosing(self._server.receive(frames)) as answers,
            ):
                async for answer in answers:
                    num_bytes = answer.num_bytes if isinstance(answer, Committed) else num_bytes
                    yield answer_to_pb(answer)
        except BatonError as error:
            failure = error
            yield failure_to_pb(error)
            # A sender that is writing when the status comes loses it: let it cancel first.
            await self._clock.sleep(_LAST_WORD_S)
            raise
        finally:
            self._server.push_ended(num_bytes, failure)

    async def probe(self, requests: AsyncIterator[bytes], _context: Any) -> pb.ProbeResponse:
        num_bytes = 0
        try:
            async with self._clock.timeout(_PROBE_TIMEOUT_S):
                async for message in requests:
                    payload, _ = decode_frame(message)  # field 1, like a frame's header
                    num_bytes += payload.nbytes
                    if num_bytes > MAX_PROBE_BYTES:
                        raise InvalidRequest(f"a probe has at most {MAX_PROBE_BYTES} bytes")
        except TimeoutError:
            raise Stalled(f"the probe took longer than {_PROBE_TIMEOUT_S:g} s") from None
        return pb.ProbeResponse(num_bytes=num_bytes)
