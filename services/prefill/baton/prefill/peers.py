"""Calls that a prefill worker makes: pushes to decode workers."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, dataclass
from typing import Any, cast

import grpc

from baton.core.errors import BatonError, ErrorReason, KvTransferLost, error_for
from baton.core.handoff.frames import Chunk, Committed, Credit, Manifest, Opening, SlotOffer
from baton.prefill.staging import StagedSlots
from baton.prefill.transports import Transports
from baton.rpc.shared_memory import SenderSlots
from baton.v1 import kv_transfer_pb2
from baton.wire.channel import ChannelPool
from baton.wire.errors import error_from_rpc, reason_from_pb, rpc_errors
from baton.wire.frames import encode_frame
from baton.wire.layout import fingerprint_to_pb
from baton.wire.sampling import logprob_to_pb

_NOTHING = memoryview(b"")
_MAX_FRAME_BYTES = 1 << 20
"""Larger messages are slower over gRPC, and hold up what shares their connection."""
_PUSH = "/baton.v1.KvTransferService/Push"
_PROBE = "/baton.v1.KvTransferService/Probe"
_PROBE_CHUNK_BYTES = 1 << 20
_PROBE_TIMEOUT_S = 20.0
_EOF = cast("Any", grpc.aio).EOF
_SAYS_WHY = frozenset({
    ErrorReason.STALE_EPOCH,
    ErrorReason.KV_LAYOUT_MISMATCH,
    ErrorReason.KV_CHECKSUM,
    ErrorReason.KV_TRANSFER_LOST,
    ErrorReason.STALLED,
    ErrorReason.DEADLINE,
})
"""Reasons that a receiver gives itself; all others mean that it is not reachable."""
_MAY_BE_TRANSPORT = frozenset({ErrorReason.KV_CHECKSUM, ErrorReason.KV_TRANSFER_LOST})
"""Failures of a push that another transport may not have."""


@dataclass(frozen=True, slots=True)
class Path:
    """What the way to a decode worker is like."""

    num_bytes: int
    """Bytes that arrived."""
    transfer_s: float
    round_trip_s: float


async def measure_path(channels: ChannelPool, address: str, num_bytes: int) -> Path:
    """Sends bytes that go nowhere, over the connection that pushes use.

    Raises:
        BatonError: the worker cannot be reached.
    """
    await _probe(channels, address, 0)  # connects
    _, round_trip_s = await _probe(channels, address, 0)
    num_arrived, transfer_s = await _probe(channels, address, num_bytes)
    return Path(num_arrived, transfer_s, round_trip_s)


async def _probe(channels: ChannelPool, address: str, num_bytes: int) -> tuple[int, float]:
    """Bytes that arrived, and the time from the first write to the answer."""
    start: Any = channels.get(address, is_bulk=True).stream_unary(
        _PROBE,
        request_serializer=None,
        response_deserializer=kv_transfer_pb2.ProbeResponse.FromString,
    )
    call = start(timeout=_PROBE_TIMEOUT_S)
    began_at_s = time.monotonic()
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
    return int(answer.num_bytes), time.monotonic() - began_at_s


class PushCall:
    """One push to a decode worker. `cancel` it when leaving early."""

    def __init__(
        self,
        channels: ChannelPool,
        address: str,
        *,
        timeout_s: float,
        transports: Transports | None = None,
    ) -> None:
        """Without `transports` the bytes of chunks come in the frames."""
        start: Any = channels.get(address, is_bulk=True).stream_stream(
            _PUSH,
            request_serializer=None,
            response_deserializer=kv_transfer_pb2.PushResponse.FromString,
        )
        self._address = address
        self._call: Any = start(timeout=timeout_s)
        self._transports = transports or Transports.none()
        self._wanted: list[str] = []
        self._staged: StagedSlots | None = None
        self._slots: SenderSlots | StagedSlots | None = None
        self._buffer = bytearray()
        """Of the chunk being sent; its frame is a copy."""
        self._is_committed = False

    @property
    def transport(self) -> str:
        """Name of what carries the bytes of chunks."""
        return self._slots.name if self._slots is not None else "grpc"

    @property
    def max_chunk_bytes(self) -> int:
        """Most bytes that a chunk should have; known once there is credit."""
        return self._slots.slot_bytes if self._slots is not None else _MAX_FRAME_BYTES

    async def open(self, opening: Opening) -> None:
        """Sends the first frame."""
        staged = None
        self._wanted = self._transports.wanted(self._address)
        if "nixl" in self._wanted and (lease := self._transports.stage()) is not None:
            self._staged = lease
            staged = kv_transfer_pb2.StagedMemory(**asdict(self._staged.staged))
        await self._write(
            kv_transfer_pb2.PushHeader(
                epoch=opening.epoch,
                open=kv_transfer_pb2.PushOpen(
                    reservation_id=opening.reservation_id,
                    request_id=opening.request_id,
                    attempt=opening.attempt,
                    fingerprint=fingerprint_to_pb(opening.fingerprint),
                    worker_id=opening.worker_id,
                    transports=self._wanted,
                    staged=staged,
                    encoding=kv_transfer_pb2.KvEncoding.Name(opening.encoding.value),
                ),
            )
        )

    def room(self, sequence: int, num_bytes: int) -> memoryview:
        """Memory to put a chunk into before it is sent; there must be credit for it."""
        if self._slots is not None and num_bytes <= self._slots.slot_bytes:
            return self._slots.slot(sequence, num_bytes)
        if len(self._buffer) < num_bytes:
            self._buffer = bytearray(num_bytes)
        return memoryview(self._buffer)[:num_bytes]

    async def chunk(self, chunk: Chunk, payload: memoryview) -> None:
        """Sends a chunk, which lies in its room."""
        span = chunk.span
        is_in_slot = self._slots is not None and payload.nbytes <= self._slots.slot_bytes
        header = kv_transfer_pb2.PushHeader(
            epoch=chunk.epoch,
            chunk=kv_transfer_pb2.PushChunk(
                sequence=chunk.sequence,
                layer_start=span.layer_start,
                layer_end=span.layer_end,
                block_start=span.block_start,
                num_blocks=span.num_blocks,
                checksum=chunk.checksum,
                slot_bytes=payload.nbytes if is_in_slot else 0,
            ),
        )
        await self._write(header, _NOTHING if is_in_slot else payload)

    async def sign_of_life(self, epoch: int) -> None:
        """Tells the receiver that there will be more."""
        await self._write(kv_transfer_pb2.PushHeader(epoch=epoch))

    async def manifest(self, manifest: Manifest) -> None:
        """Sends the last frame."""
        logprob = manifest.first_logprob
        header = kv_transfer_pb2.PushHeader(
            epoch=manifest.epoch,
            manifest=kv_transfer_pb2.PushManifest(
                num_chunks=manifest.num_chunks,
                num_bytes=manifest.num_bytes,
                block_start=manifest.block_start,
                num_blocks=manifest.num_blocks,
                num_tokens=manifest.num_tokens,
                tokens_hash=manifest.tokens_hash,
                checksum=manifest.checksum,
                first_token_id=manifest.first_token_id,
                first_token_logprob=logprob_to_pb(logprob) if logprob else None,
            ),
        )
        await self._write(header)

    async def end(self) -> None:
        """Sends nothing more."""
        await self._call.done_writing()

    async def read(self) -> Credit | Committed:
        """The receiver's next answer.

        Raises:
            BatonError: what the receiver says, or KvTransferLost.
        """
        answer = await self._read()
        if answer.HasField("offer"):
            self._take(answer.offer)
            answer = await self._read()
        elif answer.HasField("credit"):
            self._is_chosen("grpc")
        if answer.HasField("failed"):
            reason = reason_from_pb(answer.failed.reason)
            failure = error_for(reason, answer.failed.message)
            if self._slots is not None and reason in _MAY_BE_TRANSPORT:
                self._transports.failed(self._address, self.transport, "transfer", failure)
            raise self._as_sender(failure)
        if answer.HasField("committed"):
            self._is_committed = True
            return Committed(answer.committed.num_bytes, answer.committed.num_chunks)
        return Credit(answer.credit.num_chunks)

    def cancel(self) -> None:
        """Ends the call at once; harmless when it is over."""
        self._call.cancel()
        if isinstance(self._slots, SenderSlots) and self._is_committed:
            self._transports.keep(self._slots)
        if self._staged is not None:
            self._staged.close()
        self._slots = self._staged = None

    async def _read(self) -> kv_transfer_pb2.PushResponse:
        try:
            answer = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise self._failure(error) from error
        if answer is _EOF:
            raise KvTransferLost(f"the decode worker at {self._address} ended the push")
        return cast("kv_transfer_pb2.PushResponse", answer)

    def _take(self, offer: kv_transfer_pb2.PushOffer) -> None:
        if offer.HasField("staged"):
            self._is_chosen("nixl")
            self._slots = self._staged
        elif offer.num_slots and offer.slot_bytes:
            self._is_chosen("shm")
            memory = offer.shared_memory
            self._slots = self._transports.open(
                self._address,
                SlotOffer(offer.num_slots, offer.slot_bytes, offer.token, memory.pid, memory.fd),
            )

    def _is_chosen(self, name: str) -> None:
        wanted, self._wanted = self._wanted, []
        if wanted and wanted[0] != name:
            self._transports.declined(wanted[0])

    async def _write(
        self, header: kv_transfer_pb2.PushHeader, payload: memoryview = _NOTHING
    ) -> None:
        try:
            await self._call.write(encode_frame(header.SerializeToString(), payload))
        except grpc.aio.AioRpcError as error:
            raise self._failure(error) from error
        except asyncio.InvalidStateError as error:
            raise KvTransferLost(f"the decode worker at {self._address} ended the push") from error

    def _failure(self, error: grpc.aio.AioRpcError) -> BatonError:
        return self._as_sender(error_from_rpc(error))

    def _as_sender(self, failure: BatonError) -> BatonError:
        """What a failed push means to whoever asked this worker for it.

        That the receiver does not know the reservation does not make the request unknown here.
        """
        if failure.reason in _SAYS_WHY:
            return failure
        return KvTransferLost(f"push to {self._address}: {failure.message}")
