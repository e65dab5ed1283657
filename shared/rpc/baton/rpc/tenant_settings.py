"""Settings of the services that let callers in by their keys: the gateway and the scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, SecretStr, model_validator

from baton.rpc.settings import ServiceSettings
from baton.rpc.tenants import Tenants, read_entries


class TenantSettings(ServiceSettings):
    """What there is to say about tenants; the variables BATON_... of both services are the same."""

    api_keys: SecretStr | None = None
    """API keys and their tenants, "KEY=tenant,KEY=tenant"; better set by the environment than by a
    flag. Without keys here or in `tenants_file`, everybody may call."""
    tenants_file: Path | None = None
    """JSON file of tenants: {"tenants": [{"name": ..., "keys": [...], "requests_per_s": ...,
    "burst": ...}]}; the last two are optional."""
    gateway_key: SecretStr | None = None
    """What a scheduler that asks for keys lets the gateway in by, which tells tenants apart itself;
    to be set equal at both."""
    tenant_requests_per_s: float = Field(default=0.0, ge=0.0)
    """Requests per second of a tenant without a configured rate; 0 sets no limit."""
    tenant_burst: int = Field(default=10, ge=1)
    """Requests that a tenant without a configured burst may send at once, within its rate."""

    @model_validator(mode="after")
    def _check_tenants(self) -> Self:
        self.make_tenants()
        return self

    def make_tenants(self) -> Tenants:
        """The tenants, before any of them calls.

        Raises:
            ValueError: they are not well described.
        """
        entries = read_entries(_plain(self.api_keys), self.tenants_file)
        return Tenants(entries, self.tenant_requests_per_s, self.tenant_burst)

    @property
    def plain_gateway_key(self) -> str:
        """The gateway's key; empty for none."""
        return _plain(self.gateway_key)


def _plain(secret: SecretStr | None) -> str:
    return secret.get_secret_value() if secret is not None else ""
