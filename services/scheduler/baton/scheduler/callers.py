"""Who calls: API keys at the gRPC port, for the same tenants as at the gateway."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from contextvars import ContextVar

from baton.core.errors import BatonError
from baton.rpc.tenants import Tenants

_GUARDED = ("baton.v1.InferenceService/", "inference.GRPCInferenceService/")
_OPEN = frozenset({
    "inference.GRPCInferenceService/ServerLive",
    "inference.GRPCInferenceService/ServerReady",
})
"""Probes carry no keys."""
_tenant: ContextVar[str] = ContextVar("tenant", default="")
"""Of the call that this task, or one that it started, serves."""


class Callers:
    """Lets callers in by their keys. Without tenants, everybody; the gateway by its own key."""

    def __init__(self, tenants: Tenants, gateway_key: str, clock: Callable[[], float]) -> None:
        self._tenants = tenants
        self._gateway = f"Bearer {gateway_key}".encode() if gateway_key else b""
        self._clock = clock

    def refusal(self, method: str, metadata: Mapping[str, str]) -> BatonError | None:
        """Why a call may not come now; if it may, notes whose it is."""
        if not method.startswith(_GUARDED) or method in _OPEN:
            return None
        given = metadata.get("authorization", "")
        if self._gateway and hmac.compare_digest(given.encode(), self._gateway):
            return None  # it has told tenants apart, and counted their requests
        try:
            _tenant.set(self._tenants.admit(given, self._clock()))
        except BatonError as error:
            return error
        return None


def salted(cache_salt: str) -> str:
    """KV is shared within a tenant only."""
    tenant = _tenant.get()
    return f"{tenant}:{cache_salt}" if tenant else cache_salt


def unsalted(text: str) -> str | None:
    """What `salted` was given; None when it was another tenant."""
    tenant = _tenant.get()
    mark = f"{tenant}:" if tenant else ""
    return text.removeprefix(mark) if text.startswith(mark) else None
