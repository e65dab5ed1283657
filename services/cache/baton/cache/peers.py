"""Calls to workers."""

from __future__ import annotations

from dataclasses import dataclass

from baton.rpc.channel import ChannelPool
from baton.rpc.convert import hashes_from_pb
from baton.rpc.errors import rpc_errors
from baton.v1 import control_pb2, control_pb2_grpc


@dataclass(frozen=True, slots=True)
class KvSnapshot:
    """All blocks of a worker's prefix cache, right after KV event `sequence`."""

    worker_id: str
    sequence: int
    hashes: tuple[bytes, ...]


class Workers:
    """Workers by address."""

    def __init__(self, channels: ChannelPool, timeout_s: float) -> None:
        self._channels = channels
        self._timeout_s = timeout_s

    async def kv_snapshot(self, address: str) -> KvSnapshot:
        """The blocks that a worker holds.

        Raises:
            BatonError: the worker could not be asked.
        """
        stub = control_pb2_grpc.ControlServiceStub(self._channels.get(address))
        with rpc_errors():
            answer = await stub.GetKvSnapshot(
                control_pb2.GetKvSnapshotRequest(), timeout=self._timeout_s
            )
        hashes = hashes_from_pb("block_hashes", answer.block_hashes)
        return KvSnapshot(answer.worker_id, answer.sequence, hashes)
