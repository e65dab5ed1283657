"""Vectors of prompts: those of transformers' last hidden states, whatever the prompt's way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from baton.core.embedding import Pooling
from baton.core.errors import PromptTooLong
from baton.engine.engine import Engine
from baton.engine.events import Embedded, Tokens
from tests.model.conftest import TinyModel
from tests.model.harness import Driver, assert_idle, make_engine, make_prompts, make_spec
from tests.support.tiny_models import load_reference

PROMPTS = make_prompts((1, 2, 33, 90), seed=41)


def _submit(engine: Engine, name: str, prompt: Sequence[int], pooling: Pooling) -> None:
    engine.sequences.submit(replace(make_spec(name, prompt, 1), pooling=pooling))


def _vector(driver: Driver, name: str) -> torch.Tensor:
    [values] = [
        event.values
        for event in driver.events
        if isinstance(event, Embedded) and event.seq_id == name
    ]
    return torch.tensor(values)


def _expected(directory: Path, prompt: Sequence[int], pooling: Pooling) -> torch.Tensor:
    with torch.inference_mode():
        output = load_reference(directory)(torch.tensor([prompt]), output_hidden_states=True)
    states: torch.Tensor = output.hidden_states[-1][0]
    return states[-1] if pooling is Pooling.LAST else states.mean(0)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("max_num_batched_tokens", [16, 512])
def test_vectors_are_those_of_transformers_in_chunks_and_beside_other_work(
    tiny_model: TinyModel, kind: str, max_num_batched_tokens: int
) -> None:
    directory = tiny_model(kind)
    with make_engine(
        directory, max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=16
    ) as engine:
        driver = Driver(engine)
        for index, prompt in enumerate(PROMPTS):
            engine.sequences.submit(make_spec(f"text{index}", prompt, 4))
            for pooling in Pooling:
                _submit(engine, f"{pooling.name}{index}", prompt, pooling)
        driver.run()
        for index, prompt in enumerate(PROMPTS):
            for pooling in Pooling:
                told = _vector(driver, f"{pooling.name}{index}")
                torch.testing.assert_close(
                    told, _expected(directory, prompt, pooling), atol=2e-4, rtol=2e-4
                )
        told_tokens = {event.seq_id for event in driver.events if isinstance(event, Tokens)}
        assert told_tokens == {f"text{index}" for index in range(len(PROMPTS))}
        assert_idle(engine)


def test_a_cached_prefix_serves_the_last_token_and_is_not_used_for_the_mean(
    tiny_model: TinyModel,
) -> None:
    directory = tiny_model("llama")
    with make_engine(directory) as engine:
        driver = Driver(engine)
        _submit(engine, "first", PROMPTS[3], Pooling.LAST)
        driver.run()
        before = engine.stats().counters["prefill_tokens"]
        _submit(engine, "again", PROMPTS[3], Pooling.LAST)
        driver.run()
        assert engine.stats().counters["prefill_tokens"] - before < 16
        torch.testing.assert_close(_vector(driver, "again"), _vector(driver, "first"))
        _submit(engine, "mean", PROMPTS[3], Pooling.MEAN)
        driver.run()
        expected = _expected(directory, PROMPTS[3], Pooling.MEAN)
        torch.testing.assert_close(_vector(driver, "mean"), expected, atol=2e-4, rtol=2e-4)


def test_they_survive_preemption(tiny_model: TinyModel) -> None:
    directory = tiny_model("llama")
    with make_engine(directory, max_num_batched_tokens=16, max_num_seqs=8) as engine:
        driver = Driver(engine)
        _submit(engine, "mean", PROMPTS[3], Pooling.MEAN)
        driver.step()
        driver.step()
        with engine._state.lock:
            engine._state.preempt(engine._state.running["mean"])
        driver.run()
        expected = _expected(directory, PROMPTS[3], Pooling.MEAN)
        torch.testing.assert_close(_vector(driver, "mean"), expected, atol=2e-4, rtol=2e-4)
        assert_idle(engine)


def test_a_prompt_may_fill_the_context_to_the_last_token(tiny_model: TinyModel) -> None:
    with make_engine(tiny_model("llama"), max_model_len_tokens=64) as engine:
        driver = Driver(engine)
        _submit(engine, "full", [1] * 64, Pooling.LAST)
        driver.run()
        assert len(_vector(driver, "full")) > 0
        with pytest.raises(PromptTooLong):
            _submit(engine, "more", [1] * 65, Pooling.LAST)


def test_releasing_one_that_waits_or_runs_leaves_nothing(tiny_model: TinyModel) -> None:
    with make_engine(tiny_model("llama"), max_num_batched_tokens=16, max_num_seqs=8) as engine:
        driver = Driver(engine)
        _submit(engine, "runs", PROMPTS[3], Pooling.MEAN)
        _submit(engine, "waits", PROMPTS[3], Pooling.MEAN)
        driver.step()
        engine.sequences.release("runs")
        engine.sequences.release("waits")
        driver.run()
        assert not [event for event in driver.events if isinstance(event, Embedded)]
        assert_idle(engine)
