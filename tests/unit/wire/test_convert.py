"""Conversion: nothing is lost on the way, and nothing is taken on trust."""

from __future__ import annotations

import math

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from baton.core.cluster import Announcement, ServiceState, ServiceStatus, WorkerRates
from baton.core.errors import ErrorReason, InvalidRequest, Unsupported
from baton.core.guide import Guide, GuideKind
from baton.core.hashing import Fingerprint, KvGroup, KvLayout
from baton.core.sampling import DraftSource, FinishReason, SamplingParams, TokenLogprob
from baton.v1 import common_pb2, inference_pb2
from baton.wire import layout as layout_module
from baton.wire.announcement import (
    KvEvent,
    announcement_from_bytes,
    announcement_to_bytes,
    kv_event_from_bytes,
    kv_event_to_bytes,
    rates_from_pb,
    rates_to_pb,
)
from baton.wire.cluster import status_from_pb, status_to_pb
from baton.wire.errors import reason_from_pb, reason_to_pb
from baton.wire.sampling import (
    finish_from_pb,
    finish_to_pb,
    logprob_from_pb,
    logprob_to_pb,
    sampling_from_pb,
    sampling_to_pb,
)
from baton.wire.timing import duration_from_pb, duration_to_pb

FINGERPRINT = Fingerprint("m", "c", "w", "t", KvLayout.one_group(16, "bfloat16", (2, 4), (8, 16)))
STATUS = ServiceStatus(
    worker_id="decode-1",
    role="decode",
    address="127.0.0.1:7005",
    state=ServiceState.READY,
    model="m",
    fingerprint=FINGERPRINT,
    kv_blocks={"free": 3, "in_use": 1},
    num_requests_running=1,
    num_requests_waiting=2,
    uptime_s=12.5,
    pid=77,
    metrics_address="127.0.0.1:9",
    stats={"x": 0.25},
    version="0.1.0",
    cores=(0, 1),
)
RATES = WorkerRates(100.0, 0.01, 7, 1e9, 64)


def test_sampling_keeps_every_field() -> None:
    params = SamplingParams(
        temperature=0.5,
        top_k=40,
        top_p=0.75,
        min_p=0.125,
        repetition_penalty=1.25,
        frequency_penalty=-0.5,
        presence_penalty=0.5,
        logit_bias={7: -1.5},
        max_tokens=5,
        min_tokens=2,
        stop=("a", "b"),
        stop_token_ids=(1, 2),
        ignore_eos=True,
        seed=2**64 - 1,
        logprobs=True,
        top_logprobs=3,
        prompt_logprobs=2,
        speculation=False,
        draft_source=DraftSource.NGRAM,
    )
    assert all(
        getattr(params, name) != getattr(SamplingParams(), name)
        for name in params.__slots__
        if name != "guide"
    ), "the test must set every field to something else than its default"
    assert sampling_from_pb(sampling_to_pb(params)) == params


@pytest.mark.parametrize(
    "guide",
    [
        Guide(GuideKind.JSON_SCHEMA, '{"type": "object"}'),
        Guide(GuideKind.JSON_OBJECT),
        Guide(GuideKind.REGEX, "a+"),
        Guide(GuideKind.LARK, 'start: "a"'),
        Guide.choice(["yes", 'n"ö']),
    ],
)
def test_guides_come_back_as_they_went(guide: Guide) -> None:
    params = SamplingParams(guide=guide)
    assert sampling_from_pb(sampling_to_pb(params)) == params


@pytest.mark.parametrize(
    "guide",
    [
        common_pb2.Guide(),
        common_pb2.Guide(json_object=False),
        common_pb2.Guide(json_schema="{"),
        common_pb2.Guide(choice=common_pb2.Choices()),
    ],
)
def test_guides_are_checked_on_arrival(guide: common_pb2.Guide) -> None:
    with pytest.raises(InvalidRequest, match="guide"):
        sampling_from_pb(common_pb2.SamplingParams(guide=guide))


