"""Probes a loaded model: the shape of its KV, and whether paged attention computes the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from baton.core.errors import Unsupported
from baton.core.hashing import KvLayout
from baton.engine.attention import LayerShape, PagedAttention
from baton.engine.inputs import Row, make_inputs
from baton.engine.kv_cache import KvCache

_NUM_TOKENS = 24
_NUM_FIRST = 15
"""Tokens of the first of two forwards: the second one reads KV from the pool."""
_MAX_ERROR = {torch.float32: 1e-2}
_MAX_ERROR_16_BITS = 0.25
"""Largest relative difference of a token's logits, for the middle one of all tokens: rounding stays
far below, and another attention far above."""


def layer_shapes(
    module: PreTrainedModel, config: PreTrainedConfig, attention: PagedAttention
) -> list[LayerShape]:
    """Runs one token and records what each layer passes to attention.

    Raises:
        Unsupported: not every layer attends through AttentionInterface, exactly once.
    """
    token = torch.zeros(1, 1, dtype=torch.int64, device=module.device)
    with torch.inference_mode():
        module(input_ids=token, position_ids=torch.zeros_like(token), use_cache=False)
    num_layers = config.get_text_config().num_hidden_layers
    missing = [layer for layer in range(num_layers) if layer not in attention.shapes]
    if missing or len(attention.shapes) != num_layers:
        raise Unsupported(
            f"{config.model_type}: {len(attention.shapes)} of {num_layers} layers attend through "
            f"AttentionInterface; missing: {missing[:8]}"
        )
    return [attention.shapes[layer] for layer in range(num_layers)]


@torch.inference_mode()
def check_attention(module: PreTrainedModel, attention: PagedAttention, layout: KvLayout) -> None:
    """Compares a few tokens' logits with those of the model's own attention without a cache.

    A model may rely on something that the interface does not carry, such as later tokens, its own
    positions or a bias. It would still answer, but wrongly.

    Raises:
        Unsupported: they differ.
    """
    vocab_size = int(module.config.get_text_config().vocab_size)
    token_ids = [(index * 7919 + 13) % vocab_size for index in range(_NUM_TOKENS)]
    paged = _paged_logits(module, attention, layout, token_ids)
    inputs = torch.tensor([token_ids], device=module.device)
    positions = torch.arange(_NUM_TOKENS, device=module.device).unsqueeze(0)
    with _own_attention(module, attention.name):
        own = module(input_ids=inputs, position_ids=positions, use_cache=False).logits[0].float()
    # A masked token's logits are -inf on both sides.
    own, paged = own.nan_to_num(neginf=0.0), paged.nan_to_num(neginf=0.0)
    error = ((paged - own).norm(dim=1) / own.norm(dim=1).clamp_min(1e-6)).median().item()
    kind = module.config.model_type
    if not error <= _MAX_ERROR.get(module.dtype, _MAX_ERROR_16_BITS):
        raise Unsupported(
            f"{kind} attends in a way that a paged KV cache does not serve: its logits differ by "
            f"{error:.0%} from what its eager attention computes"
        )


def _paged_logits(
    module: PreTrainedModel, attention: PagedAttention, layout: KvLayout, token_ids: list[int]
) -> torch.Tensor:
    num_blocks = -(-_NUM_TOKENS // layout.block_size)
    table = list(range(num_blocks))
    attention.attach(KvCache(layout, num_blocks, module.device))
    parts = []
    try:
        for start, end in ((0, _NUM_FIRST), (_NUM_FIRST, _NUM_TOKENS)):
            row = Row(token_ids[start:end], start, table, end - start)
            inputs = make_inputs([row], layout.block_size, module.device)
            attention.use(inputs.batch)
            output = module(
                input_ids=inputs.input_ids, position_ids=inputs.position_ids, use_cache=False
            )
            parts.append(output.logits[0].float())
    finally:
        attention.detach()
    return torch.cat(parts)


@contextmanager
def _own_attention(module: PreTrainedModel, name: str) -> Iterator[None]:
    module.set_attn_implementation("eager")
    try:
        yield
    finally:
        module.set_attn_implementation(name)
