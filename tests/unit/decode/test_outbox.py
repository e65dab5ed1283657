from __future__ import annotations

import asyncio

import pytest

from baton.core.errors import Cancelled, KvTransferLost, Stalled
from baton.core.sampling import FinishReason, TokenLogprob
from baton.decode.outbox import MAX_PENDING_EVENTS, Outbox
from baton.engine.events import Tokens
from baton.worker.tokens import merge


def _tokens(index: int, *token_ids: int, finish_reason: FinishReason | None = None) -> Tokens:
    return Tokens(
        seq_id="a/1",
        token_index=index,
        token_ids=token_ids,
        logprobs=tuple(TokenLogprob(-1.0) for _ in token_ids),
        finish_reason=finish_reason,
        stop_token_id=None,
        draft_tokens=4,
        accepted_tokens=len(token_ids) - 1,
        at_s=float(index),
    )


async def test_a_slow_reader_gets_many_steps_in_one_batch() -> None:
    outbox = Outbox()
    outbox.put(_tokens(1, 10, 11))
    outbox.put(_tokens(3, 12))
    outbox.put(_tokens(4, 13, 14, finish_reason=FinishReason.LENGTH))
    batch = merge(await outbox.take(), None)
    assert (batch.token_index, batch.token_ids) == (1, (10, 11, 12, 13, 14))
    assert len(batch.logprobs) == 5
    assert batch.finish_reason is FinishReason.LENGTH
    assert (batch.draft_tokens, batch.accepted_tokens) == (12, 2)


async def test_a_reader_waits_for_the_next_event() -> None:
    outbox = Outbox()
    reading = asyncio.create_task(outbox.take())
    await asyncio.sleep(0)
    outbox.put(_tokens(1, 10))
    assert [event.token_ids for event in await reading] == [(10,)]


async def test_a_reader_that_is_too_slow_has_failed() -> None:
    outbox = Outbox()
    for index in range(MAX_PENDING_EVENTS):
        outbox.put(_tokens(index, 1))
    with pytest.raises(Stalled):
        outbox.put(_tokens(MAX_PENDING_EVENTS, 1))


async def test_the_first_error_reaches_the_reader_and_drops_the_rest() -> None:
    outbox = Outbox()
    outbox.put(_tokens(1, 10))
    outbox.fail(KvTransferLost("lost"))
    outbox.fail(Cancelled("later"))
    for _ in range(2):
        with pytest.raises(KvTransferLost):
            await outbox.take()
