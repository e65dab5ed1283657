"""Prefixes that the cache keeps: requests and answers that both clients share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, cast

from baton.client.messages import generate_request
from baton.client.types import GenerateOptions
from baton.core.errors import InvalidRequest
from baton.v1 import common_pb2, inference_pb2

_SHARED = frozenset({"model", "messages", "token_ids"})
"""Options that mean what they mean for `generate`."""


class PinOptions(TypedDict, total=False):
    """Keyword options of `pin_prefix`."""

    messages: Sequence[Mapping[str, Any]]
    """A conversation instead of a prompt, as in `generate`."""
    token_ids: Sequence[int]
    model: str
    cache_salt: str
    ttl_s: float
    """How long it is kept: a day, if not given."""
    label: str
    """Your name for it."""
    timeout_s: float | None


@dataclass(frozen=True, slots=True)
class PinnedPrefix:
    """A prefix that is kept whatever comes."""

    pin_id: str
    label: str
    num_blocks: int
    num_stored_blocks: int
    """Leading blocks that are stored now; the others are kept once a request has computed them."""
    num_bytes: int
    remaining_s: float


def pin_request(prompt: str | None, options: PinOptions) -> inference_pb2.PinPrefixRequest:
    """The request to pin a prompt.

    Raises:
        InvalidRequest: not exactly one form of prompt, or an option is not of its type.
    """
    shared = {name: value for name, value in options.items() if name in _SHARED}
    given = generate_request(prompt, cast("GenerateOptions", shared))
    request = inference_pb2.PinPrefixRequest(model=given.model)
    form = given.WhichOneof("prompt")
    if form == "text":
        request.text = given.text
    elif form == "chat":
        request.chat.CopyFrom(given.chat)
    else:
        request.tokens.CopyFrom(given.tokens)
    try:
        request.cache_salt = options.get("cache_salt", "")
        request.label = options.get("label", "")
        if "ttl_s" in options:
            request.ttl.FromMilliseconds(round(options["ttl_s"] * 1000))
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(f"a value does not fit its field: {error}") from error
    return request


def pinned_from(pin: common_pb2.Pin) -> PinnedPrefix:
    """A pin."""
    return PinnedPrefix(
        pin_id=pin.pin_id,
        label=pin.label,
        num_blocks=pin.num_blocks,
        num_stored_blocks=pin.num_stored_blocks,
        num_bytes=pin.bytes,
        remaining_s=pin.remaining.ToMilliseconds() / 1000,
    )
