"""A scheduler that dies in the middle of an answer costs a pause: the SDK goes on with another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from baton.client import AsyncClient, RetryPolicy
from tests.support.system import System, free_port
from tests.support.tiers import representatives
from tests.support.tiny_models import make_tiny_model

if TYPE_CHECKING:
    from pathlib import Path

PROMPT = [9 + (index * 37) % 300 for index in range(200)]
PATIENT = RetryPolicy(max_attempts=40, max_backoff_s=0.5, budget=40.0)
NUM_TOKENS = 400


@pytest.mark.timeout(120)
@pytest.mark.parametrize("temperature", representatives([0.0, 0.9], {0.9}))
async def test_the_answer_is_the_same_as_without_the_crash(
    tmp_path: Path, temperature: float
) -> None:
    path = make_tiny_model("llama", tmp_path / "models" / "llama")
    port = free_port()
    async with System(tmp_path / "system", {"llama": path}) as system:
        await system.workers("llama")
        doomed = system.spawn("scheduler", port=port)
        await system.wait_ready(doomed)
        async with AsyncClient(f"127.0.0.1:{port}", timeout_s=60, retry=PATIENT) as client:
            stream = client.generate(
                token_ids=PROMPT,
                max_tokens=NUM_TOKENS,
                temperature=temperature,
                ignore_eos=True,
                return_token_ids=True,
                stream=True,
            )
            token_ids: list[int] = []
            text, seed = "", None
            async with stream:
                async for chunk in stream:
                    token_ids += chunk.token_ids
                    text += chunk.text
                    if doomed.popen.poll() is None and len(token_ids) > 20:
                        seed = stream.completion.seed
                        doomed.kill()
                        system.spawn("scheduler", port=port)
            answer = stream.completion
            assert answer.num_attempts > 1
            assert answer.usage.completion_tokens == NUM_TOKENS == len(token_ids)
            expected = await client.generate(
                token_ids=PROMPT,
                max_tokens=NUM_TOKENS,
                temperature=temperature,
                seed=seed,
                ignore_eos=True,
                return_token_ids=True,
            )
            assert token_ids == list(expected.token_ids)
            assert text == expected.text
        await system.assert_nothing_held(timeout_s=10.0)
