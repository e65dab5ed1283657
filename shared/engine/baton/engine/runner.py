"""Runs one model over its own KV tensors. Target and draft are one runner each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from baton.engine.inputs import Row, make_inputs
from baton.engine.kv_cache import KvCache
from baton.engine.model import LoadedModel


class ModelRunner:
    """A model with its KV. Only the engine thread calls `forward`."""

    def __init__(self, model: LoadedModel, num_blocks: int) -> None:
        self.model = model
        self.kv = KvCache(model.layout, num_blocks, model.device)
        model.attention.attach(self.kv)

    @torch.inference_mode()
    def forward(
        self, rows: Sequence[Row], on_written: Callable[[int], None] | None = None
    ) -> torch.Tensor:
        """Computes rows, writes their KV, and returns the logits that they want.

        Args:
            rows: what to compute.
            on_written: called with each layer whose KV is written.

        Returns:
            float32 [sum of num_logits, vocab_size], in the order of `rows`.
        """
        inputs = make_inputs(rows, self.kv.layout.block_size, self.kv.device)
        self.model.attention.use(inputs.batch, on_written)
        output = self.model.module(
            input_ids=inputs.input_ids,
            position_ids=inputs.position_ids,
            use_cache=False,
            logits_to_keep=inputs.logits_index,
        )
        logits: torch.Tensor = output.logits[0]
        return logits.float()

    def close(self) -> None:
        """Lets go of the KV tensors."""
        self.model.attention.detach()
