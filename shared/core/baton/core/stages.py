"""The stages of a request, and the tracks that show what a stage consisted of."""

from __future__ import annotations

from enum import StrEnum


class StageName(StrEnum):
    """One stage of a request's life; the value is the wire's text."""

    TOKENIZE = "tokenize"
    ANSWER_LOOKUP = "answer_lookup"
    ADMIT = "admit"
    RESERVE = "reserve"
    QUEUE = "queue"
    PREFILL = "prefill"
    RELAY = "relay"
    """From the worker's first token to the scheduler: the network, and what no worker reported."""
    DETOKENIZE = "detokenize"
    RETRY = "retry"
    """From a failed attempt to the next placement."""
    HANDOFF = "handoff"
    FIRST_DECODE = "first_decode"
    DECODE = "decode"


class TrackName(StrEnum):
    """The parts of a stage on one worker; the value is the wire's text."""

    PREFILL_CHUNK = "prefill_chunk"
    KV_CHUNK = "kv_chunk"
    DECODE_STEP = "decode_step"
