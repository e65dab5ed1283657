"""Drives engines without threads, and compares them with transformers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from baton.core.sampling import FinishReason, SamplingParams
from baton.core.sequence import SequenceSpec
from baton.engine.config import EngineConfig
from baton.engine.engine import Engine
from baton.engine.events import BlocksReady, EngineEvent, Failed, Tokens
from tests.support.tiny_models import load_reference, reference_greedy

VOCAB_SIZE = 320
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


def make_prompts(lengths: Sequence[int], seed: int = 1) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.randrange(VOCAB_SIZE) for _ in range(length)) for length in lengths]


def make_spec(
    name: str,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    sampling: SamplingParams = GREEDY,
    num_output_tokens: int = 0,
    prefill_only: bool = False,
    priority: int = 0,
    cache_salt: str = "",
) -> SequenceSpec:
    return SequenceSpec(
        seq_id=name,
        token_ids=tuple(prompt),
        sampling=sampling,
        max_tokens=max_tokens,
        num_output_tokens=num_output_tokens,
        priority=priority,
        cache_salt=cache_salt,
        prefill_only=prefill_only,
    )


@contextmanager
def make_engine(directory: Path, **settings: object) -> Iterator[Engine]:
    values: dict[str, object] = {
        "dtype": "float32",
        "num_blocks": 256,
        "adaptive_drafts": False,
        **settings,
    }
    engine = Engine(EngineConfig(str(directory), "tiny", **values))  # type: ignore[arg-type]
    try:
        yield engine
        engine.check()
    finally:
        engine.close()


class Driver:
    """Steps an engine and gathers what it says."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.events: list[EngineEvent] = []
        self.outputs: dict[str, list[int]] = {}
        self.reasons: dict[str, FinishReason | None] = {}

    def step(self) -> bool:
        has_stepped = self.engine.step()
        for event in self.engine.drain_events():
            self.events.append(event)
            assert not isinstance(event, Failed), event
            if isinstance(event, Tokens):
                output = self.outputs.setdefault(event.seq_id, [])
                self.reasons[event.seq_id] = event.finish_reason
                output.extend(event.token_ids)
        self.engine.check()
        return has_stepped

    def run(self, max_steps: int = 2000) -> dict[str, list[int]]:
        """Steps until there is nothing to do; returns output tokens by sequence."""
        for _ in range(max_steps):
            if not self.step():
                return self.outputs
        raise AssertionError("the engine does not come to an end")

    def blocks_ready(self, seq_id: str) -> list[int]:
        return [
            event.num_blocks
            for event in self.events
            if isinstance(event, BlocksReady) and event.seq_id == seq_id
        ]


def references(
    directory: Path, prompts: Sequence[Sequence[int]], num_tokens: int
) -> list[list[int]]:
    """What transformers.generate makes of the prompts; asserted to be worth comparing with."""
    model = load_reference(directory)
    found = [list(reference_greedy(model, prompt, num_tokens)) for prompt in prompts]
    distinct = {token for output in found for token in output}
    assert len(distinct) >= min(10, num_tokens), f"degenerate references: {found}"
    return found


def assert_idle(engine: Engine) -> None:
    """Nothing is held by anybody."""
    counts = engine.kv_counts()
    total = counts.pop("free") + counts.pop("cached")
    assert not any(counts.values()), counts
    assert total == sum(engine.kv_counts().values())
