"""How many tokens to draft: as many as pay for themselves.

A step with up to k drafts for each sequence gives, on average, a token for each of them, and as
many more as there are drafts accepted. It costs the target's time, which depends on how many tokens
it verifies, and the draft's for each of k rounds. The best k gives the most tokens per second; in a
large batch, where every token costs, it is 0. Drafts never change the output, so the measured times
that this rests on need not be repeatable.

The sequences of a step share its rounds, so k is one decision for all of them; one whose drafts are
worth less than the rows that they take gets fewer.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

_FIRST_SHARE = 0.7
_MAX_DEPTH = 16
"""Drafts behind this one are assumed to be accepted as often as this one."""
_TYPICAL_RATE = 0.01
"""Weight of one draft's outcome for all sequences: the last 100 or so count."""
_OWN_RATE = 0.04
"""The same for one sequence: 25 or so."""
_OWN_PRIOR = 12.0
"""Outcomes that a sequence's own have to outweigh."""
_OWN_FADING = 0.98
"""What is left of a sequence's own outcomes after a step without drafts."""
_DRAFT_SHARE = 0.2
"""What a draft step is taken to cost of a target's until it was measured."""
_PROBE_INTERVAL = 32
"""Steps without drafts after which one token is drafted, to see whether drafts have become good."""
_CELLS_PER_E = 8.0
"""Numbers of rows that differ by less than an eighth share a cell, beyond 8 rows."""
_MAX_COUNT = 32
_TRUST_STEPS = 5.0
"""A cell is trusted for about this many steps for each time that it was measured."""
_OPTIMISM = 0.25
"""Weight of the least possible cost beside that of one fresh measurement."""
_MAX_GAP = 1.5
"""Between cells farther apart than this nothing is known."""
_MAX_RATIO = 1.5
"""A step that took longer than this times what was expected was disturbed: it counts as this."""
_LEVEL_RATE = 0.1


@dataclass(slots=True)
class _Cell:
    """Mean cost of forwards of about as many rows."""

    rows: float
    cost: float
    count: int = 0
    at_step: int = 0

    def weight(self, step: int) -> float:
        age = step - self.at_step
        return max(1e-3, self.count * math.exp(-age / (_TRUST_STEPS * max(1, self.count))))


class CostTable:
    """Cost of a forward by its number of rows, whatever its shape: flat, a line, stairs.

    It never falls with more rows. What was not measured, or long ago, is taken to be as cheap as it
    could be: then it is tried when that would make it the best choice, and is known. So nothing
    stays out of use because it was slow once, and what could not pay anyway is not tried.
    """

    def __init__(self) -> None:
        self._cells: dict[int, _Cell] = {}
        self._knots: list[tuple[float, float]] = []
        self._knots_step = -1

    def observe(self, rows: float, cost: float, step: int) -> None:
        """Takes a forward into account. The first of its size is not: it set things up."""
        self._knots_step = -1
        cell = self._cells.get(_key(rows))
        if cell is None:
            self._cells[_key(rows)] = _Cell(rows, cost)
            return
        if cell.count == 1:
            cell.cost = min(cell.cost, _MAX_RATIO * cost)
        if cell.count:
            cost = min(cost, _MAX_RATIO * cell.cost)
        cell.count = min(cell.count + 1, _MAX_COUNT)
        cell.at_step = step
        cell.rows += (rows - cell.rows) / cell.count
        cell.cost += (cost - cell.cost) / cell.count

    def known(self, rows: float) -> float | None:
        """What forwards of this size cost, if there were several."""
        cell = self._cells.get(_key(rows))
        return cell.cost if cell is not None and cell.count > 1 else None

    def estimate(self, rows: float, step: int) -> float | None:
        """What a forward would cost; None if there was none."""
        if step != self._knots_step:
            self._knots, self._knots_step = self._make_knots(step), step
        knots = self._knots
        if not knots:
            return None
        index = bisect_left(knots, (rows, 0.0))
        if index == 0:
            return knots[0][1] * rows / knots[0][0]
        low_rows, low = knots[index - 1]
        if index == len(knots):
            return low
        high_rows, high = knots[index]
        if high_rows > _MAX_GAP * low_rows and _key(rows) != _key(high_rows):
            return low
        return low + (high - low) * (rows - low_rows) / (high_rows - low_rows)

    def _make_knots(self, step: int) -> list[tuple[float, float]]:
        """Rows and their costs: what was measured, as far as it is trusted."""
        # Neighbours that fall with rows are pooled (isotonic regression).
        pools: list[tuple[float, float, list[_Cell]]] = []
        for _, cell in sorted(self._cells.items()):
            if not cell.count:
                continue
            weight, cost, cells = cell.weight(step), cell.cost, [cell]
            while pools and pools[-1][1] >= cost:
                more, other, before = pools.pop()
                cost = (weight * cost + more * other) / (weight + more)
                weight, cells = weight + more, before + cells
            pools.append((weight, cost, cells))
        knots, least = [], 0.0
        for _, cost, cells in pools:
            for cell in cells:
                weight = cell.weight(step)
                least = (weight * cost + _OPTIMISM * least) / (weight + _OPTIMISM)
                knots.append((cell.rows, least))
        return knots


