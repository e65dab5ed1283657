"""A simulated worker: the policy must come close to whatever fixed number of drafts is the best."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from baton.core.draft_policy import Acceptance, DraftCandidate, DraftPolicy, TypicalAcceptance
from tests.support.tiers import representatives

MOST = 4
NUM_WARM_UP, NUM_STEPS = 400, 600
SHAPES: dict[str, Callable[[float], float]] = {
    "flat": lambda rows: 1.0 + 0.001 * rows,
    "steep": lambda rows: 0.3 + 0.2 * rows,
    "flat, then a line": lambda rows: max(1.0, rows / 8) + 0.1,
    "stairs": lambda rows: 0.5 + 0.5 * math.ceil(rows / 16),
}


@dataclass(frozen=True)
class World:
    """What is true, and not known to the policy."""

    shape: str
    num_seqs: int
    share: float
    """Of drafts that are accepted."""
    draft_cost: float
    """Of a round for one sequence, beside a step of the target for one; 0: looked up."""
    is_disturbed: bool = False

    def target_s(self, rows: float) -> float:
        return SHAPES[self.shape](rows)

    def draft_s(self, rows: float) -> float:
        return self.draft_cost * (0.8 * self.target_s(1) + 0.2 * self.target_s(rows))

    def tokens(self, length: int) -> float:
        return sum(self.share**depth for depth in range(length + 1))

    def fixed_rate(self, length: int) -> float:
        seconds = self.target_s(self.num_seqs * (1 + length))
        seconds += length * self.draft_s(self.num_seqs)
        return self.num_seqs * self.tokens(length) / seconds

    def noise(self, rng: random.Random, step: int) -> float:
        """What measuring adds: the first steps are slow, and the machine has other work."""
        factor = 3.0 if step < 5 else 1.0
        if self.is_disturbed:
            factor *= math.exp(rng.gauss(0.0, 0.25)) * (2.5 if step // 150 % 2 else 1.0)
            factor *= rng.uniform(2.0, 8.0) if rng.random() < 0.05 else 1.0
        return factor


def _share_of_best(world: World) -> float:
    """Tokens per second of the policy, beside those of the best fixed number."""
    rng, policy, typical = random.Random(1), DraftPolicy(), TypicalAcceptance()
    candidates = [
        DraftCandidate(Acceptance(typical), MOST, is_free=not world.draft_cost)
        for _ in range(world.num_seqs)
    ]
    tokens = seconds = 0.0
    for step in range(NUM_WARM_UP + NUM_STEPS):
        lengths = policy.lengths(world.num_seqs, candidates)
        rounds = [sum(length > index for length in lengths) for index in range(max(lengths))]
        draft_s = sum(map(world.draft_s, rounds)) if world.draft_cost else 0.0
        if draft_s:
            mean_s = draft_s / len(rounds) * world.noise(rng, step)
            policy.observe_draft(sum(rounds) / len(rounds), mean_s)
        target_s = world.target_s(world.num_seqs + sum(lengths))
        policy.observe_target(world.num_seqs + sum(lengths), target_s * world.noise(rng, step))
        for candidate, length in zip(candidates, lengths, strict=True):
            outcomes = [rng.random() < world.share for _ in range(length)]
            if outcomes:
                candidate.acceptance.observe(length, [*outcomes, False].index(False))
        if step >= NUM_WARM_UP:
            seconds += draft_s + target_s
            tokens += sum(map(world.tokens, lengths))
    return tokens / seconds / max(map(world.fixed_rate, range(MOST + 1)))


def _shares(shape: str, *, is_disturbed: bool) -> dict[World, float]:
    worlds = [
        World(shape, num_seqs, share, draft_cost, is_disturbed)
        for num_seqs in (1, 4, 16)
        for share in (0.3, 0.6, 0.9)
        for draft_cost in (0.0, 0.1, 0.4)
    ]
    return {world: _share_of_best(world) for world in worlds}


@pytest.mark.parametrize("shape", representatives(SHAPES, {"stairs"}))
def test_it_is_as_good_as_the_best_fixed_number_of_drafts(shape: str) -> None:
    shares = _shares(shape, is_disturbed=False)
    assert min(shares.values()) > 0.94, min(shares, key=shares.__getitem__)
    assert sum(shares.values()) / len(shares) > 0.98


@pytest.mark.parametrize("shape", representatives(SHAPES, {"steep"}))
def test_it_stays_close_when_the_machine_is_disturbed(shape: str) -> None:
    """By a quarter at random, by some steps of many times that, and by slow phases."""
    shares = _shares(shape, is_disturbed=True)
    assert min(shares.values()) > 0.85, min(shares, key=shares.__getitem__)
    assert sum(shares.values()) / len(shares) > 0.95
