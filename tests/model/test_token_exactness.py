"""Greedy float32 tokens must be those of transformers.generate, however they were computed."""

from __future__ import annotations

import pytest

from baton.engine.events import Started
from tests.model.conftest import TinyModel
from tests.model.harness import (
    Driver,
    assert_idle,
    make_engine,
    make_prompts,
    make_spec,
    references,
)

KINDS = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "mixtral", "qwen2_moe")
MORE_KINDS = ("gemma3_text", "phi3", "gpt_oss", "gpt2")
LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 100, 700)
NUM_TOKENS = 12


@pytest.mark.parametrize("kind", KINDS + MORE_KINDS)
def test_prompts_of_all_lengths_together(tiny_model: TinyModel, kind: str) -> None:
    directory = tiny_model(kind)
    prompts = make_prompts(LENGTHS)
    expected = references(directory, prompts, NUM_TOKENS)
    with make_engine(directory, max_num_batched_tokens=128) as engine:
        driver = Driver(engine)
        for index, prompt in enumerate(prompts):
            engine.sequences.submit(make_spec(str(index), prompt, NUM_TOKENS))
        outputs = driver.run()
        assert [outputs[str(index)] for index in range(len(prompts))] == expected
        assert_idle(engine)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("budget", [7, 16, 512])
def test_chunks_of_any_size(tiny_model: TinyModel, kind: str, budget: int) -> None:
    directory = tiny_model(kind)
    prompts = make_prompts((33, 90), seed=2)
    expected = references(directory, prompts, NUM_TOKENS)
    with make_engine(directory, max_num_batched_tokens=budget, max_num_seqs=4) as engine:
        for index, prompt in enumerate(prompts):
            engine.sequences.submit(make_spec(str(index), prompt, NUM_TOKENS))
        outputs = Driver(engine).run()
        assert [outputs["0"], outputs["1"]] == expected


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_sixteen_that_join_and_leave_at_different_steps(tiny_model: TinyModel, kind: str) -> None:
    directory = tiny_model(kind)
    prompts = make_prompts([5 + 9 * index for index in range(16)], seed=3)
    expected = references(directory, prompts, 20)
    with make_engine(directory, max_num_seqs=12, max_num_batched_tokens=64) as engine:
        driver = Driver(engine)
        for index, prompt in enumerate(prompts):
            engine.sequences.submit(make_spec(str(index), prompt, 8 + index % 12))
            driver.step()
            driver.step()
        outputs = driver.run()
        for index in range(16):
            assert outputs[str(index)] == expected[index][: 8 + index % 12]
        assert_idle(engine)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
def test_a_cached_prefix_changes_nothing(tiny_model: TinyModel, kind: str) -> None:
    directory = tiny_model(kind)
    (shared, one, two) = make_prompts((64, 20, 3), seed=4)
    prompts = [shared, shared + one, shared + two]
    expected = references(directory, prompts, NUM_TOKENS)
    with make_engine(directory) as engine:
        driver = Driver(engine)
        for index, prompt in enumerate([*prompts, shared]):
            engine.sequences.submit(make_spec(str(index), prompt, NUM_TOKENS))
            driver.run()
        assert [driver.outputs[name] for name in "0123"] == [*expected, expected[0]]
        cached = [event.num_cached_tokens for event in driver.events if isinstance(event, Started)]
        assert cached == [0, 64, 64, 48], "never the whole prompt"
        assert engine.match_prefix(engine.block_hashes(make_spec("", prompts[1], 1))) == 5
        other = make_spec("", prompts[1], 1, cache_salt="another tenant")
        assert engine.match_prefix(engine.block_hashes(other)) == 0


def test_another_salt_shares_nothing(tiny_model: TinyModel) -> None:
    (prompt,) = make_prompts((64,), seed=5)
    with make_engine(tiny_model("llama")) as engine:
        driver = Driver(engine)
        for name, salt in (("0", ""), ("1", "tenant"), ("2", "tenant")):
            engine.sequences.submit(make_spec(name, prompt, 2, cache_salt=salt))
            driver.run()
        cached = [event.num_cached_tokens for event in driver.events if isinstance(event, Started)]
        assert cached == [0, 0, 48]


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_preemption_under_a_tiny_pool(tiny_model: TinyModel, kind: str) -> None:
    directory = tiny_model(kind)
    prompts = make_prompts((20, 25, 30, 10, 5), seed=6)
    expected = references(directory, prompts, 40)
    with make_engine(directory, num_blocks=9, max_num_batched_tokens=32, max_num_seqs=8) as engine:
        for index, prompt in enumerate(prompts):
            engine.sequences.submit(make_spec(str(index), prompt, 40))
        outputs = Driver(engine).run()
        assert [outputs[str(index)] for index in range(len(prompts))] == expected
        assert engine.stats().counters["preemptions"] > 0
        assert_idle(engine)


def test_eviction_of_cached_blocks_changes_nothing(tiny_model: TinyModel) -> None:
    directory = tiny_model("llama")
    prompts = make_prompts([50] * 6, seed=7)
    expected = references(directory, prompts, 6)
    with make_engine(directory, num_blocks=8) as engine:
        driver = Driver(engine)
        for turn in range(2):
            for index, prompt in enumerate(prompts):
                engine.sequences.submit(make_spec(f"{turn}{index}", prompt, 6))
                driver.run()
        for turn in range(2):
            assert [driver.outputs[f"{turn}{index}"] for index in range(6)] == expected


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "mixtral"])
def test_packed_linears_change_nothing(tiny_model: TinyModel, kind: str) -> None:
    directory = tiny_model(kind)
    prompts = make_prompts((1, 17, 90), seed=8)
    expected = references(directory, prompts, NUM_TOKENS)
    with make_engine(directory, prepack_linears=True) as engine:
        for index, prompt in enumerate(prompts):
            engine.sequences.submit(make_spec(str(index), prompt, NUM_TOKENS))
        outputs = Driver(engine).run()
        assert [outputs[str(index)] for index in range(len(prompts))] == expected
