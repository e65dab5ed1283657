"""What int8 changes: speed at batch 1, and perplexity of the demo model on held-out text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from baton.engine.quantize import Quantization
from benchmarks.quantization.perplexity import perplexity_change
from benchmarks.quantization.speed import Workload, decode_speedup

_NUM_ROUNDS = 3
_SETTINGS = {"quantization": "int8", "quantize_lm_head": True}


@dataclass(frozen=True, slots=True)
class QuantizedFigures:
    """None where it was not measured."""

    int8_decode_speedup: float | None = None
    """Tokens per second at batch 1, over those of the unquantized weights."""
    int8_perplexity_change: float | None = None
    """Relative: 0.01 is one per cent worse."""


def measure_quantized(directory: Path, context: int, num_steps: int) -> QuantizedFigures:
    """Measures weight-only int8, output layer included, against bfloat16 on CPU."""
    workload = Workload((1,), context, context, num_steps, _NUM_ROUNDS)
    quantization = Quantization("int8", has_lm_head=True)
    return QuantizedFigures(
        int8_decode_speedup=round(decode_speedup(directory, _SETTINGS, workload), 3),
        int8_perplexity_change=round(perplexity_change(quantization), 5),
    )
