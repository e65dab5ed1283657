"""A service's whole process: loading, ready, drained by signals, out with an honest status."""

from __future__ import annotations

import asyncio
import os
import signal
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from baton.core.cluster import ServiceState
from baton.core.errors import BatonError, InvalidRequest, NoWorker
from baton.wire.errors import rpc_errors
from tests.support.demo_process import Demo
from tests.support.demo_service import NAME
from tests.support.eventually import eventually

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
async def demo(tmp_path: Path) -> AsyncIterator[Demo]:
    demo = Demo(tmp_path)
    yield demo
    demo.kill()
    await demo.pool.close()


async def test_sigterm_lets_a_running_stream_end_and_exits_clean(demo: Demo) -> None:
    demo.start()
    facts = await demo.ready()
    assert facts["event"] == "ready"
    assert facts["address"] == demo.address
    assert await demo.health() == await demo.health(NAME) == SERVING
    call = demo.wait_call()
    assert await call.read() == b"started"
    demo.signal(signal.SIGTERM)
    await eventually(lambda: "draining" in demo.events())
    assert await demo.health() == await demo.health(NAME) == NOT_SERVING
    status = (await demo.control.status(demo.address, lease_s=1)).status
    assert status.state is ServiceState.DRAINING
    assert status.num_requests_running == 1
    demo.gate.touch()
    assert await call.read() == b"done"
    assert await call.code() is grpc.StatusCode.OK
    assert await demo.exit_code() == 0
    assert demo.stopped.exists()
    assert demo.events()[-1] == "stopped"


async def test_collections_do_not_walk_what_loading_left(demo: Demo) -> None:
    demo.start()
    await demo.ready()
    status = (await demo.control.status(demo.address, lease_s=1)).status
    assert status.stats["num_frozen_objects"] > 10_000


async def test_the_grace_ends_and_a_second_signal_ends_it_sooner(demo: Demo) -> None:
    demo.start("--drain-grace-s", "0.2")
    await demo.ready()
    call = demo.wait_call()
    await call.read()
    demo.signal(signal.SIGTERM)
    assert await demo.exit_code() == 0
    with pytest.raises(BatonError), rpc_errors():
        await call.read()
    assert "took too long; going on" in demo.events()


async def test_a_second_signal_stops_at_once(demo: Demo) -> None:
    demo.start("--drain-grace-s", "600")
    await demo.ready()
    call = demo.wait_call()
    await call.read()
    demo.signal(signal.SIGTERM)
    await eventually(lambda: "draining" in demo.events())

    def signal_again() -> bool:
        demo.signal(signal.SIGINT)
        return any("second signal" in event for event in demo.events())

    await eventually(signal_again, timeout_s=10, interval_s=0.2)
    assert await demo.exit_code() == 0
    call.cancel()


async def test_while_loading_it_says_so_and_refuses(demo: Demo) -> None:
    demo.start("--load-file", str(demo.loaded))
    await eventually(lambda: "loading" in demo.events(), timeout_s=20)
    status = (await demo.control.status(demo.address, lease_s=1)).status
    assert status.state is ServiceState.STARTING
    assert status.stats == {"loading_fraction": 0.25}
    assert await demo.health() == NOT_SERVING
    with pytest.raises(NoWorker, match="still loading"), rpc_errors():
        await demo.wait_call().read()
    demo.loaded.touch()
    await demo.ready()
    status = (await demo.control.status(demo.address, lease_s=1)).status
    assert (status.state, status.model) == (ServiceState.READY, "demo")
    assert status.kv_blocks == {"free": 7}
    demo.signal(signal.SIGTERM)
    assert await demo.exit_code() == 0


@pytest.mark.parametrize("is_call", [False, True])
async def test_a_signal_or_a_drain_while_loading_ends_the_loading(
    demo: Demo, is_call: bool
) -> None:
    demo.start("--load-file", str(demo.loaded))
    await eventually(lambda: "loading" in demo.events(), timeout_s=20)
    if is_call:
        await demo.control.drain(demo.address, grace_s=5.0)
    else:
        demo.signal(signal.SIGTERM)
    assert await demo.exit_code() == 0
    assert demo.stopped.exists()


