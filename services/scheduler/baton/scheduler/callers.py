"""Who calls: API keys at the gRPC port, for the same tenants as at the gateway."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from contextvars import ContextVar

from baton.core.errors import BatonError, Forbidden
from baton.rpc.interceptors import DRAIN
from baton.rpc.tenants import Tenants

_GUARDED = ("baton.v1.InferenceService/", "inference.GRPCInferenceService/", DRAIN)
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
            tenant = self._tenants.admit(given, self._clock())
        except BatonError as error:
            return error
        if tenant and method == DRAIN:
            return Forbidden("a tenant cannot stop the scheduler")
        _tenant.set(tenant)
        return None


def mark(told: str = "") -> str:
    """What salts of the calling tenant begin with; of the one told, where the caller has none."""
    tenant = _tenant.get() or told
    return f"{tenant}:" if tenant else ""


def salted(cache_salt: str) -> str:
    """KV is shared within a tenant only."""
    return mark() + cache_salt


def unsalted(text: str) -> str | None:
    """What `salted` was given; None when it was another tenant."""
    return text.removeprefix(mark()) if text.startswith(mark()) else None
