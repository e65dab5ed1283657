"""Exit status 0 when the service in this container says that it is serving (grpc.health.v1)."""

from __future__ import annotations

import os
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def main() -> int:
    """Asks the service on this host at the port that its own settings name."""
    own = f"BATON_{os.environ.get('SERVICE', '').upper()}_PORT"
    port = os.environ.get(own) or os.environ.get("BATON_PORT", "7000")
    address = f"127.0.0.1:{port}"
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=3
            )
        except grpc.RpcError as error:
            sys.stderr.write(f"{address}: {error.code().name}\n")  # type: ignore[attr-defined]
            return 1
    serving = health_pb2.HealthCheckResponse.SERVING
    return 0 if answer.status == serving else 1


if __name__ == "__main__":
    sys.exit(main())
