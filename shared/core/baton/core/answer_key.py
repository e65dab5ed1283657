"""What an answer is kept under: a hash over everything that decides it."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from dataclasses import fields
from hashlib import blake2b

from baton.core.sampling import SamplingParams

KEY_BYTES = 32
UNIMPORTANT = frozenset({"speculation", "draft_source"})
"""Speculation changes how fast tokens come, never which."""


def is_determined(sampling: SamplingParams) -> bool:
    """True when the same request gets the same answer again."""
    return sampling.is_greedy or sampling.seed is not None


def answer_key(
    fingerprint_digest: bytes,
    cache_salt: str,
    token_ids: Sequence[int],
    sampling: SamplingParams,
    *,
    keep_special_tokens: bool,
) -> bytes:
    """Key of a determined request. Tenants are kept apart by their salt."""
    settings = {
        field.name: getattr(sampling, field.name)
        for field in fields(sampling)
        if field.name not in UNIMPORTANT
    }
    settings["logit_bias"] = sorted(sampling.logit_bias.items())
    guide = sampling.guide
    settings["guide"] = guide and [guide.kind.value, guide.text]
    if sampling.is_greedy:
        settings["seed"] = 0  # There is no noise that it could decide.
    described = json.dumps(
        [fingerprint_digest.hex(), cache_salt, keep_special_tokens, settings], sort_keys=True
    )
    # JSON holds no NUL: where it ends is certain.
    content = described.encode() + b"\0" + array("I", token_ids).tobytes()
    return blake2b(content, digest_size=KEY_BYTES, person=b"baton.answer").digest()
