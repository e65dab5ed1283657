"""Runs one model over its own KV tensors. Target and draft are one runner each."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from baton.core.errors import Internal
from baton.engine import graphs
from baton.engine.inputs import Row, StepInputs, make_inputs
from baton.engine.kv_cache import KvCache
from baton.engine.model import LoadedModel

_HEAD_TOKENS = 32
"""Tokens of a prompt whose logits are made at once."""

logger = logging.getLogger(__name__)


class ModelRunner:
    """A model with its KV. Only the engine thread calls `forward` and `capture`."""

    def __init__(self, model: LoadedModel, num_blocks: int) -> None:
        self.model = model
        # One block more than the pool hands out: padding of captured steps goes there.
        self.kv = KvCache(model.layout, num_blocks + 1, model.device)
        self.counters = Counter({"graph_steps": 0, "eager_steps": 0})
        """Forwards, by whether they were captured before."""
        self._scratch_block = num_blocks
        self._graphs: graphs.DecodeGraphs | None = None
        self.hidden: list[torch.Tensor] = []
        """Final hidden states of the last forward's rows that want them, [num_tokens, width]."""
        self._before_head: tuple[Any, StepInputs] | None = None
        model.attention.attach(self.kv)

    @torch.inference_mode()
    def capture(self, max_num_seqs: int, max_len_tokens: int) -> None:
        """Captures decode steps if the device and the model allow; else logs the reason."""
        capture = graphs.find_capture(self.model.device)
        if capture is None:
            return
        reason = graphs.why_not(self.model)
        if reason is not None:
            logger.info("decode steps are not captured: %s", reason)
            return
        captured = graphs.DecodeGraphs(
            self.model,
            scratch_block=self._scratch_block,
            max_num_seqs=max_num_seqs,
            max_len_tokens=max_len_tokens,
        )
        try:
            captured.capture(capture)
        except RuntimeError as error:
            logger.warning("decode steps are not captured: %s", error)
            return
        self._graphs = captured

    @torch.inference_mode()
    def forward(
        self, rows: Sequence[Row], on_written: Callable[[int], None] | None = None
    ) -> torch.Tensor:
        """Computes rows, writes their KV, and returns the logits that they want.

        Args:
            rows: what to compute.
            on_written: called with each layer whose KV is written.

        Returns:
            float32 [sum of num_logits, vocab_size], in the order of `rows`, valid until the next
            call.
        """
        self.hidden = []
        self._before_head = None
        has_hidden = any(row.has_hidden or row.num_prompt_logits for row in rows)
        # A graph reports neither its layers nor hidden states.
        if self._graphs is not None and on_written is None and not has_hidden:
            captured = self._graphs.forward(rows)
            if captured is not None:
                self.counters["graph_steps"] += 1
                return captured
        self.counters["eager_steps"] += 1
        inputs = make_inputs(rows, self.kv.layout.block_size, self.kv.device)
        self.model.attention.use(inputs.batch, on_written)
        with self._watching(rows, inputs) if has_hidden else nullcontext():
            output = self.model.module(
                input_ids=inputs.input_ids,
                position_ids=inputs.position_ids,
                use_cache=False,
                logits_to_keep=inputs.logits_index,
            )
        logits: torch.Tensor = output.logits[0]
        return logits.float()

    @torch.inference_mode()
    def prompt_logits(self, rows: Sequence[Row], index: int) -> Iterator[torch.Tensor]:
        """Logits of a row's prompt in the forward just done, float32, some tokens at a time.

        A chunk's [num_tokens, vocab_size] would take more memory than all else of a step: only the
        model's head is run again for some tokens, on what came into it.
        """
        if self._before_head is None:
            raise Internal("the last forward kept nothing for prompts' logits")
        output, inputs = self._before_head
        base = self.model.module.base_model
        start = inputs.ends[index] - len(rows[index].token_ids)
        end = start + rows[index].num_prompt_logits
        for first in range(start, end, _HEAD_TOKENS):
            base.forward = lambda *_, **__: output
            try:
                head = self.model.module(
                    input_ids=inputs.input_ids,
                    position_ids=inputs.position_ids,
                    use_cache=False,
                    logits_to_keep=torch.arange(
                        first, min(end, first + _HEAD_TOKENS), device=self.kv.device
                    ),
                )
            finally:
                del base.forward
            yield head.logits[0].float()

    @contextmanager
    def _watching(self, rows: Sequence[Row], inputs: StepInputs) -> Iterator[None]:
        """Keeps the hidden states before the output layer, for rows that want them."""
        spans = [
            slice(end - len(row.token_ids), end)
            for row, end in zip(rows, inputs.ends, strict=True)
            if row.has_hidden
        ]

        def keep(module: object, arguments: object, output: Any) -> None:
            del module, arguments
            if spans:
                states = output[0][0].float()
                self.hidden = [states[span] for span in spans]
            if any(row.num_prompt_logits for row in rows):
                self._before_head = output, inputs

        hook = self.model.module.base_model.register_forward_hook(keep)
        try:
            yield
        finally:
            hook.remove()

    def close(self) -> None:
        """Lets go of the KV tensors and the graphs."""
        self._graphs = None
        self.model.attention.detach()
