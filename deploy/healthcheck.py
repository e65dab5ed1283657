"""Exit status 0 when the service in this container says that it is serving (grpc.health.v1)."""

from __future__ import annotations

import os
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def main() -> int:
    """Asks the service on this host, at its health port if it has one: that one never needs TLS."""
    own = f"BATON_{os.environ.get('SERVICE', '').upper()}"
    names = (f"{own}_HEALTH_PORT", "BATON_HEALTH_PORT", f"{own}_PORT", "BATON_PORT")
    ports = (os.environ.get(name, "") for name in names)
    port = next((port for port in ports if port not in {"", "0"}), "7000")
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
