"""The conversation of each process about itself: status, drain, what its prefix cache holds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from google.protobuf.message import Message

from baton.core.cluster import Announcement
from baton.core.hashing import HASH_BYTES
from baton.v1 import control_pb2 as pb2
from baton.v1 import control_pb2_grpc
from baton.wire import calls
from baton.wire.announcement import rates_from_pb, rates_to_pb
from baton.wire.channel import ChannelPool
from baton.wire.cluster import status_from_pb, status_to_pb
from baton.wire.layout import hashes_from_pb
from baton.wire.timing import duration_from_pb, duration_to_pb

logger = logging.getLogger(__name__)

STATUS_TIMEOUT_S = 1.5
SNAPSHOT_TIMEOUT_S = 10.0
_NAME = "baton.v1.ControlService"
_SNAPSHOT_MARGIN_BYTES = 64 * 1024
_MAX_SNAPSHOT_BYTES = 256 * 1024 * 1024
"""14 million blocks: bounds what a peer's claim about its own size may cost."""


@dataclass(frozen=True, slots=True)
class KvSnapshot:
    """All blocks in a worker's prefix cache."""

    worker_id: str
    sequence: int
    """Of the last KV event that it includes."""
    block_hashes: tuple[bytes, ...]


class ControlCaller(Protocol):
    """Asks other processes about themselves. Methods raise BatonError when that fails."""

    async def status(self, address: str, *, lease_s: float) -> Announcement:
        """The status of the process at `address`, as a lease of `lease_s` on being a member."""

    async def kv_snapshot(self, address: str, *, num_blocks: int = 0) -> KvSnapshot:
        """A worker's prefix cache; the worker has `num_blocks` blocks in all."""

    async def drain(self, address: str, grace_s: float | None = None) -> int:
        """Makes the process drain and exit; returns the number of requests that still run."""


class RpcControl:
    """Implements ControlCaller over shared channels."""

    def __init__(self, channels: ChannelPool) -> None:
        self._channels = channels

    async def status(self, address: str, *, lease_s: float) -> Announcement:
        """See ControlCaller."""
        stub = self._stub(address)
        pb = await calls.ask(stub.GetStatus, pb2.GetStatusRequest(), STATUS_TIMEOUT_S)
        return Announcement(
            status=status_from_pb(pb.status), lease_s=lease_s, rates=rates_from_pb(pb.rates)
        )

    async def kv_snapshot(self, address: str, *, num_blocks: int = 0) -> KvSnapshot:
        """See ControlCaller."""
        # A hash has a tag and a length.
        num_bytes = min(num_blocks * (HASH_BYTES + 2) + _SNAPSHOT_MARGIN_BYTES, _MAX_SNAPSHOT_BYTES)
        if num_bytes <= self._channels.max_message_bytes:
            return await self._kv_snapshot(self._stub(address))
        # The pool's channels refuse so large a message.
        async with self._channels.open(address, max_message_bytes=num_bytes) as channel:
            return await self._kv_snapshot(control_pb2_grpc.ControlServiceStub(channel))

    async def drain(self, address: str, grace_s: float | None = None) -> int:
        """See ControlCaller."""
        request = pb2.DrainRequest(grace=None if grace_s is None else duration_to_pb(grace_s))
        pb = await calls.ask(self._stub(address).Drain, request, STATUS_TIMEOUT_S)
        return int(pb.num_requests_running)

    async def _kv_snapshot(self, stub: Any) -> KvSnapshot:
        pb = await calls.ask(stub.GetKvSnapshot, pb2.GetKvSnapshotRequest(), SNAPSHOT_TIMEOUT_S)
        hashes = hashes_from_pb("block_hashes", pb.block_hashes)
        return KvSnapshot(pb.worker_id, pb.sequence, hashes)

    def _stub(self, address: str) -> Any:
        return control_pb2_grpc.ControlServiceStub(self._channels.get(address))


class ControlServer(Protocol):
    """A process, as it answers about itself."""

    def describe(self) -> Announcement:
        """State and load now."""

    def kv_snapshot(self) -> tuple[int, Sequence[bytes]]:
        """Sequence of the last KV event, and all blocks in the prefix cache."""

    def request_stop(self, grace_s: float | None) -> None:
        """Begins to drain; None takes the process's own grace."""


def add_control(server: grpc.aio.Server, process: ControlServer) -> str:
    """Serves a process's answers; returns the service's full name."""
    control_pb2_grpc.add_ControlServiceServicer_to_server(_ControlAdapter(process), server)
    return _NAME


class _ControlAdapter(control_pb2_grpc.ControlServiceServicer):
    def __init__(self, process: ControlServer) -> None:
        self._process = process

    async def GetStatus(self, request: pb2.GetStatusRequest, _: Any) -> Message:
        announcement = self._process.describe()
        response = pb2.GetStatusResponse(
            status=status_to_pb(announcement.status),
            rates=rates_to_pb(announcement.rates),
        )
        response.now.GetCurrentTime()
        return response

    async def Drain(self, request: pb2.DrainRequest, context: Any) -> Message:
        has_grace = request.HasField("grace")
        grace_s = duration_from_pb(request.grace, "grace") if has_grace else None
        num_running = self._process.describe().status.num_requests_running
        logger.info("drain requested", extra={"peer": context.peer(), "grace_s": grace_s})
        self._process.request_stop(grace_s)
        return pb2.DrainResponse(num_requests_running=num_running)

    async def GetKvSnapshot(
        self, request: pb2.GetKvSnapshotRequest, _: Any
    ) -> pb2.GetKvSnapshotResponse:
        sequence, block_hashes = self._process.kv_snapshot()
        return pb2.GetKvSnapshotResponse(
            worker_id=self._process.describe().status.worker_id,
            sequence=sequence,
            block_hashes=block_hashes,
        )
