"""Settings of the cache service."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from baton.core.roles import Role
from baton.rpc.settings import ServiceSettings


class CacheSettings(ServiceSettings):
    """The settings of the cache service."""

    role: ClassVar[str] = Role.CACHE
    watches: ClassVar[frozenset[str] | None] = frozenset({Role.PREFILL, Role.DECODE})

    memory_bytes: int = Field(default=512 * 1024 * 1024, ge=0)
    """Memory for stored KV blocks; 0 keeps none there."""
    disk_path: Path | None = None
    """Folder for blocks on disk, kept over restarts; empty for none. Processes may share it."""
    disk_bytes: int = Field(default=4 << 30, ge=1 << 20)
    """Size that the file on disk may reach."""
    disk_queue_bytes: int = Field(default=64 << 20, ge=0)
    """Blocks that may wait to be written to disk; more are not."""
    pinned_bytes: int = Field(default=64 << 20, ge=0)
    """What pinned prefixes may take, at most half of the larger tier."""
    answer_bytes: int = Field(default=64 << 20, ge=0)
    """Memory for kept answers of identical requests; 0 keeps none."""
    answer_ttl_s: float = Field(default=3600.0, gt=0.0)
    """An answer is kept for so long."""
    max_prefix_blocks: int = Field(default=65536, ge=1, le=1 << 20)
    """Most block hashes in one lookup or fetch."""
    stall_timeout_s: float = Field(default=10.0, gt=0.0, le=600.0)
    """A store call that sends nothing for so long is ended."""
