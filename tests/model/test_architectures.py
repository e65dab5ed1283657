"""Architectures that nobody prepared for: the general path serves them as transformers does."""

from __future__ import annotations

import pytest

from tests.model.conftest import TinyModel
from tests.model.harness import Driver, make_engine, make_prompts, make_spec, references

NAMED = ("smollm3", "olmo2", "olmo3", "granite")
UNNAMED = (
    "cohere",
    "cohere2",
    "deepseek_v2",
    "deepseek_v3",
    "ernie4_5",
    "exaone4",
    "glm4",
    "gpt_bigcode",
    "gpt_neox",
    "hunyuan_v1_dense",
    "minimax_m2",
    "modernbert-decoder",
    "nemotron",
    "olmoe",
    "opt",
    "phi",
    "qwen3_moe",
    "seed_oss",
    "starcoder2",
)
LENGTHS = (1, 17, 70)
NUM_TOKENS = 10


@pytest.mark.parametrize("kind", NAMED + UNNAMED)
def test_greedy_tokens_are_those_of_transformers(tiny_model: TinyModel, kind: str) -> None:
    directory = tiny_model(kind)
    prompts = make_prompts(LENGTHS)
    expected = references(directory, prompts, NUM_TOKENS)
    with make_engine(directory, max_num_batched_tokens=32, max_num_seqs=4) as engine:
        for index, prompt in enumerate(prompts):
            engine.sequences.submit(make_spec(str(index), prompt, NUM_TOKENS))
        outputs = Driver(engine).run()
        assert [outputs[str(index)] for index in range(len(prompts))] == expected
