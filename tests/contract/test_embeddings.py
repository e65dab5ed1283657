"""Embeddings from the scheduler to a real prefill worker, and between fake ones."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from baton.core.errors import ErrorReason, InvalidRequest, NoWorker
from baton.v1 import common_pb2, inference_pb2, prefill_pb2
from baton.wire.errors import error_from_rpc
from tests.support.eventually import eventually
from tests.support.scheduler_rig import Rig
from tests.support.tiny_models import load_reference
from tests.support.workers import worker_pair

PROMPT = [(index * 37 + 5) % 256 for index in range(100)]


def _request(*texts: str, **fields: Any) -> inference_pb2.EmbedRequest:
    inputs = [inference_pb2.EmbedInput(text=text) for text in texts]
    return inference_pb2.EmbedRequest(inputs=inputs, **fields)


async def _ask(rig: Rig, request: inference_pb2.EmbedRequest) -> dict[int, Any]:
    return {answer.index: answer async for answer in rig.stub.Embed(request, timeout=20)}


async def _refused(rig: Rig, request: inference_pb2.EmbedRequest) -> tuple[ErrorReason, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _ask(rig, request)
    error = error_from_rpc(caught.value)
    return error.reason, error.message


@pytest.mark.parametrize("pooling", ["POOLING_LAST", "POOLING_MEAN"])
async def test_a_worker_tells_the_models_hidden_states_and_keeps_nothing(
    model_path: Path, pooling: str
) -> None:
    async with worker_pair(model_path) as pair:
        request = prefill_pb2.EmbedPromptRequest(
            request_id="e", attempt=1, token_ids=PROMPT, pooling=common_pb2.Pooling.Value(pooling)
        )
        answer = await pair.to_prefill.EmbedPrompt(request, timeout=20)
        with torch.inference_mode():
            output = load_reference(model_path)(torch.tensor([PROMPT]), output_hidden_states=True)
        states = output.hidden_states[-1][0]
        expected = states[-1] if pooling == "POOLING_LAST" else states.mean(0)
        torch.testing.assert_close(torch.tensor(answer.values), expected, atol=2e-4, rtol=2e-4)
        assert pair.prefill.is_clean()
        again = await pair.to_prefill.EmbedPrompt(request, timeout=20)
        assert again.cached_tokens == (96 if pooling == "POOLING_LAST" else 0)


async def test_a_cancelled_call_ends_its_computation(model_path: Path) -> None:
    async with worker_pair(model_path, prefill={"max_num_batched_tokens": 16}) as pair:
        calls = [
            pair.to_prefill.EmbedPrompt(
                prefill_pb2.EmbedPromptRequest(
                    request_id=f"e{number}", attempt=1, token_ids=[number, *PROMPT], pooling=2
                )
            )
            for number in range(8)
        ]
        await eventually(lambda: not pair.prefill.is_clean(), interval_s=0.001)
        for call in calls:
            call.cancel()
        await eventually(pair.prefill.is_clean)
        await eventually(lambda: pair.prefill.engine.stats().num_waiting == 0)
        await pair.prefill.service.loaded().embeddings.wait_idle()


async def test_inputs_become_vectors_of_length_1() -> None:
    async with Rig() as rig:
        tokens = inference_pb2.EmbedInput(tokens=inference_pb2.TokenPrompt(token_ids=[3, 4]))
        request = _request("ab", "c", dimensions=2)
        request.inputs.append(tokens)
        answers = await _ask(rig, request)
        assert sorted(answers) == [0, 1, 2]
        assert list(answers[2].values) == pytest.approx([0.6, 0.8])
        assert [answers[index].prompt_tokens for index in range(3)] == [2, 1, 2]
        assert answers[0].model == "demo"
        assert answers[0].cached_tokens == 1
        unscaled = await _ask(rig, _request("ab", unscaled=True, pooling=2, cache_salt="s"))
        assert list(unscaled[0].values) == [97.0, 98.0, 2.0]
        order = rig.prefills[0].orders[-1]
        assert (order.pooling, order.cache_salt) == (common_pb2.POOLING_MEAN, "s")
        assert rig.metric("baton_prompt_tokens_total") == 7


async def test_another_worker_takes_over_from_one_that_fails() -> None:
    async with Rig(num_prefill=2) as rig:
        for prefill in rig.prefills:
            prefill.fail_at = "embed"
        rig.prefills[1].fail_at = ""
        answers = await _ask(rig, _request("a", "b", "c"))
        assert sorted(answers) == [0, 1, 2]
        assert rig.prefills[0].fail_at == ""


async def test_what_no_worker_can_mend_is_told_at_once() -> None:
    async with Rig() as rig:
        rig.prefills[0].fail_at = "embed"
        rig.prefills[0].error = InvalidRequest("not in the vocabulary")
        assert await _refused(rig, _request("a")) == (
            ErrorReason.INVALID_REQUEST,
            "not in the vocabulary",
        )
        assert len(rig.prefills[0].orders) == 1


async def test_a_vector_that_is_not_finite_is_an_error() -> None:
    async with Rig() as rig:
        rig.prefills[0].embedding_scale = float("nan")
        reason, _ = await _refused(rig, _request("a"))
        assert reason is ErrorReason.INTERNAL


@pytest.mark.parametrize(
    ("request_", "reason", "message"),
    [
        (_request(), ErrorReason.INVALID_REQUEST, "inputs must be 1 to 2048, got 0"),
        (_request("a", ""), ErrorReason.INVALID_REQUEST, "input 1 is empty"),
        (_request("a" * 600), ErrorReason.PROMPT_TOO_LONG, "has 600 tokens"),
        (_request("a", model="other"), ErrorReason.MODEL_NOT_FOUND, "'other' is not served"),
        (_request("a", dimensions=4), ErrorReason.INVALID_REQUEST, "dimensions must be at most 3"),
        (_request("a", pooling=7), ErrorReason.INVALID_REQUEST, "pooling must be 0 to 2"),
        (_request("a", cache_salt="s" * 300), ErrorReason.INVALID_REQUEST, "cache_salt"),
        (_request("a", request_id="r" * 97), ErrorReason.INVALID_REQUEST, "request_id"),
    ],
)
async def test_bad_requests_say_what_is_wrong(
    request_: inference_pb2.EmbedRequest, reason: ErrorReason, message: str
) -> None:
    async with Rig() as rig:
        told = await _refused(rig, request_)
        assert told[0] is reason
        assert message in told[1]


async def test_without_a_prefill_worker_there_are_no_vectors() -> None:
    async with Rig(num_prefill=0) as rig:
        reason, message = await _refused(rig, _request("a"))
        assert reason is ErrorReason.NO_WORKER
        assert "prefill worker" in message


async def test_cancelling_ends_every_input() -> None:
    async with Rig() as rig:
        rig.prefills[0].pauses.hold("embed")
        task = asyncio.create_task(_ask(rig, _request("a", "b")))
        await eventually(lambda: len(rig.prefills[0].orders) == 2)
        task.cancel()
        await eventually(lambda: rig.service.snapshot().num_running == 0)
        rig.prefills[0].error = NoWorker("")
        rig.prefills[0].pauses.let_go("embed")
