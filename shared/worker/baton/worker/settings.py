"""Settings that both workers have: the engine's, and those of the ways that KV takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from baton.engine.config import EngineConfig
from baton.handoff.transports.registry import parse_transports
from baton.rpc.settings import ServiceSettings, parse_cores


def _check_transports(text: str) -> str:
    parse_transports(text)
    return text


class WorkerSettings(ServiceSettings):
    """The settings of every worker."""

    model_path: Path
    """Folder of the model, in Hugging Face format."""
    model_name: str = ""
    """Name that the model is served under; empty takes the folder's."""
    device: str = "cpu"
    """Device that computes: cpu, cuda, or one of several such as cuda:1."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type to compute with; auto takes the model's own."""
    num_blocks: int | None = Field(default=None, ge=2)
    """KV blocks to keep; empty takes as many as `kv_bytes` or `kv_share` allow."""
    kv_dtype: Literal["auto", "int8"] = "auto"
    """How KV is kept, on all workers of a model alike: in the model's dtype, or in half of 16 bits
    with a scale for each token and head."""
    block_size: int | None = Field(default=None, ge=1)
    """Tokens per KV block, on all workers of a model alike; empty takes 256 on CUDA, else 16."""
    kv_bytes: int | None = Field(default=None, ge=1)
    """Memory for KV; empty leaves it to `kv_share`."""
    kv_share: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Memory for KV as a share of what is free on the device once the weights are there; empty
    takes 0.4 on CUDA, else 0.25 and at most 2 GiB."""
    max_model_len_tokens: int | None = Field(default=None, ge=1)
    """Longest prompt and output together; empty takes the model's own."""
    max_num_batched_tokens: int = Field(default=512, ge=1)
    """Most tokens computed in one step."""
    max_num_seqs: int = Field(default=64, ge=1)
    """Most sequences computed in one step."""
    num_threads: int | None = Field(default=None, ge=1)
    """Threads to compute with; empty takes one per core given by `cores`, or torch's own choice."""
    prepack_linears: bool = True
    """Pack weights for this CPU on loading, where it and the dtype allow: faster."""
    quantization: Literal["int8", "int8-dynamic", "int4", "fp8"] | None = None
    """Round linear layers on loading, on all workers of a model alike; empty for not."""
    quantization_group_size: Literal[32, 64, 128] = 64
    """Inputs that share a scale; for int4."""
    quantize_lm_head: bool = False
    """Round the output layer too."""
    kv_transports: Annotated[str, AfterValidator(_check_transports)] = "shm,grpc"
    """Ways for KV, best first, the last one "grpc": "shm" is memory shared on one machine."""
    progress_timeout_s: float = Field(default=10.0, gt=0.0, le=3600.0)
    """A push that makes no progress for so long has failed."""
    write_back_queue_blocks: int = Field(default=4096, ge=0)
    """Blocks that may wait to be stored in the cache service; more are not. 0 stores none."""

    def engine_config(self) -> EngineConfig:
        """The engine's part of the settings."""
        return EngineConfig(
            model_path=str(self.model_path),
            model_name=self.model_name or self.model_path.resolve().name,
            device=self.device,
            dtype=self.dtype,
            kv_dtype=self.kv_dtype,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            kv_bytes=self.kv_bytes,
            kv_share=self.kv_share,
            max_model_len_tokens=self.max_model_len_tokens,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_seqs=self.max_num_seqs,
            num_threads=self.num_threads or len(parse_cores(self.cores)) or None,
            prepack_linears=self.prepack_linears,
            quantization=self.quantization,
            quantization_group_size=self.quantization_group_size,
            quantize_lm_head=self.quantize_lm_head,
        )
