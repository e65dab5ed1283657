"""What processes say about themselves: for when there is no scheduler to ask."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import grpc

from baton.client.messages import status_from
from baton.core.cluster import ServiceState, ServiceStatus
from baton.v1 import control_pb2, control_pb2_grpc, inference_pb2

_MAX_CONCURRENT_CALLS = 16


def ask_status(address: str, timeout_s: float) -> ServiceStatus | None:
    """A process's own status; None when it does not answer."""
    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        stub = control_pb2_grpc.ControlServiceStub(channel)
        try:
            answer = stub.GetStatus(control_pb2.GetStatusRequest(), timeout=timeout_s)
        except grpc.RpcError:
            return None
    as_cluster = inference_pb2.GetClusterStatusResponse(services=[answer.status])
    return status_from(as_cluster).services[0]


def ask_all(addresses: Iterable[tuple[str, str]], timeout_s: float) -> list[ServiceStatus]:
    """The status of each (role, address), at once; "lost" for those that do not answer."""
    pairs = list(addresses)
    with ThreadPoolExecutor(_MAX_CONCURRENT_CALLS) as pool:
        answers = pool.map(lambda pair: ask_status(pair[1], timeout_s), pairs)
        return [
            answer
            or ServiceStatus(worker_id="", role=role, address=address, state=ServiceState.LOST)
            for (role, address), answer in zip(pairs, answers, strict=True)
        ]
