"""Greedy float32 tokens through every real process equal `transformers.generate`."""

from __future__ import annotations

import asyncio
from random import Random
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM

from tests.support.system import System
from tests.support.tiers import representatives
from tests.support.tiny_models import make_tiny_model

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

KINDS = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "mixtral"]
LENGTHS = [1, 2, 15, 16, 17, 31, 32, 33, 64, 127, 128, 129, 255, 300, 511, 700]
NUM_TOKENS = 24
VOCAB_SIZE = 320


def prompts_of(kind: str) -> list[list[int]]:
    """One prompt per length; special ids at the vocabulary's start are left out."""
    rng = Random(f"prompts of {kind}")
    return [[rng.randrange(8, VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]


def reference(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers makes of the prompts, one by one."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    outputs = []
    for prompt in prompts:
        with torch.inference_mode():
            ids = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=NUM_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
        outputs.append(ids[0, len(prompt) :].tolist())
    return outputs


@pytest.fixture(scope="module")
def model_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny random model per family."""
    base = tmp_path_factory.mktemp("models")
    return {kind: make_tiny_model(kind, base / kind) for kind in KINDS}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system(
    model_paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[System]:
    async with System(tmp_path_factory.mktemp("system"), model_paths) as running:
        yield running


@pytest.mark.timeout(180)
@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("kind", representatives(KINDS, {"llama", "mixtral"}))
async def test_tokens_equal_transformers_through_the_whole_relay(system: System, kind: str) -> None:
    path = system.models[kind]
    prefill = await system.worker("prefill", kind, max_num_batched_tokens=128)
    decode = await system.worker(
        "decode",
        kind,
        speculation="true",
        draft_model_path=path,
        num_draft_tokens=3,
        adaptive_drafts="false",
    )
    prompts = prompts_of(kind)
    expected = await asyncio.to_thread(reference, path, prompts)
    assert len({tuple(tokens) for tokens in expected}) == len(expected), "references do not vary"
    assert min(len(set(tokens)) for tokens in expected) > 4, "a reference repeats itself"
    await system.wait_ready(prefill, decode)
    await system.wait_members(prefill, decode)

    # Sixteen at once, 1 to 700 tokens, chunked, speculation on (the draft is the model itself).
    outputs = await asyncio.gather(
        *(system.greedy(prompt, NUM_TOKENS, model=kind) for prompt in prompts)
    )
    assert outputs == expected
    # Again: now prefixes are found in the caches, and speculation is off.
    again = [system.greedy(prompt, NUM_TOKENS, model=kind, speculation=False) for prompt in prompts]
    assert await asyncio.gather(*again) == expected

    completion = await system.client.generate(
        token_ids=prompts[-1],
        model=kind,
        max_tokens=NUM_TOKENS,
        temperature=0.0,
        ignore_eos=True,
        return_token_ids=True,
        explain=True,
    )
    assert list(completion.token_ids) == expected[-1]
    assert completion.usage.cached_tokens >= 640, "the prefix cache was not used"
    assert completion.usage.accepted_tokens > 0, "speculation was not used"
    assert completion.placement.prefill_worker_id == prefill.worker_id
    assert completion.placement.decode_worker_id == decode.worker_id
    await system.assert_nothing_held()
    await system.retire(prefill, decode)
