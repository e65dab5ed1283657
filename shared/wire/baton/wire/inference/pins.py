"""Prefixes that the cache keeps from eviction: how a pin is asked for, and what it holds."""

from __future__ import annotations

from dataclasses import dataclass

from baton.core.prompt import Prompt
from baton.v1 import common_pb2
from baton.v1 import inference_pb2 as pb2
from baton.wire.fields import as_message, as_value
from baton.wire.inference.requests import checked_salt, fitting, prompt_from_pb
from baton.wire.prompt import prompt_fields
from baton.wire.timing import duration_from_pb, seconds_from_pb


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


def pin_request_to_pb(request: PinRequest) -> pb2.PinPrefixRequest:
    """The wire's form.

    Raises:
        InvalidRequest: a value does not fit its field.
    """
    with fitting():
        return as_message(pb2.PinPrefixRequest, request, **prompt_fields(request.prompt))


def pin_request_from_pb(pb: pb2.PinPrefixRequest) -> PinRequest:
    """A request with checked values.

    Raises:
        InvalidRequest: a value is out of range, or the prompt is empty.
    """
    ttl_s = duration_from_pb(pb.ttl, "ttl") if pb.HasField("ttl") else None
    checked_salt(pb.cache_salt)
    return as_value(PinRequest, pb, prompt=prompt_from_pb(pb), ttl_s=ttl_s)


def pin_to_pb(pin: PinnedPrefix) -> common_pb2.Pin:
    """The wire's form."""
    return as_message(common_pb2.Pin, pin, bytes=pin.num_bytes)


def pin_from_pb(pb: common_pb2.Pin) -> PinnedPrefix:
    """A pin."""
    remaining_s = seconds_from_pb(pb.remaining)
    return as_value(PinnedPrefix, pb, num_bytes=pb.bytes, remaining_s=remaining_s)