def _key(rows: float) -> int:
    return round(math.log(rows) * _CELLS_PER_E)


class TypicalAcceptance:
    """How often drafts of one source are accepted, over all sequences, by depth."""

    def __init__(self) -> None:
        self.shares = [_FIRST_SHARE] * _MAX_DEPTH
        """Of the drafts at each depth, given that those before were accepted."""
        self.found_share = 1.0
        """Of the times when drafts were asked for, those with any."""
        self._counts = [8] * _MAX_DEPTH

    def observe_found(self, *, is_found: bool) -> None:
        """Records whether a request for drafts found any."""
        self.found_share += _TYPICAL_RATE * (is_found - self.found_share)

    def observe(self, num_proposed: int, num_accepted: int) -> None:
        """Records accepted drafts. Those behind the first rejected one carry no information."""
        for depth in range(min(num_accepted + 1, num_proposed, _MAX_DEPTH)):
            outcome = 1.0 if depth < num_accepted else 0.0
            # The last one stands for those that were not proposed.
            end = depth + 1 if depth + 1 < num_proposed else _MAX_DEPTH
            for index in range(depth, end):
                self._counts[index] += 1
                rate = max(_TYPICAL_RATE, 1.0 / self._counts[index])
                self.shares[index] += rate * (outcome - self.shares[index])


class Acceptance:
    """How often one sequence's drafts are accepted, lately: what is typical, and its own part."""

    def __init__(self, typical: TypicalAcceptance) -> None:
        self.typical = typical
        self._surplus = 0.0
        """Accepted drafts beyond what is typical."""
        self._count = 0.0

    def observe(self, num_proposed: int, num_accepted: int) -> None:
        """Records how many drafts were accepted."""
        for depth in range(min(num_accepted + 1, num_proposed)):
            share = self.typical.shares[min(depth, _MAX_DEPTH - 1)]
            outcome = 1.0 if depth < num_accepted else 0.0
            self._surplus += outcome - share - _OWN_RATE * self._surplus
            self._count += 1.0 - _OWN_RATE * self._count
        self.typical.observe(num_proposed, num_accepted)

    def rest(self) -> None:
        """Records a step without drafts: earlier outcomes lose weight."""
        self._surplus *= _OWN_FADING
        self._count *= _OWN_FADING

    def survivals(self, length: int) -> list[float]:
        """For each of `length` drafts, how likely it is accepted along with those before."""
        own = self._surplus / (self._count + _OWN_PRIOR)
        survivals, survival = [], 1.0
        for depth in range(length):
            share = self.typical.shares[min(depth, _MAX_DEPTH - 1)] + own
            survival *= min(1.0, max(0.0, share))
            survivals.append(survival)
        return survivals


@dataclass(frozen=True, slots=True)
class DraftCandidate:
    """A sequence that may get drafts in the next step."""

    acceptance: Acceptance
    max_length: int
    is_free: bool
    """Its drafts are looked up: only their verification costs."""


@dataclass(frozen=True, slots=True)
class _Round:
    """What one more round of drafts would take and give, over the sequences that take part."""

    tokens: float
    rows: float
    """Tokens to verify."""
    draft_rows: int
    """Tokens that the draft model makes."""


