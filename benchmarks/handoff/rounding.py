"""What int8 on the wire costs and saves: quality on held-out text, and time per byte."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from baton.core.handoff.frames import KvEncoding, Span
from baton.core.hashing import KvLayout
from baton.engine.kv_cache import KvCache
from baton.engine.kv_int8 import restore_kv, round_kv
from benchmarks.quantization.perplexity import DEMO, heldout_texts, load, make_windows

_LAYOUT = KvLayout.one_group(16, "bfloat16", (8,) * 32, (128,) * 32)
"""Of an 8B model."""
_NUM_BLOCKS = 8
_PROMPT_TOKENS = 512
_MAX_FILES = 12


@dataclass(frozen=True, slots=True)
class RoundingFigures:
    """Quality is that of the demo model after a prompt whose KV was rounded."""

    wire_fraction: float
    """Bytes on the wire, of those without rounding."""
    cost_s_per_gb: float
    """Rounding and restoring a GB of KV, one thread each."""
    break_even_gb_s: float
    """Below this bandwidth rounding saves time, where nothing hides either."""
    perplexity_change: float
    """0.01 is one per cent more perplexity."""
    token_agreement: float
    """Share of positions whose most likely token stays the same."""


def measure_rounding(note: Callable[[str], None]) -> RoundingFigures:
    """Times the code that the workers run, and computes the quality."""
    note("int8 on the wire: time")
    span = Span(0, _LAYOUT.num_layers, 0, _NUM_BLOCKS)
    num_bytes = span.num_bytes(_LAYOUT)
    wire_fraction = span.num_bytes(KvEncoding.INT8.layout(_LAYOUT)) / num_bytes
    cost_s_per_gb = _cost_s(span) / num_bytes * 1e9
    note("int8 on the wire: quality")
    perplexity_change, agreement = _quality()
    return RoundingFigures(
        wire_fraction=wire_fraction,
        cost_s_per_gb=cost_s_per_gb,
        break_even_gb_s=(1.0 - wire_fraction) / cost_s_per_gb,
        perplexity_change=perplexity_change,
        token_agreement=agreement,
    )


def _cost_s(span: Span) -> float:
    """Median of rounding and restoring, in seconds of one core, whatever else the machine does."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    content = memoryview(
        torch.randn(span.num_bytes(_LAYOUT) // 2).bfloat16().view(torch.uint8).numpy().data
    )
    payload = memoryview(bytearray(span.num_bytes(KvEncoding.INT8.layout(_LAYOUT))))
    times = []
    for _ in range(15):
        began_at_s = time.thread_time()
        round_kv(content, _LAYOUT, span, payload)
        restore_kv(payload, _LAYOUT, span)
        times.append(time.thread_time() - began_at_s)
    torch.set_num_threads(num_threads)
    return median(times)


@torch.inference_mode()
def _quality() -> tuple[float, float]:
    """Perplexity's change and the share of equal tokens, after prompts of `_PROMPT_TOKENS`."""
    model = load(DEMO)
    nats = [0.0, 0.0]
    num_tokens = num_equal = 0
    for window in make_windows(DEMO, heldout_texts(_MAX_FILES)):
        if window.shape[1] < _PROMPT_TOKENS + 32:
            continue
        prompt, rest = window[:, :_PROMPT_TOKENS], window[:, _PROMPT_TOKENS:]
        found = []
        for index, is_rounded in enumerate((False, True)):
            cache = DynamicCache()
            model(input_ids=prompt, past_key_values=cache, use_cache=True)
            if is_rounded:
                _round_cache(cache)
            logits = model(input_ids=rest, past_key_values=cache).logits[0, :-1].float()
            nats[index] += float(cross_entropy(logits, rest[0, 1:], reduction="sum"))
            found.append(logits.argmax(-1))
        num_equal += int((found[0] == found[1]).sum())
        num_tokens += rest.shape[1] - 1
    exact, rounded = (math.exp(total / num_tokens) for total in nats)
    return rounded / exact - 1.0, num_equal / num_tokens


def _round_cache(cache: Any) -> None:
    """Puts K and V through the wire's form, as a hand-off does."""
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            tokens = tensor[0].transpose(0, 1).contiguous()  # [num_tokens, heads, head_dim]
            num_tokens, num_heads, dim = tokens.shape
            layout = KvLayout.one_group(1, "bfloat16", (num_heads,), (dim,))
            span = Span(0, 1, 0, num_tokens)
            kv = KvCache(layout, num_tokens, torch.device("cpu"))
            kv.keys[0][:, 0] = tokens
            payload = memoryview(bytearray(span.num_bytes(KvEncoding.INT8.layout(layout))))
            round_kv(kv.read(range(num_tokens), 0, 1), layout, span, payload)
            kv.write(range(num_tokens), 0, 1, restore_kv(payload, layout, span))
            tensor[0] = kv.keys[0][:, 0].transpose(0, 1)