def test_absent_sampling_fields_take_the_defaults_and_present_zeros_do_not() -> None:
    assert sampling_from_pb(common_pb2.SamplingParams()) == SamplingParams()
    greedy = sampling_from_pb(common_pb2.SamplingParams(temperature=0.0, seed=0))
    assert greedy.is_greedy
    assert greedy.seed == 0
    assert sampling_from_pb(sampling_to_pb(SamplingParams())) == SamplingParams()


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("temperature", -1.0, "temperature must be in [0, 100], got -1"),
        ("temperature", math.nan, "temperature must be in [0, 100], got nan"),
        ("temperature", math.inf, "temperature"),
        ("top_p", 0.0, "top_p must be in (0, 1], got 0"),
        ("min_p", 1.5, "min_p"),
        ("repetition_penalty", 0.0, "repetition_penalty"),
        ("frequency_penalty", 2.5, "frequency_penalty"),
        ("presence_penalty", math.nan, "presence_penalty"),
        ("max_tokens", 0, "max_tokens must be in [1"),
        ("top_logprobs", 21, "top_logprobs must be in [0, 20], got 21"),
        ("stop", [""], "stop must be at most 16 texts"),
        ("stop", ["x"] * 17, "stop must be at most 16 texts"),
        ("stop_token_ids", [1] * 1025, "stop_token_ids must have at most 1024 entries, got 1025"),
        ("logit_bias", {3: math.nan}, "logit_bias[3]"),
        ("logit_bias", dict.fromkeys(range(1025), 0.0), "logit_bias must have at most 1024"),
    ],
)
def test_sampling_out_of_range_names_field_and_range(
    field: str, value: object, expected: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        sampling_from_pb(common_pb2.SamplingParams(**{field: value}))
    assert expected in caught.value.message


def test_enums_mirror_the_wire() -> None:
    for reason in ErrorReason:
        pb = reason_to_pb(reason)
        assert common_pb2.ErrorReason.Name(pb) == f"ERROR_REASON_{reason.name}"
        assert reason_from_pb(pb) is reason
    assert reason_from_pb(0) is ErrorReason.INTERNAL
    assert reason_from_pb(999) is ErrorReason.INTERNAL
    for finish in (None, *FinishReason):
        pb_finish = finish_to_pb(finish)
        name = finish.name if finish else "UNSPECIFIED"
        assert common_pb2.FinishReason.Name(pb_finish) == f"FINISH_REASON_{name}"
        assert finish_from_pb(pb_finish) is finish
    with pytest.raises(InvalidRequest):
        finish_from_pb(9)


@given(st.floats(min_value=0.0, max_value=1e7))
def test_durations_survive_to_the_nanosecond(seconds: float) -> None:
    pb = duration_to_pb(seconds)
    assert 0 <= pb.nanos < 1_000_000_000
    assert duration_from_pb(pb) == pytest.approx(seconds, abs=2e-9)


def test_durations_out_of_range_are_refused() -> None:
    assert duration_to_pb(-1e-9) == Duration()
    for pb in (Duration(seconds=-1), Duration(nanos=-1), Duration(seconds=10**9)):
        with pytest.raises(InvalidRequest, match="lease must be in"):
            duration_from_pb(pb, "lease")


def test_logprobs_survive_and_are_checked() -> None:
    logprob = TokenLogprob(-0.5, (3, 4), (-0.5, -1.5))
    assert logprob_from_pb(logprob_to_pb(logprob)) == logprob
    for pb in (
        common_pb2.TokenLogprob(logprob=math.nan),
        common_pb2.TokenLogprob(top_token_ids=[1]),
        common_pb2.TokenLogprob(top_token_ids=[1], top_logprobs=[math.nan]),
    ):
        with pytest.raises(InvalidRequest):
            logprob_from_pb(pb)


def test_fingerprint_survives_and_its_layout_is_checked() -> None:
    pb = layout_module.fingerprint_to_pb(FINGERPRINT)
    assert layout_module.fingerprint_from_pb(pb) == FINGERPRINT
    for damage in (
        {"block_size": 0},
        {"dtype": "int4"},
        {"num_kv_heads": [1]},
        {"num_kv_heads": [], "head_dim": []},
        {"head_dim": [0, 1]},
    ):
        layout = common_pb2.KvLayout(**{
            "block_size": 16,
            "dtype": "float32",
            "num_kv_heads": [1, 1],
            "head_dim": [8, 8],
            **damage,
        })
        with pytest.raises(InvalidRequest, match=r"layout\."):
            layout_module.fingerprint_from_pb(common_pb2.ModelFingerprint(layout=layout))


def test_a_layout_of_several_groups_is_not_sent_as_one() -> None:
    group = KvGroup((2,), (8,))
    with pytest.raises(Unsupported, match="one group on the wire, not 2"):
        layout_module.layout_to_pb(KvLayout(16, "bfloat16", (group, group)))


def test_announcement_survives() -> None:
    announcement = Announcement(STATUS, lease_s=3.0, rates=RATES, leaving=True)
    data = announcement_to_bytes(announcement)
    assert announcement_from_bytes(data) == announcement


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xff\xff",
        b"plain text",
        kv_event_to_bytes(KvEvent("w", 1, (), ())),
    ],
)
def test_what_is_no_announcement_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest):
        announcement_from_bytes(data)


def test_a_lease_cannot_be_endless() -> None:
    data = announcement_to_bytes(Announcement(STATUS, lease_s=301.0))
    with pytest.raises(InvalidRequest, match=r"lease must be in \[0, 300\] s, got 301 s"):
        announcement_from_bytes(data)


def test_status_with_unknown_state_or_bad_rate_is_refused() -> None:
    pb = status_to_pb(STATUS)
    pb.state = "asleep"
    with pytest.raises(InvalidRequest, match="one of starting, ready, draining, lost"):
        status_from_pb(pb)
    with pytest.raises(InvalidRequest, match="worker_id"):
        status_from_pb(inference_pb2.ServiceStatus(role="decode", state="ready"))
    rates = rates_to_pb(RATES)
    rates.decode_step_s = math.nan
    with pytest.raises(InvalidRequest, match="decode_step_s"):
        rates_from_pb(rates)


def test_kv_event_survives_and_is_checked() -> None:
    event = KvEvent("decode-1", 5, (b"a" * 16,), (b"b" * 16, b"c" * 16))
    assert kv_event_from_bytes(kv_event_to_bytes(event)) == event
    for bad in (
        KvEvent("", 5, (), ()),
        KvEvent("w", 0, (), ()),
        KvEvent("w", 1, (b"short",), ()),
    ):
        with pytest.raises(InvalidRequest):
            kv_event_from_bytes(kv_event_to_bytes(bad))
