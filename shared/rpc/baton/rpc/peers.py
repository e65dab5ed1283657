"""Calls to other processes' ControlService, by address."""

from __future__ import annotations

from dataclasses import dataclass

from baton.core.cluster import Announcement
from baton.rpc import convert
from baton.rpc.channel import ChannelPool
from baton.rpc.errors import rpc_errors
from baton.v1 import control_pb2, control_pb2_grpc

STATUS_TIMEOUT_S = 1.5
SNAPSHOT_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class KvSnapshot:
    """All blocks in a worker's prefix cache."""

    worker_id: str
    sequence: int
    """Of the last KV event that it includes."""
    block_hashes: tuple[bytes, ...]


class ControlClient:
    """Asks other processes about themselves. All methods raise BatonError when that fails."""

    def __init__(self, channels: ChannelPool) -> None:
        self._channels = channels

    async def status(self, address: str, *, lease_s: float) -> Announcement:
        """The status of the process at `address`, as a lease of `lease_s` on being a member."""
        with rpc_errors():
            pb = await self._stub(address).GetStatus(
                control_pb2.GetStatusRequest(), timeout=STATUS_TIMEOUT_S
            )
        return Announcement(
            status=convert.status_from_pb(pb.status),
            lease_s=lease_s,
            rates=convert.rates_from_pb(pb.rates),
        )

    async def kv_snapshot(self, address: str) -> KvSnapshot:
        """What is in a worker's prefix cache: mends a gap in its KV events."""
        with rpc_errors():
            pb = await self._stub(address).GetKvSnapshot(
                control_pb2.GetKvSnapshotRequest(), timeout=SNAPSHOT_TIMEOUT_S
            )
        hashes = convert.hashes_from_pb("block_hashes", pb.block_hashes)
        return KvSnapshot(pb.worker_id, pb.sequence, hashes)

    async def drain(self, address: str, grace_s: float | None = None) -> int:
        """Has the process drain and exit; returns the number of requests that still run."""
        grace = None if grace_s is None else convert.duration_to_pb(grace_s)
        with rpc_errors():
            pb = await self._stub(address).Drain(
                control_pb2.DrainRequest(grace=grace), timeout=STATUS_TIMEOUT_S
            )
        return int(pb.num_requests_running)

    def _stub(self, address: str) -> control_pb2_grpc.ControlServiceStub:
        return control_pb2_grpc.ControlServiceStub(self._channels.get(address))
