"""Greedy float32 tokens on a GPU are those of transformers.generate."""

from __future__ import annotations

import pytest
import torch

from baton.core.handoff.frames import Span
from tests.gpu.conftest import TinyModel
from tests.model.harness import (
    Driver,
    assert_idle,
    make_engine,
    make_prompts,
    make_spec,
    references,
)

LENGTHS = (1, 16, 17, 100, 255, 256, 257, 600)
NUM_TOKENS = 12


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gemma2", "gemma3_text", "mixtral"])
@pytest.mark.parametrize("block_size", [16, 256])
def test_prompts_of_all_lengths_together(
    tiny_model: TinyModel, kind: str, block_size: int, device: torch.device
) -> None:
    directory = tiny_model(kind)
    prompts = make_prompts(LENGTHS, seed=21)
    expected = references(directory, prompts, NUM_TOKENS)
    settings = {"device": str(device), "block_size": block_size, "max_num_batched_tokens": 300}
    with make_engine(directory, **settings) as engine:
        driver = Driver(engine)
        for index, prompt in enumerate(prompts):
            engine.sequences.submit(make_spec(str(index), prompt, NUM_TOKENS))
        outputs = driver.run()
        assert [outputs[str(index)] for index in range(len(prompts))] == expected
        assert engine.stats().counters.get("varlen_layers", 0) == 0, "sdpa computes in float32"
        assert_idle(engine)


def test_speculation_changes_nothing(tiny_model: TinyModel, device: torch.device) -> None:
    directory = tiny_model("llama")
    prompts = make_prompts((9, 300), seed=22)
    expected = references(directory, prompts, 24)
    settings = {
        "device": str(device),
        "draft_model_path": str(tiny_model("llama", seed=1)),
        "speculation": True,
    }
    with make_engine(directory, **settings) as engine:
        for index, prompt in enumerate(prompts):
            engine.sequences.submit(make_spec(str(index), prompt, 24))
        outputs = Driver(engine).run()
        assert [outputs["0"], outputs["1"]] == expected


def test_kv_is_handed_to_another_engine(tiny_model: TinyModel, device: torch.device) -> None:
    directory = tiny_model("mistral")
    (prompt,) = make_prompts((700,), seed=23)
    (expected,) = references(directory, [prompt], NUM_TOKENS)
    settings = {"device": str(device), "max_num_batched_tokens": 128}
    with (
        make_engine(directory, **settings) as prefill,
        make_engine(directory, **settings) as decode,
    ):
        num_layers = prefill.fingerprint.layout.num_layers
        driver = Driver(prefill)
        prefill.submit(make_spec("0", prompt, NUM_TOKENS, prefill_only=True))
        decode.reserve(make_spec("0", prompt, NUM_TOKENS))
        decode.begin_fill("0")
        num_sent = 0
        while not driver.outputs.get("0"):
            driver.step()
            # While the next chunk computes, in a service.
            for num_ready in driver.blocks_ready("0")[-1:]:
                if num_ready > num_sent:
                    span = Span(0, num_layers, num_sent, num_ready - num_sent)
                    payload = prefill.transfer.read_blocks("0", span)
                    decode.transfer.write_blocks("0", span, payload)
                    num_sent = num_ready
        assert num_sent == -(-len(prompt) // prefill.fingerprint.layout.block_size)
        decode.commit("0", driver.outputs["0"][0])
        prefill.release("0")
        continued = Driver(decode).run()["0"]
        assert [*driver.outputs["0"], *continued] == expected
