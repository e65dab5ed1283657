"""Settings of the scheduler."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from baton.core.placement import PlacementRules
from baton.core.roles import Role
from baton.rpc.tenant_settings import TenantSettings

CONTROL_RPCS = 64
"""Calls kept free for GetStatus, Drain and the like while requests fill the scheduler."""


class SchedulerSettings(TenantSettings):
    """Settings of a scheduler."""

    role: ClassVar[str] = Role.SCHEDULER

    placement_policy: Literal["slo", "prefix_aware", "least_loaded", "round_robin"] = "slo"
    """How workers are chosen for a request."""
    local_prefill_max_tokens: int = Field(default=32, ge=0)
    """A decode worker computes a prompt itself when fewer tokens than this are not in its cache."""
    force_disaggregation: bool = False
    """Compute prompts at prefill workers whenever there is one, however short they are."""
    max_concurrent_rpcs: int = Field(default=16_384, gt=CONTROL_RPCS, le=1_000_000)
    """Calls served at once: requests that run or wait, and up to 64 others."""
    request_timeout_s: float = Field(default=600.0, gt=0.0)
    """Deadline of requests whose caller sets none."""
    max_waiting_requests: int = Field(default=1024, ge=1)
    """Requests that may wait for admission, per model; more are refused."""
    kv_wait_s: float = Field(default=60.0, ge=0.0)
    """How long an admitted request waits for KV blocks when all decode workers are full."""
    max_attempts: int = Field(default=4, ge=1, le=16)
    """Tries per request when workers fail."""
    worker_wait_s: float = Field(default=10.0, ge=0.0)
    """How long a request whose worker was lost waits for another one to appear."""
    recent_requests: int = Field(default=64, ge=0, le=1024)
    """Ended requests whose times and counts are remembered, for the console; never their texts."""
    tokenizer_timeout_s: float = Field(default=10.0, gt=0.0)
    """Bound on one answer of a tokenizer."""
    cache_timeout_s: float = Field(default=0.25, gt=0.0)
    """Bound on looking for a kept answer, for requests that allow one."""
    reserve_timeout_s: float = Field(default=5.0, gt=0.0)
    """Bound on reserving room at a decode worker."""
    prefill_stall_s: float = Field(default=120.0, gt=0.0)
    """A prefill worker that says nothing for this long is given up."""
    decode_stall_s: float = Field(default=60.0, gt=0.0)
    """A decode worker that produces nothing for this long is given up."""

    @property
    def max_live_requests(self) -> int:
        """Requests that run or wait at once. The other calls are left for control."""
        return self.max_concurrent_rpcs - CONTROL_RPCS

    @property
    def placement_rules(self) -> PlacementRules:
        """What placement goes by."""
        return PlacementRules(
            policy=self.placement_policy,
            local_prefill_max_tokens=self.local_prefill_max_tokens,
            force_disaggregation=self.force_disaggregation,
        )
