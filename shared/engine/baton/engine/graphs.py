"""Decode steps as captured graphs: one launch instead of hundreds of small ones.

A graph repeats what was launched once, on the same memory. So the tables of a step lie in buffers
that stay, and a step in which every sequence has one token is padded to the next of a few batch
sizes, each captured once. Padding reads and writes the scratch block, which no sequence owns.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch

from baton.engine.inputs import Row
from baton.engine.model import LoadedModel
from baton.engine.ragged import AttentionBatch, PagedRows
from baton.engine.varlen import VarlenBackend

Launch = Callable[[], None]
Capture = Callable[[Launch], Launch]
"""Records what some work launches; the result launches the same again, on the same memory.

RuntimeError means that the work cannot be recorded, such as when it waits for the device.
"""
MAX_GRAPHS = 20


class CudaCapture:
    """CUDA graphs that share one memory pool: only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Launch) -> Launch:
        """See Capture."""
        # Once before, because libraries set themselves up on first use.
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may use the device meanwhile. A capture that fails leaves its
        # stream behind as the current one, and copies of KV wait for the default stream only.
        with (
            torch.cuda.stream(torch.cuda.current_stream(self._device)),
            torch.cuda.graph(
                graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
            ),
        ):
            work()
        return graph.replay


def find_capture(device: torch.device) -> Capture | None:
    """How work is captured on a device; None where it is not."""
    return CudaCapture(device) if device.type == "cuda" else None


def why_not(model: LoadedModel) -> str | None:
    """What keeps a model's decode steps from being captured; None when nothing is known."""
    backends = model.attention.num_layers_by_backend()
    others = sum(count for name, count in backends.items() if name != VarlenBackend.name)
    if others:
        return f"{others} of {sum(backends.values())} layers do not attend with varlen"
    return None


def batch_sizes(max_num_seqs: int) -> list[int]:
    """Sizes to capture, at most MAX_GRAPHS: powers of 2 and what is halfway between them.

    So padding is at most a third of a step.
    """
    sizes = [1, 2]
    while sizes[-1] < max_num_seqs:
        half = sizes[-1] // 2
        sizes.append(sizes[-1] + half if sizes[-1] & (sizes[-1] - 1) == 0 else sizes[-2] * 2)
    return [*(size for size in sizes if size < max_num_seqs), max_num_seqs][:MAX_GRAPHS]


class DecodeGraphs:
    """The decode steps of one model. Only the engine thread calls it, in inference mode."""

    def __init__(
        self, model: LoadedModel, *, scratch_block: int, max_num_seqs: int, max_len_tokens: int
    ) -> None:
        self._model = model
        self._scratch_block = scratch_block
        self._block_size = model.layout.block_size
        self._max_len_tokens = max_len_tokens
        self._sizes = batch_sizes(max_num_seqs)
        self._launches: dict[int, Launch] = {}
        largest, device = self._sizes[-1], model.device
        width = -(-max_len_tokens // self._block_size)

        def buffer(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._input_ids = buffer(1, largest, dtype=torch.int64)
        self._position_ids = buffer(1, largest, dtype=torch.int64)
        self._slots = buffer(largest, dtype=torch.int64)
        self._query_starts = torch.arange(largest + 1, dtype=torch.int32, device=device)
        self._context_starts = buffer(largest + 1)
        self._context_lens = buffer(largest)
        self._block_table = buffer(largest, width)
        self._logits = buffer(largest, model.vocab_size, dtype=torch.float32)

    def capture(self, capture: Capture) -> None:
        """Captures a graph per size.

        Raises:
            RuntimeError: the model cannot be captured.
        """
        # The largest first: the others find room in its memory.
        for size in reversed(self._sizes):
            self._fill([], size)
            self._launches[size] = capture(self._work(size))

    def forward(self, rows: Sequence[Row]) -> torch.Tensor | None:
        """Logits of a decode step, float32 [len(rows), vocab_size], valid until the next call.

        None when the step is something else than one token and one row of logits per sequence.
        """
        if any(len(row.token_ids) != 1 or row.num_logits != 1 for row in rows):
            return None
        is_in_range = all(row.start < self._max_len_tokens for row in rows)
        if len(rows) > self._sizes[-1] or not is_in_range:
            return None
        size = self._sizes[bisect_left(self._sizes, len(rows))]
        self._fill(rows, size)
        self._launches[size]()
        return self._logits[: len(rows)]

    def _work(self, size: int) -> Launch:
        paged_rows = PagedRows(
            query_starts=self._query_starts[: size + 1],
            context_starts=self._context_starts[: size + 1],
            context_lens=self._context_lens[:size],
            block_table=self._block_table[:size],
            max_num_queries=1,
            max_context_len=self._max_len_tokens,
        )
        batch = AttentionBatch.of_tables(self._slots[:size], paged_rows)

        def work() -> None:
            self._model.attention.use(batch)
            output = self._model.module(
                input_ids=self._input_ids[:, :size],
                position_ids=self._position_ids[:, :size],
                use_cache=False,
            )
            self._logits[:size].copy_(output.logits[0])

        return work

    def _fill(self, rows: Sequence[Row], size: int) -> None:
        """Puts rows into the buffers, and padding behind them."""
        padding = range(size - len(rows))
        tables = [row.block_table[: row.start // self._block_size + 1] for row in rows]
        tables += [[self._scratch_block] for _ in padding]
        slots = [
            table[-1] * self._block_size + row.start % self._block_size
            for row, table in zip(rows, tables, strict=False)
        ]
        slots += [self._scratch_block * self._block_size + i % self._block_size for i in padding]
        lens = [*(row.start + 1 for row in rows), *(1 for _ in padding)]
        width = max(map(len, tables))
        for target, values in (
            (self._input_ids[0], [*(row.token_ids[0] for row in rows), *(0 for _ in padding)]),
            (self._position_ids[0], [length - 1 for length in lens]),
            (self._slots, slots),
            (self._context_lens, lens),
            (self._context_starts, [0, *accumulate(lens)]),
        ):
            target[: len(values)].copy_(torch.tensor(values, dtype=target.dtype))
        padded = [[*table, *[0] * (width - len(table))] for table in tables]
        self._block_table[:size, :width].copy_(torch.tensor(padded, dtype=torch.int32))
