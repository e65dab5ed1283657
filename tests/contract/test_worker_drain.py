"""What a drain cuts off is told so: somebody else is to be asked."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
import pytest

from baton.core.errors import ErrorReason
from baton.wire.errors import error_from_rpc
from tests.support.eventually import eventually
from tests.support.tiny_models import make_tiny_model
from tests.support.workers import worker_pair

if TYPE_CHECKING:
    from pathlib import Path

PROMPT = [9 + index % 200 for index in range(200)]


async def _reason(awaitable: object) -> ErrorReason:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable  # type: ignore[misc]
    return error_from_rpc(caught.value).reason


@pytest.mark.parametrize("is_cut_short", [False, True])
async def test_decode_ends_what_is_left(tmp_path: Path, is_cut_short: bool) -> None:
    model_path = make_tiny_model("llama", tmp_path / "tiny")
    async with worker_pair(model_path) as pair:
        grant = await pair.reserve(PROMPT, max_tokens=1500)
        decoding = asyncio.create_task(_reason(pair.run_decode(grant, local_prefill=True)))
        await eventually(lambda: pair.decode.counts()["in_use"] > 0)
        drain = asyncio.create_task(pair.decode.service.drain(600.0 if is_cut_short else 0.01))
        if is_cut_short:
            await asyncio.sleep(0)
            drain.cancel()
        await asyncio.wait({drain})
        assert await decoding is ErrorReason.WORKER_DRAINING
        await eventually(pair.decode.is_clean)


async def test_prefill_ends_what_is_left(tmp_path: Path) -> None:
    model_path = make_tiny_model("llama", tmp_path / "tiny")
    async with worker_pair(model_path, prefill={"fault": "stall_after_chunk=0"}) as pair:
        grant = await pair.reserve(PROMPT)
        prefilling = asyncio.create_task(
            _reason(pair.run_prefill(pair.prefill_request(PROMPT, grant)))
        )
        await eventually(lambda: pair.decode.counts()["filling"] > 0)
        await pair.prefill.service.drain(0.01)
        assert await prefilling is ErrorReason.WORKER_DRAINING
        await eventually(pair.prefill.is_clean)
        await eventually(pair.decode.is_clean)
