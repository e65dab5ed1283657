"""What the engine computes for an attempt."""

from __future__ import annotations

from baton.core.errors import KvLayoutMismatch
from baton.core.sequence import SequenceSpec
from baton.engine.engine import Engine
from baton.wire.orders import AttemptOrder, seq_id_of


def spec_of(engine: Engine, order: AttemptOrder, *, prefill_only: bool = False) -> SequenceSpec:
    """What the engine computes.

    Raises:
        InvalidRequest, PromptTooLong, KvLayoutMismatch: this engine can never compute it.
    """
    if order.fingerprint is not None:
        differences = engine.fingerprint.differences(order.fingerprint)
        if differences:
            raise KvLayoutMismatch("served here != asked for: " + "; ".join(differences))
    num_prompt_tokens = len(order.token_ids) - order.num_output_tokens
    spec = SequenceSpec(
        seq_id=seq_id_of(order),
        token_ids=order.token_ids,
        sampling=order.sampling,
        max_tokens=engine.sequences.resolve_max_tokens(num_prompt_tokens, order.sampling),
        num_output_tokens=order.num_output_tokens,
        priority=order.priority,
        cache_salt=order.cache_salt,
        prefill_only=prefill_only,
    )
    engine.sequences.check_tokens(spec)
    return spec
