"""Settings of the prefill service."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from baton.core.roles import Role
from baton.engine.config import EngineConfig
from baton.worker.settings import WorkerSettings


class PrefillSettings(WorkerSettings):
    """The settings of a prefill worker."""

    role: ClassVar[str] = Role.PREFILL
    watches: ClassVar[frozenset[str] | None] = frozenset({Role.CACHE, Role.DECODE})

    max_num_batched_tokens: int = Field(default=256, ge=1)
    """Most tokens computed in one step. Smaller steps hide more of the hand-off behind compute."""
    layer_group_bytes: int = Field(default=512 << 10, ge=1)
    """A prompt's KV is handed over by groups of layers of about this size while a step computes;
    KV of a step that is not more is handed over after it."""
    kv_encoding: Literal["native", "int8"] = "native"
    """How KV travels: "int8" rounds it per token and head for slow networks, and is not exact."""
    hold_lease_s: float = Field(default=30.0, gt=0.0, le=3600.0)
    """A prompt's KV is kept for a fail-over for at most this long after its hand-off."""
    cache_timeout_s: float = Field(default=0.5, gt=0.0, le=60.0)
    """Time that a prompt may wait for blocks of the cache service."""

    def engine_config(self) -> EngineConfig:
        """The engine's part of the settings."""
        return replace(
            super().engine_config(), cuda_graphs=False, layer_group_bytes=self.layer_group_bytes
        )
