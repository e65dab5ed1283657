"""A closed engine gives its device memory back."""

from __future__ import annotations

import gc

import torch

from baton.engine.config import EngineConfig
from baton.engine.engine import Engine
from tests.gpu.conftest import TinyModel
from tests.model.harness import Driver, make_prompts, make_spec

KV_BYTES = 1 << 30
WORKSPACE_BYTES = 128 << 20
"""What libraries keep for good once they have computed."""


def _run(directory: str, device: torch.device) -> int:
    """Bytes allocated while an engine is there."""
    engine = Engine(
        EngineConfig(directory, "tiny", device=str(device), dtype="bfloat16", kv_bytes=KV_BYTES)
    )
    for index, prompt in enumerate(make_prompts((5, 300), seed=25)):
        engine.sequences.submit(make_spec(str(index), prompt, 8))
    Driver(engine).run()
    allocated: int = torch.cuda.memory_allocated(device)
    engine.close()
    return allocated


def test_memory_is_returned(tiny_model: TinyModel, device: torch.device) -> None:
    before = torch.cuda.memory_allocated(device)
    assert _run(str(tiny_model("llama")), device) > before + KV_BYTES * 0.9
    gc.collect()
    after_one = torch.cuda.memory_allocated(device)
    assert after_one < before + WORKSPACE_BYTES
    _run(str(tiny_model("llama")), device)
    gc.collect()
    assert torch.cuda.memory_allocated(device) <= after_one + (1 << 20), "nothing adds up"


def test_the_default_leaves_room_for_another_worker(
    tiny_model: TinyModel, device: torch.device
) -> None:
    free_bytes, _ = torch.cuda.mem_get_info(device)
    engine = Engine(EngineConfig(str(tiny_model("llama")), "tiny", device=str(device)))
    assert 0.3 * free_bytes < engine._runner.kv.num_bytes < 0.5 * free_bytes
    engine.close()
