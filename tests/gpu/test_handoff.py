"""Two worker processes on one GPU, and a request that goes from one to the other over gRPC."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from tests.gpu.conftest import TinyModel
from tests.model.harness import make_prompts, references
from tests.support.system import System

NUM_TOKENS = 24


@pytest.mark.timeout(300)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_kv_goes_from_process_to_process(
    tiny_model: TinyModel, tmp_path: Path, dtype: str, device: torch.device
) -> None:
    directory = tiny_model("llama")
    prompts = make_prompts((1, 17, 255, 256, 257, 700), seed=26)
    settings = {"device": str(device), "dtype": dtype, "num_blocks": 64}
    async with System(tmp_path / "system", {"llama": directory}) as system:
        workers = [await system.worker(role, "llama", **settings) for role in ("prefill", "decode")]
        await system.wait_ready(*workers)
        await system.wait_members(*workers)
        outputs = await asyncio.gather(
            *(system.greedy(prompt, NUM_TOKENS, model="llama") for prompt in prompts)
        )
        assert [len(output) for output in outputs] == [NUM_TOKENS] * len(prompts)
        if dtype == "float32":
            expected = references(directory, prompts, NUM_TOKENS)
            assert [list(output) for output in outputs] == expected
        else:
            stats = (await system.service_status(workers[1])).stats
            assert stats["varlen_layers"] > 0
            assert stats["graph_steps"] > 0
        await system.assert_nothing_held()
