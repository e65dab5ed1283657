"""Workers as on a GPU, with stand-ins for its kernel and its graphs, and gRPC between them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.support.eventually import eventually
from tests.support.recording import recorded_decoding
from tests.support.tiny_models import load_reference, make_tiny_model, reference_greedy
from tests.support.workers import worker_pair


async def test_kv_in_large_blocks_goes_to_a_worker_that_captured_its_steps(tmp_path: Path) -> None:
    model_path = make_tiny_model("mistral", tmp_path / "tiny")
    prompts = [[(index * 37 + 5) % 256 for index in range(length)] for length in (3, 256, 600)]
    model = load_reference(model_path)
    expected = [list(reference_greedy(model, prompt, 8)) for prompt in prompts]
    settings = {"block_size": 256, "num_blocks": 16, "max_model_len_tokens": 1024}
    decode = {**settings, "max_num_seqs": 4}
    with recorded_decoding() as recording:
        async with worker_pair(model_path, prefill=settings, decode=decode) as pair:
            assert recording.num_captured == 4, "by the decode worker alone"
            outputs = await asyncio.gather(
                *(pair.generate(prompt, f"r{index}") for index, prompt in enumerate(prompts))
            )
            assert [output.token_ids for output in outputs] == expected
            stats = pair.decode.service.snapshot().stats
            assert stats["varlen_layers"] == 3
            assert stats["graph_steps"] == recording.num_replayed > 0
            assert pair.prefill.service.snapshot().stats["graph_steps"] == 0
            assert outputs[2].done.blocks == 3
            await eventually(pair.decode.is_clean)
