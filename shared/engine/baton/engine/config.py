"""Settings of one engine: plain values, checked once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from baton.core.errors import InvalidRequest

DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_DTYPES = ("auto", "int8")
QUANTIZATIONS = ("int8", "int8-dynamic", "int4", "fp8")
INT4_GROUP_SIZES = (32, 64, 128)

OnProgress = Callable[[float, str], None]
"""Called with the fraction done and what is done next."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What to run, and with how much.

    Raises:
        InvalidRequest: a value is out of range; the message names it.
    """

    model_path: str
    """Directory with config.json and safetensors."""
    model_name: str
    """Served name, a part of the fingerprint."""
    device: str = "cpu"
    dtype: str = "auto"
    """"auto" takes what the model's config says."""
    kv_dtype: str = "auto"
    """"auto" keeps KV in the model's dtype; "int8" rounds it, with a scale for each token and
    head."""
    block_size: int | None = None
    """Tokens per KV block, the same on all workers of a model. Default: 256 on CUDA, which is what
    the varlen attention backend takes, else 16."""
    num_blocks: int | None = None
    kv_bytes: int | None = None
    kv_share: float | None = None
    """Of the device's free memory once the weights are there. At most one of `num_blocks`,
    `kv_bytes` and `kv_share`. Default: 0.4 on CUDA, else 0.25 and at most 2 GiB."""
    max_model_len_tokens: int | None = None
    """Default: what the model and the KV cache can hold."""
    max_num_batched_tokens: int = 512
    max_num_seqs: int = 64
    max_num_waiting: int = 256
    """Sequences that wait, reservations included; more are refused."""
    num_threads: int | None = None
    draft_model_path: str | None = None
    speculation: bool = False
    """Whether requests that do not say get speculation: with drafts of the draft model, or else
    looked up in prompt and output."""
    num_draft_tokens: int = 4
    """Most drafts of a sequence per step."""
    adaptive_drafts: bool = True
    """Draft as many as measured acceptance and costs make worth it, not always the most."""
    headroom_tokens: int = 64
    """Output tokens that a reservation has room for."""
    layer_group_bytes: int | None = None
    """KV of a step's prompts is announced by groups of layers of about this size, while the step
    computes. None announces it after the step only."""
    prepack_linears: bool = True
    """Use pre-packed oneDNN linears where this CPU and dtype have them."""
    random_weights: bool = False
    """Draw the weights on the device instead of reading them: for measuring speed only."""
    cuda_graphs: bool = True
    """Capture decode steps at start, where the device and the model allow."""
    quantization: str | None = None
    """One of QUANTIZATIONS: round the target's linear layers on loading. A checkpoint of
    `baton quantize` needs no setting."""
    quantization_group_size: int = 64
    """Inputs that share a scale; int4 only."""
    quantize_lm_head: bool = False
    """Round the output layer too."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("dtype", DTYPES),
            ("kv_dtype", KV_DTYPES),
            ("quantization", QUANTIZATIONS),
        ):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise InvalidRequest(f"{name} must be one of {', '.join(allowed)}, got {value}")
        sizes = (self.num_blocks, self.kv_bytes, self.kv_share)
        if len(sizes) - sizes.count(None) > 1:
            raise InvalidRequest("set one of num_blocks, kv_bytes and kv_share, not several")
        if self.kv_share is not None and not 0.0 < self.kv_share < 1.0:
            raise InvalidRequest(f"kv_share must be between 0 and 1, got {self.kv_share}")
        for name in (
            "block_size",
            "num_blocks",
            "kv_bytes",
            "max_model_len_tokens",
            "max_num_batched_tokens",
            "max_num_seqs",
            "max_num_waiting",
            "num_threads",
            "num_draft_tokens",
            "layer_group_bytes",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidRequest(f"{name} must be at least 1, got {value}")
        if self.headroom_tokens < 0:
            raise InvalidRequest(f"headroom_tokens must be at least 0, got {self.headroom_tokens}")
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise InvalidRequest(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs}): each running sequence takes one per step"
            )
