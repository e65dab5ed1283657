"""Settings of the scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, SecretStr, model_validator

from baton.core.placement import PlacementRules
from baton.rpc.settings import ServiceSettings
from baton.rpc.tenants import Tenants, read_entries


class SchedulerSettings(ServiceSettings):
    """What the scheduler can be told."""

    role: ClassVar[str] = "scheduler"

    placement_policy: Literal["slo", "prefix_aware", "least_loaded", "round_robin"] = "slo"
    """How workers are chosen for a request."""
    local_prefill_max_tokens: int = Field(default=32, ge=0)
    """A decode worker computes a prompt itself when fewer tokens than this are not in its cache."""
    force_disaggregation: bool = False
    """Compute prompts at prefill workers whenever there is one, however short they are."""
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

    api_keys: SecretStr | None = None
    """API keys and their tenants, "KEY=tenant,KEY=tenant", as at the gateway. Without keys here or
    in `tenants_file`, everybody may call."""
    tenants_file: Path | None = None
    """JSON file of tenants, as at the gateway."""
    tenant_requests_per_s: float = Field(default=0.0, ge=0.0)
    """Calls per second of a tenant without a rate of its own; 0 sets no limit."""
    tenant_burst: int = Field(default=10, ge=1)
    """Calls that a tenant without a burst of its own may make at once, within its rate."""
    gateway_key: SecretStr | None = None
    """Key of the gateways, which tell tenants apart themselves; theirs must be equal."""

    @model_validator(mode="after")
    def _check_tenants(self) -> Self:
        self.make_tenants()
        return self

    def make_tenants(self) -> Tenants:
        """The tenants, none of whom has called yet.

        Raises:
            ValueError: they are not well described.
        """
        keys = self.api_keys.get_secret_value() if self.api_keys is not None else ""
        entries = read_entries(keys, self.tenants_file)
        return Tenants(entries, self.tenant_requests_per_s, self.tenant_burst)

    @property
    def placement_rules(self) -> PlacementRules:
        """What placement goes by."""
        return PlacementRules(
            policy=self.placement_policy,
            local_prefill_max_tokens=self.local_prefill_max_tokens,
            force_disaggregation=self.force_disaggregation,
        )
