"""The gRPC server: its limits, keepalive and TLS."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import grpc

from baton.rpc.settings import ServiceSettings

_WILDCARDS = frozenset({"0.0.0.0", "::", "[::]"})
_LOOPBACK = "127.0.0.1"
_OPTIONS: tuple[tuple[str, int], ...] = (
    # Two processes on one port would each get some of the calls.
    ("grpc.so_reuseport", 0),
    # Peers ping while a long generation says nothing; that must not count as abuse.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.enable_http_proxy", 0),
)


def create_server(
    settings: ServiceSettings, interceptors: Sequence[grpc.aio.ServerInterceptor[Any, Any]] = ()
) -> grpc.aio.Server:
    """A server that refuses larger messages and more calls than the settings allow."""
    return grpc.aio.server(
        interceptors=list(interceptors),
        options=[
            *_OPTIONS,
            ("grpc.max_receive_message_length", settings.max_message_bytes),
            ("grpc.max_send_message_length", -1),
        ],
        maximum_concurrent_rpcs=settings.max_concurrent_rpcs,
    )


def listen(server: grpc.aio.Server, settings: ServiceSettings) -> int:
    """Binds the server before its start; returns the port, chosen if it was 0.

    Raises:
        RuntimeError: the address is taken or not this host's.
    """
    address = join_address(settings.host, settings.port)
    if settings.tls_cert:
        return server.add_secure_port(address, settings.tls.server_credentials())
    return server.add_insecure_port(address)


def create_probe_server(settings: ServiceSettings) -> grpc.aio.Server | None:
    """A bound server for health probes in plain text, if the settings want one.

    Raises:
        RuntimeError: the address is taken or not this host's.
    """
    if not settings.health_port:
        return None
    server = create_server(settings)
    server.add_insecure_port(join_address(settings.host, settings.health_port))
    return server


def advertised_host(settings: ServiceSettings) -> str:
    """The host that others reach this process at."""
    if settings.advertise_host:
        return settings.advertise_host
    if settings.host not in _WILDCARDS:
        return settings.host
    try:
        host = socket.gethostbyname(socket.gethostname())
    except OSError:
        host = _LOOPBACK
    # Many machines call themselves 127.0.1.1, where no other machine finds them.
    return _address_towards(settings.nats_url) if host.startswith("127.") else host


def _address_towards(nats_url: str) -> str:
    """This machine's address on its way to the broker; nothing is sent."""
    broker = urlsplit(nats_url.partition(",")[0]).hostname or _LOOPBACK
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((broker, 1))
            return str(probe.getsockname()[0])
    except OSError:
        return _LOOPBACK


def join_address(host: str, port: int) -> str:
    """host:port, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
