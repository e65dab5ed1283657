"""deploy/healthcheck.py: what a container's health check says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tests.support.repository import ROOT

Status = health_pb2.HealthCheckResponse


@dataclass(frozen=True, slots=True)
class Served:
    """A health service and its port."""

    servicer: health.HealthServicer
    port: int


@pytest.fixture
def served() -> Iterator[Served]:
    servicer = health.HealthServicer()
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield Served(servicer, port)
        server.stop(0).wait()


def _check(port: int, **variables: str) -> int:
    result = subprocess.run(
        [sys.executable, ROOT / "deploy" / "healthcheck.py"],
        env={**os.environ, "BATON_PORT": str(port), **variables},
        capture_output=True,
        timeout=30,
        check=False,
    )
    return result.returncode


def test_healthy_while_serving_and_not_while_draining(served: Served) -> None:
    served.servicer.set("", Status.SERVING)
    assert _check(served.port) == 0
    served.servicer.set("", Status.NOT_SERVING)
    assert _check(served.port) == 1


def test_asks_at_the_port_that_only_this_service_was_given(served: Served) -> None:
    served.servicer.set("", Status.SERVING)
    assert _check(1, SERVICE="decode", BATON_DECODE_PORT=str(served.port)) == 0


def test_asks_at_the_health_port_where_there_is_one(served: Served) -> None:
    served.servicer.set("", Status.SERVING)
    assert _check(1, BATON_HEALTH_PORT=str(served.port)) == 0
    assert _check(1, SERVICE="decode", BATON_DECODE_HEALTH_PORT=str(served.port)) == 0
    assert _check(served.port, BATON_HEALTH_PORT="0") == 0


def test_unhealthy_when_nobody_answers(served: Served) -> None:
    assert _check(1) == 1
