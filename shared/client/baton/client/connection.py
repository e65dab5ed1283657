"""How both clients reach a server: address, options, metadata, credentials."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import grpc

from baton.client.tracing import trace_metadata
from baton.client.types import Tls
from baton.core.errors import InvalidRequest
from baton.wire.calls import CallTerms

MAX_TIMEOUT_S = 365 * 24 * 3600.0
"""A longer limit counts as none: gRPC counts deadlines in nanoseconds and would overflow."""
_LOOPBACK = re.compile(r"unix:.*|(?:localhost|127(?:\.\d{1,3}){3}|\[::1\])(?::\d+)?")
_CHANNEL_OPTIONS = MappingProxyType({
    "grpc.keepalive_time_ms": 30_000,
    "grpc.keepalive_timeout_ms": 10_000,
    "grpc.http2.max_pings_without_data": 0,
    "grpc.initial_reconnect_backoff_ms": 200,
    "grpc.max_reconnect_backoff_ms": 5_000,
    "grpc.enable_http_proxy": 0,  # an http_proxy variable must not capture loopback calls
    "grpc.enable_retries": 0,  # baton.client.retry does it
})


def default_api_key(address: str) -> str | None:
    """The key for a client whose caller passes none: $BATON_API_KEY, or the local gateway's.

    The gateway's key acts for every tenant, so it is sent to loopback addresses only.
    """
    own = os.environ.get("BATON_GATEWAY_KEY") if _LOOPBACK.fullmatch(address) else None
    return os.environ.get("BATON_API_KEY") or own or None


def default_tls() -> Tls | None:
    """Certificates for a client whose caller passes none: from BATON_TLS_*, as services read them.

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
    """Time limit of calls that set none."""
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

    def terms(self, remaining_s: float) -> CallTerms:
        """What a call that starts now sends along: time limit, key, and the caller's trace."""
        key = (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()
        timeout_s = max(0.0, remaining_s) if remaining_s < MAX_TIMEOUT_S else None
        return CallTerms(timeout_s, key + trace_metadata())

    def check_timeout_s(self, timeout_s: float | None) -> float:
        """The given timeout, or the connection's.

        Raises:
            InvalidRequest: it is not positive.
        """
        chosen = self.timeout_s if timeout_s is None else timeout_s
        if not chosen > 0:
            raise InvalidRequest(f"timeout_s must be positive, got {chosen:g}")
        return chosen
