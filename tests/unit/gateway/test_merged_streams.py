from __future__ import annotations

from baton.client import Chunk, Logprob, Usage
from baton.gateway.merged_streams import ChoiceChunk, joined_per_choice

FIRST = Chunk(
    text="a",
    token_index=3,
    num_tokens=1,
    token_ids=(7,),
    logprobs=(Logprob(7, "a", b"a", -0.5),),
    request_id="r",
    model="demo",
    trace_id="t",
)
LAST = Chunk(
    text="b",
    token_index=4,
    num_tokens=2,
    token_ids=(8, 9),
    logprobs=(Logprob(8, "b", b"b", -0.25),),
    finish_reason="stop",
    stop_reason="9",
    usage=Usage(prompt_tokens=1, completion_tokens=3),
)


def test_events_of_one_answer_become_one_that_loses_nothing():
    other = ChoiceChunk(1, Chunk(text="x", num_tokens=1))
    both, alone = joined_per_choice([ChoiceChunk(0, FIRST), other, ChoiceChunk(0, LAST)])
    assert alone == other
    chunk = both.chunk
    assert (both.index, chunk.text, chunk.token_ids) == (0, "ab", (7, 8, 9))
    assert (chunk.token_index, chunk.num_tokens) == (3, 3)
    assert chunk.logprobs == FIRST.logprobs + LAST.logprobs
    assert (chunk.request_id, chunk.model, chunk.trace_id) == ("r", "demo", "t")
    assert (chunk.finish_reason, chunk.stop_reason, chunk.usage) == ("stop", "9", LAST.usage)


def test_nothing_stays_nothing():
    assert joined_per_choice([]) == []
