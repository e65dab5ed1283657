"""Settings of the decode service."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from baton.core.roles import Role
from baton.engine.config import EngineConfig
from baton.worker.settings import WorkerSettings


class DecodeSettings(WorkerSettings):
    """The settings of a decode worker."""

    role: ClassVar[str] = Role.DECODE
    watches: ClassVar[frozenset[str] | None] = frozenset({Role.CACHE})

    cuda_graphs: bool = True
    """On CUDA, capture decode steps at start: shorter steps, a longer start."""
    draft_model_path: Path | None = None
    """Folder of the draft model for speculation; empty for none."""
    speculation: bool = False
    """Decode speculatively, unless a request says otherwise; without a draft model by looking up
    what followed the same tokens before."""
    num_draft_tokens: int = Field(default=4, ge=1, le=64)
    """Most draft tokens per step of a speculative sequence."""
    adaptive_drafts: bool = True
    """Draft as many tokens as measured acceptance and costs make worth it, not always the most."""
    reservation_lease_s: float = Field(default=15.0, gt=0.0, le=3600.0)
    """A reservation that is neither used nor renewed ends after this long."""
    take_int8_kv: bool = True
    """Take KV that a prefill worker rounds on its way; without it such pushes are refused."""
    credits: int = Field(default=8, ge=1, le=1024)
    """Chunks that a push may have on their way."""
    transport_bytes: int = Field(default=256 << 20, ge=0)
    """Shared memory that pushes may have at once; those beyond it send over gRPC."""

    def engine_config(self) -> EngineConfig:
        """The engine's part of the settings."""
        return replace(
            super().engine_config(),
            cuda_graphs=self.cuda_graphs,
            draft_model_path=str(self.draft_model_path) if self.draft_model_path else None,
            speculation=self.speculation,
            num_draft_tokens=self.num_draft_tokens,
            adaptive_drafts=self.adaptive_drafts,
        )
