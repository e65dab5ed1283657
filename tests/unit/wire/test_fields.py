"""Fields of the same name are carried over, and none is forgotten."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from baton.core.errors import InvalidRequest
from baton.v1 import common_pb2, decode_pb2, inference_pb2
from baton.wire.fields import as_message, as_value, parsed


@dataclass(frozen=True)
class Lease:
    reservation_id: str
    epoch: int
    lease_s: float
    num_blocks: int = 0
    num_cached_blocks: int = 0
    push_address: str = ""


@dataclass(frozen=True)
class Shorter:
    model: str = "default"


@dataclass(frozen=True)
class Longer:
    model: str
    novelty: int = 0


@dataclass(frozen=True)
class Sampled:
    temperature: float = 0.5
    stop: tuple[str, ...] = ()
    logit_bias: object = None
    seed: int | None = None


def test_names_decide_and_durations_are_seconds() -> None:
    lease = Lease("r", 3, 1.5, push_address="h:1")
    pb = as_message(decode_pb2.ReserveResponse, lease)
    assert (pb.lease.seconds, pb.lease.nanos) == (1, 500_000_000)
    assert as_value(Lease, pb) == lease


def test_a_duration_out_of_range_is_refused_by_its_name() -> None:
    pb = decode_pb2.ReserveResponse()
    pb.lease.seconds = -1
    with pytest.raises(InvalidRequest, match="lease must be in"):
        as_value(Lease, pb)


def test_absent_numbers_take_the_default_and_present_zeros_do_not() -> None:
    assert as_value(Sampled, common_pb2.SamplingParams()).temperature == 0.5
    found = as_value(
        Sampled, common_pb2.SamplingParams(temperature=0.0, stop=["a"], logit_bias={1: 2.0})
    )
    assert found == Sampled(0.0, ("a",), {1: 2.0})


def test_what_is_given_wins() -> None:
    assert as_value(Shorter, inference_pb2.ModelInfo(model="a"), model="b").model == "b"
    assert as_message(inference_pb2.TokenizeRequest, Shorter("a"), model="b", text="t").text == "t"


def test_a_field_that_no_side_sets_is_a_mistake() -> None:
    with pytest.raises(TypeError, match=r"Longer\.novelty"):
        as_value(Longer, inference_pb2.ModelInfo())
    with pytest.raises(TypeError, match=r"ModelInfo\.max_model_len_tokens"):
        as_message(inference_pb2.ModelInfo, Longer("m"))


def test_bytes_that_hold_no_message_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"header must be a baton\.v1\.Pin"):
        parsed(common_pb2.Pin, b"\xff", "header")
