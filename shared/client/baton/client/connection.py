"""How both clients reach a server: address, options, metadata, credentials."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import grpc

from baton.client.tracing import Metadata, trace_metadata
from baton.client.types import GenerateOptions, Tls
from baton.core.errors import InvalidRequest

_CHANNEL_OPTIONS = MappingProxyType({
    "grpc.keepalive_time_ms": 30_000,
    "grpc.keepalive_timeout_ms": 10_000,
    "grpc.http2.max_pings_without_data": 0,
    "grpc.initial_reconnect_backoff_ms": 200,
    "grpc.max_reconnect_backoff_ms": 5_000,
    "grpc.enable_http_proxy": 0,  # an http_proxy variable must not capture loopback calls
    "grpc.enable_retries": 0,  # baton.client.retry does it
})


def default_api_key() -> str | None:
    """The key of clients that are given none: $BATON_API_KEY, or else the local gateway's own."""
    return os.environ.get("BATON_API_KEY") or os.environ.get("BATON_GATEWAY_KEY") or None


def default_tls() -> Tls | None:
    """The certificates of clients that are given none: those that services read as well.

    Raises:
        InvalidRequest: a file that the environment names cannot be read.
    """
    ca, cert, key = (_named_by(f"BATON_TLS_{part}") for part in ("CA", "CERT", "KEY"))
    return Tls(ca, cert, key) if ca or cert else None


def _named_by(variable: str) -> bytes | None:
    path = os.environ.get(variable)
    try:
        return Path(path).read_bytes() if path else None
    except OSError as error:
        raise InvalidRequest(f"{variable} names a file that cannot be read: {error}") from error


@dataclass(frozen=True, slots=True)
class Connection:
    """Where a client's calls go, and what goes with each."""

    address: str
    """host:port."""
    timeout_s: float
    """Deadline of calls that name none."""
    api_key: str | None = None
    tls: Tls | None = None

    @property
    def channel_options(self) -> list[tuple[str, int | str]]:
        """Options of the channel."""
        options: list[tuple[str, int | str]] = list(_CHANNEL_OPTIONS.items())
        if self.tls is not None and self.tls.server_name:
            options.append(("grpc.ssl_target_name_override", self.tls.server_name))
        return options

    def credentials(self) -> grpc.ChannelCredentials | None:
        """Credentials of the channel; None means plain text."""
        if self.tls is None:
            return None
        return grpc.ssl_channel_credentials(
            root_certificates=self.tls.ca, private_key=self.tls.key, certificate_chain=self.tls.cert
        )

    def channel(self) -> grpc.Channel:
        """A channel for calls that block."""
        credentials = self.credentials()
        if credentials is None:
            return grpc.insecure_channel(self.address, self.channel_options)
        return grpc.secure_channel(self.address, credentials, self.channel_options)

    def metadata(self) -> Metadata:
        """Metadata of a call that starts now: the key, and the caller's trace."""
        key = (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()
        return key + trace_metadata()

    def deadline_s(self, options: GenerateOptions) -> float:
        """Time that a call may take.

        Raises:
            InvalidRequest: it is not positive.
        """
        return self.check_timeout_s(options.get("timeout_s"))

    def check_timeout_s(self, timeout_s: float | None) -> float:
        """The given timeout, or the connection's.

        Raises:
            InvalidRequest: it is not positive.
        """
        chosen = self.timeout_s if timeout_s is None else timeout_s
        if not chosen > 0:
            raise InvalidRequest(f"timeout_s must be positive, got {chosen:g}")
        return chosen
