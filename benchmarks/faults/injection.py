"""What goes wrong with a hand-off: one fault each, drawn at random."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

LEASE_S = 2.0
"""Of a decode worker's reservations, and the silence that ends a push there."""
TIMEOUT_S = 30.0
"""Deadline of a request, where a short one is not its fault."""
WEIGHTS = {
    "kill_prefill": 15,
    "kill_decode": 15,
    "drop_chunk": 110,
    "drop_manifest": 90,
    "delay": 60,
    "corrupt": 130,
    "duplicate": 120,
    "reorder": 120,
    "stale_epoch": 110,
    "cancel": 140,
    "deadline": 90,
}
"""Per thousand hand-offs. A kill costs seconds of a core, for the worker that replaces the dead one
has to start; a delay lasts longer than the lease."""
_MAX_CHUNK = 3
"""Prompts have more chunks than this, but where a cache has most of one."""


@dataclass(frozen=True, slots=True)
class Injection:
    """A fault. Times count from the request's start."""

    kind: str
    faults: str = ""
    """For the prefill worker: see tests.support.faults."""
    kill_role: str = ""
    kill_after_s: float = 0.0
    cancel_after_s: float | None = None
    cancel_after_tokens: int | None = None
    timeout_s: float = TIMEOUT_S


def draw(rng: Random) -> Injection:
    """A random fault."""
    kind = rng.choices([*WEIGHTS], weights=[*WEIGHTS.values()])[0]
    return make(kind, rng)


def make(kind: str, rng: Random) -> Injection:
    """A fault of a kind."""
    chunk = rng.randint(0, _MAX_CHUNK)
    match kind:
        case "kill_prefill" | "kill_decode":
            role = kind.removeprefix("kill_")
            return Injection(kind, kill_role=role, kill_after_s=rng.uniform(0.0, 0.25))
        case "delay":
            name = rng.choice(["silent_s", "delay_start_s"])
            return Injection(kind, f"{name}={rng.uniform(1.1, 1.6) * LEASE_S:.3f}")
        case "cancel":
            if rng.random() < 0.5:
                return Injection(kind, cancel_after_s=rng.uniform(0.0, 0.3))
            return Injection(kind, cancel_after_tokens=rng.randint(1, 12))
        case "deadline":
            return Injection(kind, timeout_s=rng.uniform(0.005, 0.25))
        case "drop_manifest":
            return Injection(kind, "drop_manifest")
        case "stale_epoch":
            return Injection(kind, "wrong_epoch")
        case _:
            name = kind.removesuffix("_chunk")
            return Injection(kind, f"{name}_chunk={chunk}")
