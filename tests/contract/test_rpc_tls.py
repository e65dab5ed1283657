"""Mutual TLS between services: who has no certificate of ours is not served, but for probes."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.client import AsyncClient, BatonError, InvalidRequest, RetryPolicy
from baton.client.connection import Connection, default_tls
from baton.core.errors import NoWorker
from baton.rpc.server import create_server, listen
from baton.rpc.settings import ServiceSettings
from baton.wire.channel import ChannelPool, TlsFiles
from baton.wire.errors import rpc_errors
from tests.support.demo_process import Demo
from tests.support.nats import free_port

METHOD = "/test.v1.TlsService/Echo"
CONTROL = "/baton.v1.ControlService/GetStatus"
pytestmark = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="makes certificates with openssl"
)


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=30)


def _authority(folder: Path, name: str) -> tuple[Path, Path]:
    """(certificate, key) of a new authority."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    _openssl(
        *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
        *("-keyout", key, "-out", cert, "-days", "2", "-subj", f"/CN={name}"),
    )
    return cert, key


def _issue(folder: Path, name: str, authority: tuple[Path, Path]) -> TlsFiles:
    """Files of a service at 127.0.0.1 that trusts, and is signed by, the authority."""
    cert, key, request = (folder / f"{name}.{end}" for end in ("pem", "key", "csr"))
    extensions = folder / f"{name}.ext"
    extensions.write_text("subjectAltName=IP:127.0.0.1\n")
    _openssl(
        *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
        *("-keyout", key, "-out", request, "-subj", f"/CN={name}"),
    )
    _openssl(
        *("x509", "-req", "-in", request, "-CA", authority[0], "-CAkey", authority[1]),
        *("-CAcreateserial", "-out", cert, "-days", "2", "-extfile", extensions),
    )
    return TlsFiles(cert=str(cert), key=str(key), ca=str(authority[0]))


async def _echo(request: bytes, _context: object) -> bytes:
    return request


async def _call(address: str, tls: TlsFiles | None) -> bytes:
    pool = ChannelPool(max_message_bytes=1 << 20, tls=tls)
    try:
        with rpc_errors():
            return bytes(await pool.get(address).unary_unary(METHOD)(b"hello", timeout=5))
    finally:
        await pool.close()


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[tuple[str, TlsFiles]]:
    authority = await asyncio.to_thread(_authority, tmp_path, "authority")
    files = await asyncio.to_thread(_issue, tmp_path, "service", authority)
    settings = ServiceSettings(tls_cert=files.cert, tls_key=files.key, tls_ca=files.ca)
    server = create_server(settings)
    handler = grpc.unary_unary_rpc_method_handler(_echo)
    server.add_generic_rpc_handlers((
        grpc.method_handlers_generic_handler("test.v1.TlsService", {"Echo": handler}),
    ))
    port = listen(server, settings)
    await server.start()
    yield f"127.0.0.1:{port}", files
    await server.stop(None)


async def test_a_peer_with_our_certificate_is_served(served: tuple[str, TlsFiles]) -> None:
    address, files = served
    assert await _call(address, files) == b"hello"


async def test_others_are_not_served(served: tuple[str, TlsFiles], tmp_path: Path) -> None:
    address, files = served
    strangers = await asyncio.to_thread(_authority, tmp_path, "strangers")
    stranger = await asyncio.to_thread(_issue, tmp_path, "stranger", strangers)
    forged = TlsFiles(cert=stranger.cert, key=stranger.key, ca=files.ca)
    for tls in (None, TlsFiles(ca=files.ca), forged, stranger):
        with pytest.raises(NoWorker):
            await _call(address, tls)


async def test_commands_and_sdk_send_the_certificates_that_the_environment_names(
    served: tuple[str, TlsFiles], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, files = served

    async def reached() -> str:
        with pytest.raises(BatonError) as caught:
            async with AsyncClient(address, timeout_s=5.0, retry=RetryPolicy(max_attempts=1)) as it:
                await it.models()
        return type(caught.value).__name__

    def answer() -> bytes:
        with Connection(address, 5.0, tls=default_tls()).channel() as channel:
            return bytes(channel.unary_unary(METHOD)(b"hello", timeout=5))

    assert await reached() == "NoWorker"
    monkeypatch.setenv("BATON_TLS_CA", files.ca)
    monkeypatch.setenv("BATON_TLS_CERT", files.cert)
    monkeypatch.setenv("BATON_TLS_KEY", files.key)
    assert await reached() == "Unsupported", "the server answers, and has no such method"
    assert await asyncio.to_thread(answer) == b"hello"
    monkeypatch.setenv("BATON_TLS_CA", str(tmp_path / "missing"))
    with pytest.raises(InvalidRequest, match="BATON_TLS_CA"):
        AsyncClient(address)


async def test_a_process_with_tls_answers_plain_probes_at_its_health_port_only(
    tmp_path: Path,
) -> None:
    authority = await asyncio.to_thread(_authority, tmp_path, "authority")
    files = await asyncio.to_thread(_issue, tmp_path, "service", authority)
    health_port = free_port()
    demo = Demo(tmp_path / "demo")
    try:
        demo.start(
            *("--tls-cert", files.cert, "--tls-key", files.key, "--tls-ca", files.ca),
            *("--health-port", str(health_port)),
        )
        await demo.ready()
        assert await demo.health() is grpc.StatusCode.UNAVAILABLE
        async with grpc.aio.insecure_channel(f"127.0.0.1:{health_port}") as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            answer = await check(health_pb2.HealthCheckRequest(), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(CONTROL)(b"", timeout=5)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    finally:
        demo.kill()
        await demo.pool.close()
