"""Loads a decoder-only transformers model and finds out what its KV looks like.

There is no model code here. A model that attends through transformers' AttentionInterface works;
any other is refused with the reason.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from baton.core.errors import ModelNotFound, Unsupported
from baton.core.hashing import KvLayout
from baton.engine.attention import PagedAttention
from baton.engine.backends import choose_backends
from baton.engine.config import EngineConfig, OnProgress
from baton.engine.devices import check_device, default_block_size
from baton.engine.experts import open_experts
from baton.engine.fusion import fuse_gated, merge_siblings, pack_products
from baton.engine.kv_cache import dtype_name, torch_dtype
from baton.engine.kv_int8 import int8_layout
from baton.engine.linears import LinearFactory, packer, replace_linears
from baton.engine.norms import speed_up_norms
from baton.engine.probe import check_attention, layer_shapes
from baton.engine.quantize import Quantization
from baton.engine.quantize_model import WeightSource, load_weights
from baton.engine.sdpa import SdpaBackend

logger = logging.getLogger(__name__)

_PACKED_ROWS = 64
"""What weights are packed for. The layouts for 8 rows and more are equally fast from 1 row to 512;
the one for a single row is a third slower on prompts (Nov 2026). So one copy serves both phases."""
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_ROPE_OF_LENGTH = frozenset({"dynamic", "longrope"})
"""Rotary embeddings that change for the whole batch when one sequence is long."""


@dataclass(slots=True)
class LoadedModel:
    """A model, ready to run, and what there is to know about it."""

    module: PreTrainedModel
    directory: Path
    config: PreTrainedConfig
    """As read, with the quantization done on loading; the module's own is a copy without it."""
    attention: PagedAttention
    layout: KvLayout
    device: torch.device
    max_len_tokens: int
    """Longest context that the model was made for."""
    eos_token_ids: frozenset[int]

    @property
    def vocab_size(self) -> int:
        """Token ids that it takes, and logits that it makes."""
        return int(self.module.config.get_text_config().vocab_size)


def load_model(
    path: str,
    settings: EngineConfig,
    *,
    on_progress: OnProgress,
    quantization: Quantization | None = None,
) -> LoadedModel:
    """Loads weights from a local directory; nothing is downloaded and nothing unpickled.

    With `quantization`, plain linear layers are quantized.

    Raises:
        ModelNotFound: the directory, its config or its weights are missing.
        Unsupported: the model cannot be served; the message says why.
    """
    directory = Path(path)
    target = check_device(settings.device)
    block_size = settings.block_size or default_block_size(target)
    _check_directory(directory, needs_weights=not settings.random_weights)
    on_progress(0.0, f"reading {directory.name}")
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    _check_config(config)
    attention = PagedAttention()
    on_progress(0.05, "loading weights")
    weights = WeightSource(directory, config, attention.name, target, settings.random_weights)
    dtype = None if settings.dtype == "auto" else torch_dtype(settings.dtype)
    module = load_weights(weights, dtype, quantization, on_progress)
    if settings.prepack_linears:
        on_progress(0.8, "packing weights")
        _speed_up(module, packer(_PACKED_ROWS))
    pack_products(module)
    on_progress(0.9, "looking at its layers")
    shapes = layer_shapes(module, config, attention)
    layout = KvLayout.one_group(
        block_size=block_size,
        dtype=dtype_name(module.dtype),
        num_kv_heads=tuple(shape.num_kv_heads for shape in shapes),
        head_dim=tuple(shape.head_dim for shape in shapes),
    )
    # Before KV is rounded: rounding could hide a difference.
    attention.backends = choose_backends(shapes, target, module.dtype, block_size)
    _try_attention(module, attention, layout)
    if settings.kv_dtype == "int8":
        layout = int8_layout(layout)
        attention.backends = choose_backends(
            shapes, target, module.dtype, block_size, kv_dtype=torch.int8
        )
    return LoadedModel(
        module=module,
        directory=directory,
        config=config,
        attention=attention,
        layout=layout,
        device=target,
        max_len_tokens=_max_len_tokens(config.get_text_config()),
        eos_token_ids=_eos_token_ids(module),
    )


def _try_attention(module: PreTrainedModel, attention: PagedAttention, layout: KvLayout) -> None:
    """Compares with the model's own attention; a kernel that fails leaves its place to sdpa."""
    try:
        check_attention(module, attention, layout)
    except (RuntimeError, Unsupported) as error:
        tried = ", ".join(attention.num_layers_by_backend().keys() - {SdpaBackend.name})
        if not tried:
            raise
        logger.warning("attention: sdpa for all layers; %s was tried and failed: %s", tried, error)
        attention.backends = dict.fromkeys(range(layout.num_layers), SdpaBackend())
        check_attention(module, attention, layout)


def _speed_up(module: PreTrainedModel, factory: LinearFactory) -> None:
    """Replaces layers of the model by faster ones, where `factory` makes any."""
    # One layer shows whether this device and dtype have them at all.
    sample = torch.nn.Linear(1, 1, bias=False, device=module.device, dtype=module.dtype)
    if factory(sample) is None:
        return
    open_experts(module)
    num_merged = merge_siblings(module)
    num_replaced = replace_linears(module, factory)
    num_fused = fuse_gated(module, module.dtype)
    num_norms = speed_up_norms(module, module.dtype)
    logger.info(
        "%d linear layers packed; %d groups of siblings merged; %d gated MLPs fused; %d RMS norms",
        num_replaced,
        num_merged,
        num_fused,
        num_norms,
    )


def _check_directory(directory: Path, *, needs_weights: bool) -> None:
    if not directory.is_dir():
        raise ModelNotFound(f"model directory {directory} does not exist")
    if not (directory / "config.json").is_file():
        raise ModelNotFound(f"{directory} has no config.json")
    if needs_weights and not any(directory.glob("*.safetensors")):
        raise ModelNotFound(
            f"{directory} has no *.safetensors weights (other formats are not loaded)"
        )


def _check_config(config: PreTrainedConfig) -> None:
    """Refuses unsupported models before gigabytes of weights are read."""
    kind = config.model_type
    if config.is_encoder_decoder:
        raise Unsupported(f"{kind} is an encoder-decoder model; only decoder-only ones are served")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise Unsupported(f"transformers has no causal language model of type {kind}")
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if getattr(model_class, "_is_stateful", False):
        raise Unsupported(f"{kind} has state-space or recurrent layers; only attention is served")
    if not getattr(model_class, "_supports_attention_backend", False):
        raise Unsupported(f"{kind} does not attend through transformers' AttentionInterface")
    text = config.get_text_config()
    others = set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES
    if others:
        raise Unsupported(f"{kind} has layers of type {', '.join(sorted(others))}")
    if getattr(text, "use_bidirectional_attention", None):
        raise Unsupported(f"{kind} is configured for bidirectional attention")


def _max_len_tokens(config: PreTrainedConfig) -> int:
    max_len = int(getattr(config, "max_position_embeddings", 0) or 1 << 20)
    rope = getattr(config, "rope_parameters", None) or {}
    per_type = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    for settings in per_type:
        if settings.get("rope_type") in _ROPE_OF_LENGTH:
            original = settings.get("original_max_position_embeddings")
            max_len = min(max_len, int(original or max_len))
    return max_len


def _eos_token_ids(module: PreTrainedModel) -> frozenset[int]:
    for source in (module.generation_config, module.config, module.config.get_text_config()):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return frozenset()
