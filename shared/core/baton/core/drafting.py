"""How many tokens to draft: as many as pay for themselves.

A step with k drafts gives 1 + a + a^2 + ... + a^k tokens on average, where a is the share of drafts
that the target accepts. It costs the target's time, more for each token that it verifies, and the
draft's. The best k maximises tokens per second; in a large batch, where every token costs, it is 0.
Drafts never change the output, so the measured times that this rests on need not be repeatable.
"""

from __future__ import annotations

from dataclasses import dataclass, field

_DECAY = 0.97
"""Weight of the past at each measurement of a cost: the last 30 or so count."""
_LEARNING_RATE = 0.08
"""Weight of one draft's outcome: the last 12 or so count."""
_FIRST_ACCEPTANCE = 0.7
_DRAFT_SHARE = 0.2
"""What a draft step is taken to cost of a target's until it was measured."""
_PROBE_INTERVAL = 32
"""Steps without drafts after which one token is drafted, to see whether drafts have become good."""


@dataclass(slots=True)
class LinearCost:
    """Seconds of a forward as `base_s + num_rows * row_s`, fitted to the latest measurements."""

    _weight: float = 0.0
    _rows: float = 0.0
    _seconds: float = 0.0
    _rows_rows: float = 0.0
    _rows_seconds: float = 0.0

    @property
    def is_known(self) -> bool:
        """Whether there is a measurement."""
        return self._weight > 0.0

    def observe(self, num_rows: float, seconds: float) -> None:
        """Takes one forward into account."""
        self._weight = self._weight * _DECAY + 1.0
        self._rows = self._rows * _DECAY + num_rows
        self._seconds = self._seconds * _DECAY + seconds
        self._rows_rows = self._rows_rows * _DECAY + num_rows * num_rows
        self._rows_seconds = self._rows_seconds * _DECAY + num_rows * seconds

    def fit(self) -> tuple[float, float]:
        """`base_s` and `row_s`, neither negative. Rows are free until their number has varied."""
        if not self._weight:
            return 0.0, 0.0
        rows, seconds = self._rows / self._weight, self._seconds / self._weight
        variance = self._rows_rows / self._weight - rows * rows
        if variance <= 1e-6 * rows * rows:
            return seconds, 0.0
        covariance = self._rows_seconds / self._weight - rows * seconds
        row_s = min(max(0.0, covariance / variance), seconds / rows)
        return seconds - row_s * rows, row_s


@dataclass(slots=True)
class DraftCosts:
    """What steps cost on this machine: forwards of the target and of the draft."""

    target: LinearCost = field(default_factory=LinearCost)
    draft: LinearCost = field(default_factory=LinearCost)
    """Of one draft token for each row."""

    def per_sequence(self, num_seqs: int, *, is_draft_free: bool) -> tuple[float, float]:
        """One sequence's share of a step without drafts, and what each draft adds to it.

        With `is_draft_free` drafts are looked up, and only their verification costs.
        """
        if not self.target.is_known:
            return 1.0, 0.0 if is_draft_free else _DRAFT_SHARE
        base_s, row_s = self.target.fit()
        plain = base_s / num_seqs + row_s
        if is_draft_free:
            return plain, row_s
        if not self.draft.is_known:
            return plain, row_s + _DRAFT_SHARE * plain
        draft_base_s, draft_row_s = self.draft.fit()
        return plain, row_s + draft_base_s / num_seqs + draft_row_s


def best_length(acceptance: float, plain: float, per_draft: float, max_length: int) -> int:
    """Drafts that give the most tokens per cost; the fewest of equals.

    Args:
        acceptance: share of drafts that are accepted, each given those before it.
        plain: cost of a step without drafts.
        per_draft: what each draft adds to it.
        max_length: most that is allowed.
    """
    best, best_rate = 0, 1.0 / plain if plain > 0 else 0.0
    tokens, survival = 1.0, 1.0
    for length in range(1, max_length + 1):
        survival *= acceptance
        tokens += survival
        cost = plain + length * per_draft
        if cost > 0 and tokens / cost > best_rate * (1.0 + 1e-9):
            best, best_rate = length, tokens / cost
    return best


@dataclass(slots=True)
class Acceptance:
    """How often one sequence's drafts are accepted, lately."""

    share: float = _FIRST_ACCEPTANCE
    num_steps_without: int = 0
    """Steps since the last draft."""

    def observe(self, num_proposed: int, num_accepted: int) -> None:
        """Says what became of drafts. Those behind the first rejected one tell nothing."""
        self.num_steps_without = 0
        for outcome in [1.0] * num_accepted + [0.0] * (num_accepted < num_proposed):
            self.share += _LEARNING_RATE * (outcome - self.share)

    def next_length(self, plain: float, per_draft: float, max_length: int) -> int:
        """Drafts to propose in the next step."""
        length = best_length(self.share, plain, per_draft, max_length)
        if length == 0 and max_length > 0:
            self.num_steps_without += 1
            # Where even perfect drafts would not pay there is nothing to learn.
            if self.num_steps_without >= _PROBE_INTERVAL and best_length(1.0, plain, per_draft, 1):
                return 1
        return length
