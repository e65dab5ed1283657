"""What KV in 8 bits costs in quality, and what it saves: the demo model through the engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from baton.core.sampling import SamplingParams
from baton.core.sequence import SequenceSpec
from baton.engine.config import KV_DTYPES, EngineConfig
from baton.engine.engine import Engine
from baton.engine.events import Tokens
from benchmarks.quantization.perplexity import DEMO

POOL_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class KvRow:
    """One way to keep KV."""

    kv_dtype: str
    token_bytes: int
    """KV of one token over all layers."""
    num_tokens: int
    """That POOL_BYTES hold."""
    perplexity: float


def measure_kv(windows: Sequence[torch.Tensor]) -> list[KvRow]:
    """All ways, on the same windows of text."""
    return [_measure(kv_dtype, windows) for kv_dtype in KV_DTYPES]


def _measure(kv_dtype: str, windows: Sequence[torch.Tensor]) -> KvRow:
    engine = Engine(
        EngineConfig(str(DEMO), "demo", kv_dtype=kv_dtype, kv_bytes=POOL_BYTES, num_threads=1)
    )
    try:
        nats, num_tokens = 0.0, 0
        for index, window in enumerate(windows):
            sampling = SamplingParams(temperature=0.0, prompt_logprobs=0)
            token_ids = tuple(window[0].tolist())
            engine.sequences.submit(SequenceSpec(str(index), token_ids, sampling, max_tokens=1))
            while engine.step():
                for event in engine.drain_events():
                    if isinstance(event, Tokens):
                        nats -= sum(one.logprob for one in event.prompt_logprobs)
                        num_tokens += len(event.prompt_logprobs)
        layout = engine.fingerprint.layout
        return KvRow(
            kv_dtype=layout.dtype,
            token_bytes=layout.block_bytes // layout.block_size,
            num_tokens=sum(engine.kv_counts().values()) * layout.block_size,
            perplexity=math.exp(nats / num_tokens),
        )
    finally:
        engine.close()


def kv_table(rows: Sequence[KvRow]) -> str:
    """Markdown, beside the model's own dtype."""
    base = rows[0]
    lines = [
        f"| KV | bytes per token | tokens in {POOL_BYTES >> 20} MiB | perplexity |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row.kv_dtype} | {row.token_bytes} ({row.token_bytes / base.token_bytes:.2f}) | "
        f"{row.num_tokens} ({row.num_tokens / base.num_tokens:.2f}) | "
        f"{row.perplexity:.4f} ({row.perplexity / base.perplexity - 1:+.2%}) |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"
