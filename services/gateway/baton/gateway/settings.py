"""Settings of the gateway."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from baton.core.roles import Role
from baton.rpc.tenant_settings import TenantSettings


class GatewaySettings(TenantSettings):
    """Settings of the gateway."""

    role: ClassVar[str] = Role.GATEWAY
    watches: ClassVar[frozenset[str] | None] = frozenset({Role.SCHEDULER})

    http_host: str = "127.0.0.1"
    """Interface that HTTP listens on. On a loopback address, requests must name a loopback host or
    one of `allowed_hosts`."""
    allowed_hosts: str = ""
    """Host names that requests may name, such as "llm.example,gateway"; loopback names are always
    allowed. Empty allows any on an address that is not loopback."""
    http_port: int = Field(default=8000, ge=0, le=65535)
    """Port of HTTP; 0 takes a free one."""
    max_connections: int = Field(default=4096, ge=1)
    """Open HTTP connections; more are refused with status 503."""
    scheduler: str = ""
    """Address of the scheduler, host:port; empty finds it among the members."""
    request_timeout_s: float = Field(default=600.0, gt=0.0, le=86_400.0)
    """Deadline of one generation."""
    max_body_bytes: int = Field(default=4 * 1024 * 1024, ge=1024)
    """Largest request body."""
    body_timeout_s: float = Field(default=30.0, gt=0.0)
    """Deadline for the arrival of a request's body."""
    max_concurrent_requests: int = Field(default=1024, ge=1)
    """Generations that may run at once; more are refused with status 429."""
    max_choices: int = Field(default=64, ge=1, le=1024)
    """Most prompts times `n` of one request."""
    ping_interval_s: float = Field(default=15.0, gt=0.0)
    """Interval of comments in a silent stream, which keep proxies from closing it."""
    cors_origins: str = ""
    """Origins of web pages that may call, such as "https://a.example,http://localhost:3000", or "*"
    for any; empty for the console only."""
    console: bool = True
    """Serve the console page at /console. Where API keys are set, its data needs one: a key shows
    the requests of its tenant, never their texts, and the whole cluster with its load."""
