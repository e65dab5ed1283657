"""How fast an engine computes, smoothed over its steps."""

from __future__ import annotations

from dataclasses import dataclass

_SMOOTHING = 0.2
"""Weight of the newest step in measured speeds."""


@dataclass(slots=True)
class Speeds:
    """Measured speeds, 0 until known."""

    prefill_tokens_per_s: float = 0.0
    decode_step_s: float = 0.0

    def observe(self, num_prefill_tokens: int, num_tokens: int, step_s: float) -> None:
        """Takes one step into account."""
        if not num_prefill_tokens:
            self.decode_step_s = _smooth(self.decode_step_s, step_s)
        elif num_prefill_tokens * 2 >= num_tokens and step_s > 0:
            rate = num_prefill_tokens / step_s
            self.prefill_tokens_per_s = _smooth(self.prefill_tokens_per_s, rate)


def _smooth(old: float, new: float) -> float:
    return new if old == 0.0 else old + _SMOOTHING * (new - old)
