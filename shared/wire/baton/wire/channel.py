"""Channels to peers: one per address, shared by all calls, closed together.

A channel belongs to the event loop that made it. gRPC reconnects by itself; a peer that died is
noticed by its calls failing (and, across hosts, by keepalive).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

MAX_CHANNELS = 1024
_LAST_CALLS_S = 3600.0
"""A channel that is closed lets its calls go on for so long."""
_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Retries are the scheduler's decision: it knows which worker to try instead.
    ("grpc.enable_retries", 0),
    # An http_proxy variable in a service's environment must not swallow traffic inside the cluster.
    ("grpc.enable_http_proxy", 0),
)
_BULK_OPTIONS: tuple[tuple[str, int | str], ...] = (
    # A separate TCP connection, so that KV does not delay small calls to the same worker.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.optimization_target", "throughput"),
)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths of PEM files, read when used. Key and certificate may be absent on a client."""

    cert: str = ""
    key: str = ""
    ca: str = ""

    @property
    def is_set(self) -> bool:
        """True when anything is given."""
        return bool(self.cert or self.key or self.ca)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Credentials of a client; mutual TLS when a certificate is given."""
        return grpc.ssl_channel_credentials(_read(self.ca), _read(self.key), _read(self.cert))

    def server_credentials(self) -> grpc.ServerCredentials:
        """Credentials of a server; it asks clients for certificates when a CA is given."""
        return grpc.ssl_server_credentials(
            [(_read(self.key) or b"", _read(self.cert) or b"")], _read(self.ca), bool(self.ca)
        )


def _read(path: str) -> bytes | None:
    return Path(path).read_bytes() if path else None


class TracedChannel(grpc.aio.Channel):
    """A channel that adds metadata (the current trace context) to every call that it starts.

    It does not use grpc.aio's client interceptors: those put a task and a queue between caller and
    call, which costs a bulk stream its throughput, and a cancelled call its clean end.
    """

    def __init__(self, channel: grpc.aio.Channel, inject: Callable[[], Mapping[str, str]]) -> None:
        self._channel = channel
        self._inject = inject

    def unary_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """See grpc.aio.Channel."""
        return self._traced(self._channel.unary_unary(method, *args, **kwargs))

    def unary_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """See grpc.aio.Channel."""
        return self._traced(self._channel.unary_stream(method, *args, **kwargs))

    def stream_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """See grpc.aio.Channel."""
        return self._traced(self._channel.stream_unary(method, *args, **kwargs))

    def stream_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """See grpc.aio.Channel."""
        return self._traced(self._channel.stream_stream(method, *args, **kwargs))

    async def close(self, grace: float | None = None) -> None:
        """Closes the channel; calls get `grace` seconds to end."""
        await self._channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:  # noqa: FBT001, FBT002
        """The channel's state."""
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Returns when the state differs from the one given."""
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Returns when the channel is connected."""
        await self._channel.channel_ready()

    async def __aenter__(self) -> TracedChannel:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    def _traced(self, start: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, metadata: Any = None, **kwargs: Any) -> Any:
            pairs = [*(metadata or ()), *self._inject().items()]
            return start(*args, metadata=pairs, **kwargs)

        return call


class ChannelPool:
    """Hands out channels by address. Not thread-safe: use it on its event loop only."""

    def __init__(
        self,
        *,
        max_message_bytes: int,
        tls: TlsFiles | None = None,
        inject: Callable[[], Mapping[str, str]] | None = None,
    ) -> None:
        self.max_message_bytes = max_message_bytes
        """Largest message that the pool's channels take."""
        self._credentials = tls.channel_credentials() if tls and tls.is_set else None
        self._inject = inject
        self._channels: dict[tuple[str, bool], grpc.aio.Channel] = {}
        self._closing: dict[grpc.aio.Channel, asyncio.Task[None]] = {}
        """Channels that still end their calls."""

    def get(self, address: str, *, is_bulk: bool = False) -> grpc.aio.Channel:
        """The channel to `address` ("host:port"); the pool owns it.

        A bulk channel has a separate TCP connection and is tuned for large messages.
        """
        key = (address, is_bulk)
        channel = self._channels.pop(key, None) or self.open(address, is_bulk=is_bulk)
        self._channels[key] = channel  # now the most recently used
        if len(self._channels) > MAX_CHANNELS:
            self._close_soon(self._channels.pop(next(iter(self._channels))))
        return channel

    def warm(self, address: str, *, is_bulk: bool = False) -> None:
        """Connects beforehand, so that no request pays for it. Does not wait."""
        self.get(address, is_bulk=is_bulk).get_state(try_to_connect=True)

    def discard(self, address: str) -> None:
        """Closes the channels to a peer that is gone, each when its last call has ended.

        A call that starts on one of them raises grpc.aio.UsageError, which `rpc_errors` maps.
        """
        for is_bulk in (False, True):
            channel = self._channels.pop((address, is_bulk), None)
            if channel is not None:
                self._close_soon(channel)

    async def close(self) -> None:
        """Closes all channels; calls on them end cancelled."""
        channels = [*self._channels.values(), *self._closing]
        tasks = list(self._closing.values())
        self._channels.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for channel in channels:
            await channel.close(None)

    def open(
        self, address: str, *, is_bulk: bool = False, max_message_bytes: int | None = None
    ) -> grpc.aio.Channel:
        """A new channel, which the caller closes."""
        limit = ("grpc.max_receive_message_length", max_message_bytes or self.max_message_bytes)
        options = (*_OPTIONS, limit, *(_BULK_OPTIONS if is_bulk else ()))
        if self._credentials is None:
            channel = grpc.aio.insecure_channel(address, options=options)
        else:
            channel = grpc.aio.secure_channel(address, self._credentials, options=options)
        return channel if self._inject is None else TracedChannel(channel, self._inject)

    def _close_soon(self, channel: grpc.aio.Channel) -> None:
        task = asyncio.get_running_loop().create_task(channel.close(_LAST_CALLS_S))
        self._closing[channel] = task
        task.add_done_callback(lambda _: self._closing.pop(channel, None))
