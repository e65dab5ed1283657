"""What a load test measured, as the client saw it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

SHARES = (0.5, 0.9, 0.95, 0.99)


@dataclass(frozen=True, slots=True)
class Sample:
    """One request that went well."""

    ttft_s: float
    elapsed_s: float
    num_prompt_tokens: int
    num_tokens: int

    @property
    def tpot_s(self) -> float:
        """Seconds per token after the first."""
        return (self.elapsed_s - self.ttft_s) / max(1, self.num_tokens - 1)


@dataclass(frozen=True, slots=True)
class LatencyTarget:
    """A request is good when both of its times are within these."""

    ttft_s: float
    tpot_s: float

    def is_met(self, sample: Sample) -> bool:
        """True for a good request."""
        return sample.ttft_s <= self.ttft_s and sample.tpot_s <= self.tpot_s


@dataclass(slots=True)
class Tally:
    """All requests of a load test so far."""

    samples: list[Sample] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    """By reason."""
    num_running: int = 0
    num_started: int = 0
    num_skipped: int = 0
    """Arrivals that were not sent, because too many requests were running."""


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all (at least one) do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def summary(tally: Tally, took_s: float, target: LatencyTarget) -> dict[str, Any]:
    """The figures as one JSON document; times in milliseconds."""
    samples = tally.samples
    good = sum(map(target.is_met, samples))
    took_s = max(took_s, 1e-9)
    document: dict[str, Any] = {
        "duration_s": round(took_s, 3),
        "requests": {
            "ok": len(samples),
            "failed": dict(tally.failures),
            "skipped": tally.num_skipped,
        },
        "requests_per_s": len(samples) / took_s,
        "prompt_tokens_per_s": sum(sample.num_prompt_tokens for sample in samples) / took_s,
        "output_tokens_per_s": sum(sample.num_tokens for sample in samples) / took_s,
        "goodput": {
            "ttft_target_ms": target.ttft_s * 1e3,
            "tpot_target_ms": target.tpot_s * 1e3,
            "requests_per_s": good / took_s,
            "share": good / max(1, len(samples) + tally.failures.total() + tally.num_skipped),
        },
    }
    for name, values in series(samples).items():
        document[f"{name}_ms"] = {
            "mean": sum(values) / len(values) * 1e3,
            **{f"p{share * 100:g}": percentile(values, share) * 1e3 for share in SHARES},
            "max": max(values) * 1e3,
        }
    return document


def series(samples: Sequence[Sample]) -> dict[str, list[float]]:
    """The measured times in seconds, by name; empty without samples."""
    if not samples:
        return {}
    return {
        "ttft": [sample.ttft_s for sample in samples],
        "tpot": [sample.tpot_s for sample in samples],
        "e2e": [sample.elapsed_s for sample in samples],
    }
