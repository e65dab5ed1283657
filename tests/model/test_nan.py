"""A request whose computation gives NaN ends alone, and leaves nothing to others."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from baton.core.embedding import Pooling
from baton.core.errors import Internal
from baton.core.sampling import SamplingParams
from baton.engine.events import Failed, Tokens
from tests.model.conftest import TinyModel
from tests.model.harness import GREEDY, make_engine, make_prompts, make_spec, references

SAMPLED = SamplingParams(temperature=1.0, seed=1, top_p=0.9, ignore_eos=True)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_nan_ends_its_request_and_is_not_cached(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, sampling: SamplingParams
) -> None:
    directory = tiny_model("llama")
    good, bad = make_prompts((30, 70), seed=51)
    (expected,) = references(directory, [good], 12)
    with make_engine(directory, max_num_batched_tokens=64) as engine:
        forward = engine._runner.forward

        def broken(rows: Any, on_written: Any = None) -> torch.Tensor:
            logits = forward(rows, on_written).clone()
            first = 0
            for row in rows:
                if row.start + len(row.token_ids) >= len(bad):
                    logits[first : first + row.num_logits] = math.nan
                first += row.num_logits
            return logits

        monkeypatch.setattr(engine._runner, "forward", broken)
        engine.sequences.submit(make_spec("good", good, 12))
        engine.sequences.submit(make_spec("bad", bad, 10, sampling=sampling))
        spec = make_spec("hashes", bad, 10)
        events = []
        while engine.step():
            events += engine.drain_events()
        output = [token for e in events if isinstance(e, Tokens) for token in e.token_ids]
        assert output == expected
        (failed,) = [event for event in events if isinstance(event, Failed)]
        assert failed.seq_id == "bad"
        assert isinstance(failed.error, Internal)
        assert engine.match_prefix(engine.block_hashes(spec)) == 0, "not even the first chunk"


def test_an_embedding_with_nan_fails(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    (prompt,) = make_prompts([20], seed=52)
    with make_engine(tiny_model("llama")) as engine:
        forward = engine._runner.forward

        def broken(*args: Any) -> torch.Tensor:
            logits = forward(*args)
            engine._runner.hidden = [states * math.nan for states in engine._runner.hidden]
            return logits

        monkeypatch.setattr(engine._runner, "forward", broken)
        spec = replace(make_spec("a", prompt, 1), pooling=Pooling.MEAN)
        engine.sequences.submit(spec)
        engine.step()
        (failed,) = [event for event in engine.drain_events() if isinstance(event, Failed)]
        assert isinstance(failed.error, Internal)
