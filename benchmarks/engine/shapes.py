"""Models to measure: known shapes with random weights, and the bundled demo model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_DEMO = Path(__file__).resolve().parents[2] / "deploy" / "models" / "demo"
_SHAPES: dict[str, dict[str, Any]] = {
    "qwen2-0.5b": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    # A mixture of experts of nobody's size.
    "qwen3-moe-0.5b": {
        "model_type": "qwen3_moe",
        "hidden_size": 1024,
        "moe_intermediate_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
}
NAMES = (*_SHAPES, "demo")


def model_directory(
    name: str, dtype: torch.dtype, scratch: Path, *, has_weights: bool = True
) -> Path:
    """Folder of a model; random weights are written into `scratch`, nothing is downloaded."""
    if name == "demo":
        return _DEMO
    settings = dict(_SHAPES[name])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    if not has_weights:
        config.save_pretrained(scratch / name)
        return scratch / name
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, dtype=dtype
    )
    model.save_pretrained(scratch / name)
    return scratch / name


def count_parameters(directory: Path) -> tuple[int, int]:
    """Parameters that a token's forward reads and multiplies: (in all, without the last layer).

    Of a mixture's experts those that a token is routed to count.
    The embedding counts only as the last layer that it is when tied: looking up reads one row.
    """
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    embedding = model.get_input_embeddings().weight.numel()
    total = sum(
        parameter.numel() * config.num_experts_per_tok // len(parameter)
        if parameter.dim() == 3  # a layer's experts
        else parameter.numel()
        for parameter in model.parameters()
    )
    if not config.tie_word_embeddings:
        total -= embedding
    return total, total - embedding
