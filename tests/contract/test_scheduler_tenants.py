"""API keys and tenants at the scheduler's gRPC port, as a caller sees them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from pydantic import ValidationError

from baton.client import (
    AsyncClient,
    InvalidRequest,
    QueueFull,
    RequestNotFound,
    RetryPolicy,
    Unauthenticated,
)
from baton.oip import open_inference_pb2 as pb
from baton.oip import open_inference_pb2_grpc
from baton.scheduler.settings import SchedulerSettings
from baton.v1 import control_pb2, control_pb2_grpc
from tests.support.eventually import eventually
from tests.support.scheduler_rig import Rig

KEYS = "secret-a1=acme,secret-a2=acme,secret-b1=globex"
ONCE = RetryPolicy(max_attempts=1)


@pytest_asyncio.fixture
async def rig() -> AsyncIterator[Rig]:
    async with Rig(api_keys=KEYS, gateway_key="secret-gateway") as rig:
        yield rig


def _client(rig: Rig, key: str | None) -> AsyncClient:
    return AsyncClient(rig.address, timeout_s=10, api_key=key, retry=ONCE)


@pytest.mark.parametrize("gateway_key", ["", "secret-gateway"])
async def test_a_gateway_key_that_was_forgotten_is_told_at_the_start(
    gateway_key: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Rig(api_keys=KEYS, gateway_key=gateway_key):
        assert ("gateways will be refused" in caplog.text) == (not gateway_key)


@pytest.mark.parametrize("key", [None, "wrong", "secret-"])
async def test_without_a_known_key_nothing_is_served(rig: Rig, key: str | None) -> None:
    async with _client(rig, key) as client:
        for call in (
            client.generate("x"),
            client.embed("x"),
            client.models(),
            client.status(),
            client.tokenize("x"),
        ):
            with pytest.raises(Unauthenticated) as caught:
                await call
            assert "secret" not in caught.value.message
    assert not rig.tokenizers[0].encoded


async def test_tenants_do_not_share_kv_and_the_gateway_tells_them_apart_itself(rig: Rig) -> None:
    for key in ("secret-a1", "secret-a2", "secret-b1", "secret-gateway"):
        async with _client(rig, key) as client:
            await client.generate("hello", max_tokens=2, cache_salt="s")
            await client.embed("hello", cache_salt="s")
    salts = [order.cache_salt for order in rig.prefills[0].orders]
    assert salts == ["acme:s"] * 4 + ["globex:s"] * 2 + ["s"] * 2


async def test_a_key_shows_its_own_tenants_requests(rig: Rig) -> None:
    for key, request_id in (("secret-a1", "of-acme"), ("secret-b1", "of-globex")):
        async with _client(rig, key) as client:
            await client.generate("hello", max_tokens=2, request_id=request_id)
    rig.decodes[0].pauses.hold("token 3")
    async with _client(rig, "secret-b1") as globex, _client(rig, "secret-a2") as acme:
        running = asyncio.create_task(globex.generate("hello", max_tokens=8, request_id="runs"))
        await eventually(lambda: "token 3" in rig.decodes[0].pauses.reached)
        assert await _ids(acme) == ["of-acme"]
        assert await _ids(acme, tenant="globex") == ["of-acme"]
        assert (await acme.request("of-acme")).outcome == "length"
        for request_id in ("of-globex", "runs"):
            with pytest.raises(RequestNotFound):
                await acme.request(request_id, tenant="globex")
        assert await _ids(globex) == ["runs", "of-globex"]
        async with _client(rig, "secret-gateway") as gateway:
            assert await _ids(gateway, tenant="acme") == ["of-acme"]
            assert await _ids(gateway) == ["runs", "of-globex", "of-acme"]
        rig.decodes[0].pauses.let_go("token 3")
        await running


async def _ids(client: AsyncClient, tenant: str = "") -> list[str]:
    return [record.request_id for record in (await client.requests(tenant=tenant)).requests]


async def test_the_key_may_come_from_the_environment(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATON_API_KEY", "secret-b1")
    async with _client(rig, None) as client:
        assert [model.name for model in await client.models()] == ["demo"]


async def test_a_tenants_rate_is_limited_and_the_gateways_is_not() -> None:
    settings = {"tenant_requests_per_s": 0.001, "tenant_burst": 2}
    async with Rig(api_keys=KEYS, gateway_key="secret-gateway", **settings) as rig:
        async with _client(rig, "secret-a1") as client:
            await client.models()
            await client.models()
            with pytest.raises(QueueFull, match="rate limit of the tenant 'acme'") as caught:
                await client.models()
            assert caught.value.retry_after_s is not None
        async with _client(rig, "secret-gateway") as client:
            for _ in range(5):
                await client.models()


async def test_the_open_inference_protocol_asks_for_keys_but_for_probes(rig: Rig) -> None:
    async with grpc.aio.insecure_channel(rig.address) as channel:
        stub = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        assert (await stub.ServerReady(pb.ServerReadyRequest(), timeout=10)).ready
        request = pb.ModelReadyRequest(name="demo")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ModelReady(request, timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        metadata = (("authorization", "Bearer secret-b1"),)
        assert (await stub.ModelReady(request, timeout=10, metadata=metadata)).ready


@pytest.mark.parametrize(
    ("key", "code"),
    [
        ("", grpc.StatusCode.UNAUTHENTICATED),
        ("wrong", grpc.StatusCode.UNAUTHENTICATED),
        ("secret-a1", grpc.StatusCode.PERMISSION_DENIED),
        ("secret-gateway", None),
    ],
)
async def test_no_tenant_can_stop_the_scheduler(
    rig: Rig, key: str, code: grpc.StatusCode | None
) -> None:
    metadata = (("authorization", f"Bearer {key}"),) if key else ()
    async with grpc.aio.insecure_channel(rig.address) as channel:
        stub: Any = control_pb2_grpc.ControlServiceStub(channel)
        try:
            await stub.Drain(control_pb2.DrainRequest(), timeout=10, metadata=metadata)
            refused = None
        except grpc.aio.AioRpcError as error:
            refused = error.code()
        status = await stub.GetStatus(control_pb2.GetStatusRequest(), timeout=10)
    assert (refused, len(rig.stops)) == (code, 0 if code else 1)
    assert status.status.role == "scheduler", "its peers ask without a key"


async def test_without_tenants_everybody_may_call() -> None:
    async with Rig() as rig, _client(rig, None) as client:
        assert await client.models()
        async with grpc.aio.insecure_channel(rig.address) as channel:
            stub: Any = control_pb2_grpc.ControlServiceStub(channel)
            await stub.Drain(control_pb2.DrainRequest(), timeout=10)
        assert rig.stops == [None]
        with pytest.raises(InvalidRequest):
            await client.embed([])


def test_badly_described_tenants_are_refused_at_start() -> None:
    with pytest.raises(ValidationError, match="api_keys must look like"):
        SchedulerSettings(api_keys="nonsense")
