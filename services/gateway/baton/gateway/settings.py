"""Settings of the gateway."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, SecretStr, model_validator

from baton.rpc.settings import ServiceSettings
from baton.rpc.tenants import Tenants, read_entries


class GatewaySettings(ServiceSettings):
    """What the gateway can be told."""

    role: ClassVar[str] = "gateway"
    watches: ClassVar[frozenset[str] | None] = frozenset({"scheduler"})

    http_host: str = "127.0.0.1"
    """Interface that HTTP listens on."""
    http_port: int = Field(default=8000, ge=0, le=65535)
    """Port of HTTP; 0 takes a free one."""
    scheduler: str = ""
    """Address of the scheduler, host:port; empty finds it among the members."""
    request_timeout_s: float = Field(default=600.0, gt=0.0, le=86_400.0)
    """Deadline of one generation."""
    max_body_bytes: int = Field(default=4 * 1024 * 1024, ge=1024)
    """Largest request body."""
    body_timeout_s: float = Field(default=30.0, gt=0.0)
    """A request's body must have arrived within this time."""
    max_concurrent_requests: int = Field(default=1024, ge=1)
    """Generations that may run at once; more are refused with status 429."""
    max_choices: int = Field(default=64, ge=1, le=1024)
    """Most prompts times `n` of one request."""
    ping_interval_s: float = Field(default=15.0, gt=0.0)
    """A silent stream gets a comment this often, so that proxies keep it open."""
    cors_origins: str = ""
    """Web pages that may call from a browser, such as "https://a.example,http://localhost:3000", or
    "*" for any; empty for none but the gateway's own."""
    api_keys: SecretStr | None = None
    """API keys and their tenants, "KEY=tenant,KEY=tenant"; better set by the environment than by a
    flag. Without keys here or in `tenants_file`, everybody may call."""
    tenants_file: Path | None = None
    """JSON file of tenants: {"tenants": [{"name": ..., "keys": [...], "requests_per_s": ...,
    "burst": ...}]}; the last two are optional."""
    gateway_key: SecretStr | None = None
    """What a scheduler that asks for keys lets this gateway in by, which tells tenants apart.
    The scheduler's setting of the same name must be equal."""
    tenant_requests_per_s: float = Field(default=0.0, ge=0.0)
    """Requests per second of a tenant without a rate of its own; 0 sets no limit."""
    tenant_burst: int = Field(default=10, ge=1)
    """Requests that a tenant without a burst of its own may send at once, within its rate."""

    console: bool = True
    """Serve the console page at /console. Where API keys are set, its data needs one, and every key
    shows the whole cluster and the times of all tenants' requests; never their texts."""

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
