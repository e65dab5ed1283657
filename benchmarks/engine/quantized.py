"""What int8 changes: speed at batch 1, and perplexity of the demo model on held-out text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class QuantizedFigures:
    """None where it was not measured."""

    int8_decode_speedup: float | None = None
    """Tokens per second at batch 1, over those of the unquantized weights."""
    int8_perplexity_change: float | None = None
    """Relative: 0.01 is one per cent worse."""


def measure_quantized(model: str, context: int, num_steps: int) -> QuantizedFigures:
    """Measures int8 against the model's own dtype; nothing yet, the engine has no int8."""
    del model, context, num_steps
    return QuantizedFigures()