async def test_a_thread_that_does_not_end_does_not_keep_the_process(demo: Demo) -> None:
    demo.start("--load-in-thread-s", "600")
    await eventually(lambda: "loading" in demo.events(), timeout_s=20)
    demo.signal(signal.SIGTERM)
    assert await demo.exit_code() == 0


async def test_a_failed_start_exits_with_status_1_and_says_why(demo: Demo) -> None:
    demo.start("--fails")
    assert await demo.exit_code() == 1
    failure = next(line for line in demo.lines() if line["event"] == "start failed")
    assert "the weights are missing" in failure["traceback"]
    assert "snapshot failed" not in demo.events()
    assert demo.stopped.exists()


async def test_a_start_that_the_user_can_mend_fails_with_one_line(demo: Demo) -> None:
    demo.start("--refuses")
    assert await demo.exit_code() == 1
    failure = next(line for line in demo.lines() if line["event"] == "cannot start")
    assert failure["error"] == "there is no such directory"
    assert "traceback" not in failure


async def test_a_taken_port_exits_with_status_1(demo: Demo) -> None:
    server = await asyncio.start_server(lambda _reader, _writer: None, "127.0.0.1", demo.port)
    async with server:
        demo.start()
        assert await demo.exit_code() == 1
    assert demo.events() == ["cannot start"]


async def test_a_taken_metrics_port_is_named(demo: Demo) -> None:
    server = await asyncio.start_server(lambda _reader, _writer: None, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        demo.start("--metrics-port", str(port))
        assert await demo.exit_code() == 1
    assert f"metrics cannot listen on 127.0.0.1:{port}" in demo.lines()[0]["error"]


async def test_drain_by_call_exits_clean(demo: Demo) -> None:
    demo.start()
    await demo.ready()
    assert await demo.control.drain(demo.address, grace_s=5.0) == 0
    assert await demo.exit_code() == 0


async def test_a_message_that_cannot_be_parsed_is_the_callers_mistake(demo: Demo) -> None:
    demo.start()
    await demo.ready()
    channel = demo.pool.get(demo.address)
    with pytest.raises(InvalidRequest, match="cannot be parsed"), rpc_errors():
        await channel.unary_unary("/baton.v1.ControlService/Drain")(b"\xff\xff\xff", timeout=5)
    assert (await demo.control.status(demo.address, lease_s=1)).status.state is ServiceState.READY
    assert "rpc failed" not in demo.events()


async def test_it_answers_about_itself(demo: Demo) -> None:
    demo.start("--cores", "0")
    facts = await demo.ready()
    snapshot = await demo.control.kv_snapshot(demo.address)
    assert (snapshot.sequence, snapshot.block_hashes) == (3, (b"h" * 16,))
    assert snapshot.worker_id == facts["worker_id"]
    assert os.sched_getaffinity(facts["pid"]) == {0}
    stub = reflection_pb2_grpc.ServerReflectionStub(demo.pool.get(demo.address))
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    call = stub.ServerReflectionInfo(iter([request]), timeout=5)
    answer = await call.read()
    names = {service.name for service in answer.list_services_response.service}
    assert {NAME, "baton.v1.ControlService", "grpc.health.v1.Health"} <= names
    call.cancel()

    def scrape() -> str:
        url = f"http://{facts['metrics_address']}/metrics"
        with urllib.request.urlopen(url, timeout=5) as response:
            return str(response.read().decode())

    text = await asyncio.to_thread(scrape)
    assert 'baton_kv_blocks{state="free"} 7.0' in text
    method = 'rpc_method="baton.v1.ControlService/GetKvSnapshot"'
    assert f'baton_rpc_server_call_duration_seconds_count{{{method},status="OK"}} 1.0' in text
    await eventually(
        lambda: "baton_event_loop_delay_seconds_count 0.0" not in scrape(), interval_s=0.1
    )
    demo.signal(signal.SIGINT)
    assert await demo.exit_code() == 0
