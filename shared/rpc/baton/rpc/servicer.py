"""ControlService: what every process answers about itself."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import grpc

from baton.core.cluster import Announcement
from baton.v1 import control_pb2, control_pb2_grpc
from baton.wire.cluster import rates_to_pb, status_to_pb
from baton.wire.timing import duration_from_pb

logger = logging.getLogger(__name__)

NAME = "baton.v1.ControlService"
_Context = grpc.aio.ServicerContext[Any, Any]


class ControlServicer(control_pb2_grpc.ControlServiceServicer):
    """Answers from functions of the process that it belongs to."""

    def __init__(
        self,
        describe: Callable[[], Announcement],
        kv_snapshot: Callable[[], tuple[int, list[bytes]]],
        request_stop: Callable[[float | None], None],
    ) -> None:
        self._describe = describe
        self._kv_snapshot = kv_snapshot
        self._request_stop = request_stop

    def register(self, server: grpc.aio.Server) -> str:
        """Adds the handlers; returns the service's name."""
        control_pb2_grpc.add_ControlServiceServicer_to_server(self, server)
        return NAME

    async def GetStatus(
        self, request: control_pb2.GetStatusRequest, context: _Context
    ) -> control_pb2.GetStatusResponse:
        """State and load."""
        announcement = self._describe()
        response = control_pb2.GetStatusResponse(
            status=status_to_pb(announcement.status),
            rates=rates_to_pb(announcement.rates),
        )
        response.now.GetCurrentTime()
        return response

    async def Drain(
        self, request: control_pb2.DrainRequest, context: _Context
    ) -> control_pb2.DrainResponse:
        """Begins to drain."""
        grace_s = None
        if request.HasField("grace"):
            grace_s = duration_from_pb(request.grace, "grace")
        num_running = self._describe().status.num_requests_running
        logger.info("drain requested", extra={"peer": context.peer(), "grace_s": grace_s})
        self._request_stop(grace_s)
        return control_pb2.DrainResponse(num_requests_running=num_running)

    async def GetKvSnapshot(
        self, request: control_pb2.GetKvSnapshotRequest, context: _Context
    ) -> control_pb2.GetKvSnapshotResponse:
        """All blocks in the prefix cache."""
        sequence, block_hashes = self._kv_snapshot()
        return control_pb2.GetKvSnapshotResponse(
            worker_id=self._describe().status.worker_id,
            sequence=sequence,
            block_hashes=block_hashes,
        )
