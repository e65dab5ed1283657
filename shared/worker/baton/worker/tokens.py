"""The engine's token events as the batches that workers send."""

from __future__ import annotations

from collections.abc import Sequence

from baton.core.output import DecodeTimings, TokenBatch
from baton.engine.events import Tokens


def merge(events: Sequence[Tokens], timings: DecodeTimings | None = None) -> TokenBatch:
    """One batch of consecutive events (at least one)."""
    last = events[-1]
    return TokenBatch(
        token_index=events[0].token_index,
        token_ids=tuple(token_id for event in events for token_id in event.token_ids),
        logprobs=tuple(logprob for event in events for logprob in event.logprobs),
        finish_reason=last.finish_reason,
        stop_token_id=last.stop_token_id,
        draft_tokens=sum(event.draft_tokens for event in events),
        accepted_tokens=sum(event.accepted_tokens for event in events),
        timings=timings,
        prompt_logprobs=events[0].prompt_logprobs,
    )
