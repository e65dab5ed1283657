"""Settings of the gateway."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from baton.rpc.tenant_settings import TenantSettings


class GatewaySettings(TenantSettings):
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
    console: bool = True
    """Serve the console page at /console. Where API keys are set, its data needs one: a key shows
    its own tenant's requests, never their texts, and the whole cluster with its load."""
