"""Guides from a client's words down to a decode worker's tokens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from tokenizers import Tokenizer

from baton.core.errors import ErrorReason
from baton.core.guide import Guide
from baton.engine.grammar import Grammars
from baton.v1 import common_pb2
from baton.wire.errors import error_from_rpc
from tests.support.eventually import eventually
from tests.support.tiny_models import EOS_TOKEN_ID
from tests.support.workers import Pair, worker_pair

SCHEMA = json.dumps({
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "word": {"type": "string", "maxLength": 5}},
    "required": ["ok", "word"],
    "additionalProperties": False,
})


def _guided(**kind: Any) -> dict[str, Any]:
    return {
        "guide": common_pb2.Guide(**kind),
        "ignore_eos": False,
        "temperature": 0.9,
        "max_tokens": 200,
    }


@pytest.fixture
async def pair(model_path: Path) -> AsyncIterator[Pair]:
    async with worker_pair(model_path) as pair:
        yield pair


async def test_an_output_fulfils_its_schema_across_a_hand_off(pair: Pair, model_path: Path) -> None:
    sampling = _guided(json_schema=SCHEMA)
    out = await pair.generate([7, 8, 9] * 11, **sampling)
    assert out.finish_reason == common_pb2.FINISH_REASON_STOP
    assert out.token_ids[-1] == EOS_TOKEN_ID
    text = Tokenizer.from_file(str(model_path / "tokenizer.json")).decode(out.token_ids[:-1])
    value = json.loads(text)
    assert set(value) == {"ok", "word"}
    # The same without a hand-off.
    grant = await pair.reserve([7, 8, 9] * 11, "local", **sampling)
    local = await pair.run_decode(grant, local_prefill=True)
    assert local.token_ids == out.token_ids


@pytest.mark.parametrize(
    "kind",
    [
        {"regex": "(("},
        {"lark": "start: nothing"},
        {"json_schema": '{"type": "objekt"}'},
        {"json_schema": "{"},
        {},
    ],
)
async def test_a_malformed_guide_is_refused_before_blocks_are_taken(
    pair: Pair, kind: dict[str, str]
) -> None:
    sampling = _guided(**kind)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await pair.reserve([1, 2, 3], **sampling)
    error = error_from_rpc(caught.value)
    assert error.reason is ErrorReason.INVALID_REQUEST
    assert "guide" in error.message
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await pair.run_prefill(pair.prefill_request([1, 2, 3], None, **sampling))
    assert error_from_rpc(caught.value).reason is ErrorReason.INVALID_REQUEST
    for worker in (pair.decode, pair.prefill):
        counts = worker.counts()
        assert counts["free"] == sum(counts.values())


async def test_a_slow_grammar_holds_up_nobody_else(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    is_compiling, may_end = threading.Event(), threading.Event()
    compile_guide = Grammars._compile

    def slow(self: Grammars, guide: Guide) -> Any:
        is_compiling.set()
        assert may_end.wait(30)
        return compile_guide(self, guide)

    monkeypatch.setattr(Grammars, "_compile", slow)
    waiting = asyncio.create_task(pair.reserve([1, 2, 3], "slow", **_guided(regex="a+")))
    try:
        await eventually(is_compiling.is_set)
        out = await pair.generate([4, 5, 6], "other")
        assert len(out.token_ids) == 8
        assert not waiting.done()
    finally:
        may_end.set()
    assert (await waiting).num_blocks > 0
