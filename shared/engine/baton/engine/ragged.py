"""A flat batch of rows with different lengths, cut into groups that attention handles at once.

Rows arrive sorted (see `RowSpan`), so that every group of similar rows is a slice of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch

MAX_FOLDED_QUERIES = 16
"""Rows with at most this many tokens are attended many at once, with the query heads of one KV head
folded into the query axis: 5 to 14 times faster than `enable_gqa` with one query row (2 cores,
Nov 2026)."""
_MIN_SPLIT_BLOCKS = 8
_MAX_PADDING = 0.4
"""Share of a row's blocks in a group that may be padding."""


@dataclass(frozen=True, slots=True)
class RowSpan:
    """One sequence's tokens in a flat batch, sorted by `sort_key` within it."""

    start: int
    """Position of the first token."""
    num_tokens: int
    block_table: Sequence[int]

    @property
    def end(self) -> int:
        """Tokens in context, those computed now included."""
        return self.start + self.num_tokens

    @property
    def sort_key(self) -> tuple[int, int]:
        """Rows of equal length next to each other, the longest context first."""
        return self.num_tokens, -self.end


class RowGroup:
    """Rows with equally many tokens and similar context: a slice of the batch."""

    def __init__(
        self, rows: Sequence[RowSpan], token_start: int, window: int | None, block_size: int
    ) -> None:
        self.num_rows = len(rows)
        self.num_queries = rows[0].num_tokens
        self.token_start = token_start
        self.token_end = token_start + self.num_rows * self.num_queries
        self._rows = rows
        self._window = window
        # Blocks that the window has left behind are not gathered.
        firsts = [0 if window is None else max(0, row.start - window + 1) for row in rows]
        self._block_starts = [first // block_size for first in firsts]
        tables = [
            row.block_table[start : -(-row.end // block_size)]
            for row, start in zip(rows, self._block_starts, strict=True)
        ]
        width = max(len(table) for table in tables)
        self._key_starts = [start * block_size for start in self._block_starts]
        spans = {row.end - start for row, start in zip(rows, self._key_starts, strict=True)}
        is_aligned = len(spans) == 1
        self.num_keys = spans.pop() if is_aligned else width * block_size
        sees_all = window is None or all(row.end <= window for row in rows)
        self.is_causal = is_aligned and sees_all and rows[0].start == 0
        """Plain causal attention from position 0."""
        self.needs_mask = not (
            is_aligned
            and self.num_queries == 1
            and (window is None or all(row.end - k <= window for row, k in self._row_keys()))
        )
        ends = torch.tensor([row.end - start for row, start in self._row_keys()]).view(-1, 1)
        is_unused = torch.arange(self.num_keys) >= ends
        self.unused_slots = is_unused.flatten().nonzero().flatten()
        """Keys behind the rows' own: other sequences' leftovers, whose NaN would pass a mask."""
        padded = [block for table in tables for block in (*table, *[0] * (width - len(table)))]
        self.block_index = torch.tensor(padded, dtype=torch.int64)
        self._mask: torch.Tensor | None = None

    def mask(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Additive mask, [num_rows, 1, num_queries, num_keys]: 0 or -inf."""
        if self._mask is None:
            starts = torch.tensor([row.start for row in self._rows]).view(-1, 1, 1, 1)
            queries = starts + torch.arange(self.num_queries).view(1, 1, -1, 1)
            keys = torch.tensor(self._key_starts).view(-1, 1, 1, 1) + torch.arange(self.num_keys)
            is_seen = keys <= queries
            if self._window is not None:
                is_seen &= keys > queries - self._window
            mask = torch.zeros(is_seen.shape, dtype=dtype)
            self._mask = mask.masked_fill_(~is_seen, -torch.inf).to(device)
        return self._mask

    def _row_keys(self) -> zip[tuple[RowSpan, int]]:
        return zip(self._rows, self._key_starts, strict=True)


@dataclass(frozen=True, slots=True)
class PagedRows:
    """Rows as kernels for variable lengths take them. All tensors are int32."""

    query_starts: torch.Tensor
    """Sums of the rows' numbers of tokens, from 0, [num_rows + 1]."""
    context_starts: torch.Tensor
    """Sums of the rows' numbers of keys, from 0, [num_rows + 1]."""
    context_lens: torch.Tensor
    """Keys that each row has, [num_rows]."""
    block_table: torch.Tensor
    """[num_rows, most blocks of a row]; what lies behind a row's own blocks is not read."""
    max_num_queries: int
    max_context_len: int


def make_paged_rows(
    rows: Sequence[RowSpan], block_size: int, device: torch.device | str
) -> PagedRows:
    """Tables of rows, on a device."""

    def table(values: Sequence[object]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    tables = [list(row.block_table[: -(-row.end // block_size)]) for row in rows]
    width = max(len(blocks) for blocks in tables)
    return PagedRows(
        query_starts=table([0, *accumulate(row.num_tokens for row in rows)]),
        context_starts=table([0, *accumulate(row.end for row in rows)]),
        context_lens=table([row.end for row in rows]),
        block_table=table([[*blocks, *[0] * (width - len(blocks))] for blocks in tables]),
        max_num_queries=max(row.num_tokens for row in rows),
        max_context_len=max(row.end for row in rows),
    )


class AttentionBatch:
    """Where the tokens of one step go, and what they see. Shared by all layers."""

    def __init__(self, rows: Sequence[RowSpan], block_size: int, device: torch.device) -> None:
        self._rows = rows
        self._block_size = block_size
        self._device = device
        self._groups: dict[int | None, list[RowGroup]] = {}
        slots = [
            row.block_table[position // block_size] * block_size + position % block_size
            for row in rows
            for position in range(row.start, row.end)
        ]
        self.slots = torch.tensor(slots, dtype=torch.int64, device=device)
        """Slot of each token in the pool, int64 [num_tokens]."""

    @classmethod
    def of_tables(cls, slots: torch.Tensor, paged_rows: PagedRows) -> AttentionBatch:
        """A batch whose tables are there already; only for kernels that take `paged_rows`."""
        batch = cls((), 1, slots.device)
        batch.slots = slots
        batch.paged_rows = paged_rows
        return batch

    @cached_property
    def paged_rows(self) -> PagedRows:
        """The rows, for kernels that read the pool in place."""
        return make_paged_rows(self._rows, self._block_size, self._device)

    @cached_property
    def largest_block(self) -> int:
        """Largest block id of any row."""
        return int(self.paged_rows.block_table.max())

    def groups(self, window: int | None) -> list[RowGroup]:
        """The rows, grouped for layers with a window."""
        found = self._groups.get(window)
        if found is None:
            found = self._make_groups(window)
            self._groups[window] = found
        return found

    def _make_groups(self, window: int | None) -> list[RowGroup]:
        groups: list[RowGroup] = []
        token_start = 0
        pending: list[RowSpan] = []
        for row in (*self._rows, None):
            if pending and (row is None or not self._fits(pending[0], row)):
                group = RowGroup(pending, token_start, window, self._block_size)
                group.block_index = group.block_index.to(self._device)
                group.unused_slots = group.unused_slots.to(self._device)
                groups.append(group)
                token_start = group.token_end
                pending = []
            if row is not None:
                pending.append(row)
        return groups

    def _fits(self, first: RowSpan, row: RowSpan) -> bool:
        if row.num_tokens != first.num_tokens or row.num_tokens > MAX_FOLDED_QUERIES:
            return False
        longest = -(-first.end // self._block_size)
        padding = longest - -(-row.end // self._block_size)
        return longest <= _MIN_SPLIT_BLOCKS or padding <= longest * _MAX_PADDING
