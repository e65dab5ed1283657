"""What rounding gains in speed: every variant takes turns, so that all see the same machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.engine.floors import Floors
from benchmarks.engine.measure import Bench, DecodeTimes, PrefillTimes

_MARGIN_TOKENS = 320
"""What a sequence may grow by while it is measured."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What is timed."""

    batches: Sequence[int]
    context: int
    prompt: int
    num_steps: int
    """Decode steps per batch and round; a third as many prompts."""
    num_rounds: int


@dataclass(slots=True)
class Speed:
    """One variant's times."""

    decode: dict[int, DecodeTimes]
    """By batch."""
    prefill: PrefillTimes

    def tokens_per_s(self, batch: int) -> float:
        """Output tokens per second of a batch."""
        return self.decode[batch].tokens_per_s

    @property
    def prompt_tokens_per_s(self) -> float:
        """Prompt tokens per second."""
        return self.prefill.num_tokens / median(self.prefill.step_s)


def measure_speed(
    variants: Mapping[str, tuple[Path, dict[str, Any]]], workload: Workload
) -> dict[str, Speed]:
    """Times engines: each variant is a model's folder and more of EngineConfig's settings."""
    floors = Floors(torch.device("cpu"), torch.bfloat16)
    length = max(workload.context, workload.prompt) + _MARGIN_TOKENS
    # For blocks of 16 tokens.
    num_blocks = max(workload.batches) * (-(-length // 16) + 1)
    benches: dict[str, Bench] = {}
    speeds: dict[str, Speed] = {}
    try:
        for name, (directory, settings) in variants.items():
            common = {
                "device": "cpu",
                "dtype": "bfloat16",
                "num_blocks": num_blocks,
                "max_num_batched_tokens": max(workload.prompt, 512),
                "num_threads": torch.get_num_threads(),
            }
            benches[name] = Bench(directory, floors, settings={**common, **settings})
            decode = {batch: DecodeTimes(batch, workload.context) for batch in workload.batches}
            speeds[name] = Speed(decode, PrefillTimes(workload.prompt))
        for _ in range(workload.num_rounds):
            for batch in workload.batches:
                for name, bench in benches.items():
                    bench.decode(speeds[name].decode[batch], workload.num_steps)
            for name, bench in benches.items():
                bench.prefill(speeds[name].prefill, max(1, workload.num_steps // 3))
    finally:
        for bench in benches.values():
            bench.close()
    return speeds


def decode_speedup(directory: Path, settings: dict[str, Any], workload: Workload) -> float:
    """Output tokens per second with `settings`, over those of the model as it is.

    Taken round by round at the first of the workload's batches; the median of the ratios.
    """
    speeds = measure_speed({"plain": (directory, {}), "changed": (directory, settings)}, workload)
    batch = workload.batches[0]
    plain, changed = (speeds[name].decode[batch].step_s for name in ("plain", "changed"))
    size = workload.num_steps
    return median(
        median(plain[start : start + size]) / median(changed[start : start + size])
        for start in range(0, len(plain), size)
    )
