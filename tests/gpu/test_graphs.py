"""Captured decode steps give the tokens of the same steps computed eagerly, in bfloat16."""

from __future__ import annotations

import pytest
import torch

from baton.engine.graphs import CudaCapture
from tests.gpu.conftest import TinyModel
from tests.model.harness import Driver, assert_idle, make_engine, make_prompts, make_spec

PROMPTS = make_prompts((1, 17, 250, 256, 505), seed=24)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gemma3_text"])
def test_tokens_are_the_same_with_and_without(
    tiny_model: TinyModel, kind: str, device: torch.device
) -> None:
    outputs, counters = [], []
    for cuda_graphs in (True, False):
        settings = {"device": str(device), "dtype": "bfloat16", "max_model_len_tokens": 1024}
        with make_engine(
            tiny_model(kind), cuda_graphs=cuda_graphs, max_num_seqs=6, **settings
        ) as engine:
            driver = Driver(engine)
            for index, prompt in enumerate(PROMPTS):
                engine.sequences.submit(make_spec(str(index), prompt, 24 + index))
            outputs.append(driver.run())
            counters.append(engine.stats().counters)
            assert_idle(engine)
    assert outputs[0] == outputs[1]
    with_graphs, without = counters
    assert with_graphs["varlen_layers"] == without["varlen_layers"] > 0
    assert with_graphs["graph_steps"] > 10
    assert without["graph_steps"] == 0


def test_padding_writes_to_no_block_of_the_pool(
    tiny_model: TinyModel, device: torch.device
) -> None:
    settings = {"device": str(device), "dtype": "bfloat16", "num_blocks": 24}
    with make_engine(tiny_model("llama"), max_num_seqs=8, **settings) as engine:
        kv = engine._runner.kv
        assert not any(part[:24].any() for part in (*kv.keys, *kv.values))
        assert all(part[24].any() for part in (*kv.keys, *kv.values))


def test_work_that_waits_for_the_device_is_not_captured_and_changes_no_stream(
    device: torch.device,
) -> None:
    with pytest.raises(RuntimeError):
        CudaCapture(device)(lambda: torch.ones(1, device=device).item())
    assert torch.cuda.current_stream(device) == torch.cuda.default_stream(device)
