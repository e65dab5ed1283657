"""Prefixes that the cache keeps from eviction: how a pin is asked for, and what it holds."""

from __future__ import annotations

from dataclasses import dataclass

from baton.core.prompt import Prompt
from baton.v1 import common_pb2, inference_pb2
from baton.wire.inference.requests import checked_salt, fitting, prompt_fields, prompt_from_pb
from baton.wire.timing import duration_from_pb, duration_to_pb, seconds_from_pb


@dataclass(frozen=True, slots=True)
class PinRequest:
    """A prompt whose KV the cache shall keep."""

    prompt: Prompt
    model: str = ""
    cache_salt: str = ""
    ttl_s: float | None = None
    """How long; None takes the scheduler's default."""
    label: str = ""
    """The caller's name for the pin."""


@dataclass(frozen=True, slots=True)
class PinnedPrefix:
    """A prefix that the cache keeps from eviction."""

    pin_id: str
    label: str
    num_blocks: int
    num_stored_blocks: int
    """Leading blocks that are stored now; the others are kept once a request has computed them."""
    num_bytes: int
    remaining_s: float


def pin_request_to_pb(request: PinRequest) -> inference_pb2.PinPrefixRequest:
    """The wire's form.

    Raises:
        InvalidRequest: a value does not fit its field.
    """
    with fitting():
        return inference_pb2.PinPrefixRequest(
            model=request.model,
            cache_salt=request.cache_salt,
            ttl=None if request.ttl_s is None else duration_to_pb(request.ttl_s),
            label=request.label,
            **prompt_fields(request.prompt),
        )


def pin_request_from_pb(pb: inference_pb2.PinPrefixRequest) -> PinRequest:
    """A request with checked values.

    Raises:
        InvalidRequest: a value is out of range, or the prompt is empty.
    """
    return PinRequest(
        prompt=prompt_from_pb(pb),
        model=pb.model,
        cache_salt=checked_salt(pb.cache_salt),
        ttl_s=duration_from_pb(pb.ttl, "ttl") if pb.HasField("ttl") else None,
        label=pb.label,
    )


def pin_to_pb(pin: PinnedPrefix) -> common_pb2.Pin:
    """The wire's form."""
    return common_pb2.Pin(
        pin_id=pin.pin_id,
        label=pin.label,
        num_blocks=pin.num_blocks,
        num_stored_blocks=pin.num_stored_blocks,
        bytes=pin.num_bytes,
        remaining=duration_to_pb(pin.remaining_s),
    )


def pin_from_pb(pb: common_pb2.Pin) -> PinnedPrefix:
    """A pin."""
    return PinnedPrefix(
        pin_id=pb.pin_id,
        label=pb.label,
        num_blocks=pb.num_blocks,
        num_stored_blocks=pb.num_stored_blocks,
        num_bytes=pb.bytes,
        remaining_s=seconds_from_pb(pb.remaining),
    )