class DraftPolicy:
    """Learns what steps cost, and says how many drafts to propose."""

    def __init__(self) -> None:
        self._target = CostTable()
        self._draft = CostTable()
        self._level_s = 0.0
        """What costs are measured in: it follows a machine that gets faster or slower, while the
        tables keep what that does not change."""
        self._num_steps = 0
        self._num_steps_without = 0

    def observe_target(self, rows: int, seconds: float) -> None:
        """Records the time of a step over sequences and their drafts, without the draft model's."""
        self._num_steps += 1
        self._level_s = self._level_s or seconds
        known = self._target.known(rows)
        if known and self._level_s:
            ratio = min(seconds / self._level_s / known, _MAX_RATIO)
            self._level_s *= 1.0 + _LEVEL_RATE * (ratio - 1.0)
        if self._level_s:
            self._target.observe(rows, seconds / self._level_s, self._num_steps)

    def observe_draft(self, rows: float, seconds: float) -> None:
        """Records the time of one round of the draft model, a token for each sequence."""
        if self._level_s:
            self._draft.observe(rows, seconds / self._level_s, self._num_steps)

    def lengths(self, num_seqs: int, candidates: Sequence[DraftCandidate]) -> list[int]:
        """Most drafts for each candidate, in a step of `num_seqs` sequences that decode."""
        survivals = [one.acceptance.survivals(one.max_length) for one in candidates]
        wanted = [one.max_length for one in candidates]
        rounds = _rounds(candidates, survivals, wanted)
        best = self._best_length(num_seqs, rounds)
        if best:
            self._num_steps_without = 0
            # What a row must give to be worth its cost, at the rate that is reached.
            floor = self._row_value(num_seqs, rounds[:best])
            wanted = [sum(share > floor for share in shares) for shares in survivals]
            best = self._best_length(num_seqs, _rounds(candidates, survivals, wanted))
        lengths = [min(best, most) for most in wanted]
        if best == 0 and self._is_probe_due(num_seqs, candidates):
            lengths = [min(1, one.max_length) for one in candidates]
        for candidate, length in zip(candidates, lengths, strict=True):
            if not length:
                candidate.acceptance.rest()
        return lengths

    def _best_length(self, num_seqs: int, rounds: Sequence[_Round]) -> int:
        """Rounds that give the most tokens per cost; the fewest of equals."""
        best, best_rate = 0, self._rate(num_seqs, ())
        for length in range(1, len(rounds) + 1):
            rate = self._rate(num_seqs, rounds[:length])
            if rate > best_rate * (1.0 + 1e-9):
                best, best_rate = length, rate
        return best

    def _row_value(self, num_seqs: int, rounds: Sequence[_Round]) -> float:
        """Tokens that the time for one more row gives elsewhere."""
        rows = sum(one.rows for one in rounds)
        row_cost = (self._target_cost(num_seqs + rows) - self._target_cost(num_seqs)) / rows
        return self._rate(num_seqs, rounds) * row_cost

    def _is_probe_due(self, num_seqs: int, candidates: Sequence[DraftCandidate]) -> bool:
        """Whether to draft one token, since all went without for a while."""
        self._num_steps_without += bool(candidates)
        if self._num_steps_without < _PROBE_INTERVAL:
            return False
        self._num_steps_without = 0
        perfect = _rounds(candidates, [[1.0]] * len(candidates), [1] * len(candidates))
        # Where even perfect drafts would not pay there is nothing to learn.
        return self._rate(num_seqs, perfect) > self._rate(num_seqs, ())

    def _rate(self, num_seqs: int, rounds: Sequence[_Round]) -> float:
        """Tokens per cost with these rounds."""
        cost = self._target_cost(num_seqs + sum(one.rows for one in rounds))
        cost += sum(self._draft_cost(one.draft_rows) for one in rounds)
        return (num_seqs + sum(one.tokens for one in rounds)) / max(cost, 1e-9)

    def _target_cost(self, rows: float) -> float:
        found = self._target.estimate(rows, self._num_steps)
        return 1.0 if found is None else found

    def _draft_cost(self, rows: int) -> float:
        if not rows:
            return 0.0
        found = self._draft.estimate(rows, self._num_steps)
        return _DRAFT_SHARE * self._target_cost(rows) if found is None else found


def _rounds(
    candidates: Sequence[DraftCandidate],
    survivals: Sequence[Sequence[float]],
    wanted: Sequence[int],
) -> list[_Round]:
    rounds = []
    for index in range(max(wanted, default=0)):
        taking_part = [
            (candidate.acceptance.typical.found_share, shares[index], candidate.is_free)
            for candidate, shares, most in zip(candidates, survivals, wanted, strict=True)
            if index < most
        ]
        tokens = sum(found * share for found, share, _ in taking_part)
        rows = sum(found for found, _, _ in taking_part)
        rounds.append(_Round(tokens, rows, sum(not is_free for _, _, is_free in taking_part)))
    return rounds
