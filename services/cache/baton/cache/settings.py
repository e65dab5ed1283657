"""Settings of the cache service."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from baton.rpc.settings import ServiceSettings


class CacheSettings(ServiceSettings):
    """What the cache service can be told."""

    role: ClassVar[str] = "cache"
    watches: ClassVar[frozenset[str] | None] = frozenset({"prefill", "decode"})

    memory_bytes: int = Field(default=512 * 1024 * 1024, ge=0)
    """Memory for stored KV blocks; 0 stores none."""
    max_prefix_blocks: int = Field(default=65536, ge=1, le=1 << 20)
    """Most block hashes in one lookup or fetch."""
    stall_timeout_s: float = Field(default=10.0, gt=0.0, le=600.0)
    """A store call that sends nothing for so long is ended."""
