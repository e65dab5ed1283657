"""The public service under nonsense: no INTERNAL, no UNKNOWN, no call without an end, no leak."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton.v1 import common_pb2, inference_pb2
from tests.support.protobuf_strategies import messages
from tests.support.system import System
from tests.support.tiers import representatives

pytestmark = pytest.mark.timeout(240)
SERVICE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"]
METHODS = sorted(SERVICE.methods_by_name)
TIMEOUT_S = 2.0
GRACE_S = 5.0
DEFECTS = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS}
examples = pytest.mark.parametrize("num_examples", representatives([120, 1500], {120}))


def many(num_examples: int) -> settings:
    return settings(
        max_examples=num_examples,
        deadline=None,
        suppress_health_check=[*HealthCheck],
        derandomize=True,
    )


@pytest.fixture
def channel(system: System) -> Iterator[grpc.Channel]:
    """A channel; afterwards nothing may be held, nobody may have died, and it still serves."""
    address = next(p.address for p in system.processes if p.role == "scheduler")
    with grpc.insecure_channel(address) as channel:
        yield channel
        call = start(channel, "Generate", valid().SerializeToString(), 20.0)
        assert sum(answer_tokens(answer) for answer in call) == 4
    assert_nothing_held(system)
    assert {p.role for p in system.processes if p.popen.poll() is not None} == set()


def assert_nothing_held(system: System) -> None:
    with ThreadPoolExecutor(1) as pool:  # this thread's loop is the fixture's
        pool.submit(asyncio.run, system.assert_nothing_held(10.0)).result(30)


def answer_tokens(data: bytes) -> int:
    return len(inference_pb2.GenerateResponse.FromString(data).token_ids)


def valid() -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        tokens=inference_pb2.TokenPrompt(token_ids=[9, 10, 11] * 20),
        sampling=common_pb2.SamplingParams(max_tokens=4, ignore_eos=True, temperature=0.0),
        return_token_ids=True,
    )


def requests(name: str) -> st.SearchStrategy[bytes]:
    """Random messages of a method, and such that are nearly right."""
    random = messages(SERVICE.methods_by_name[name].input_type)
    if name != "Generate":
        return random.map(lambda message: message.SerializeToString())

    def merged(message: Message) -> bytes:
        request = valid()
        request.MergeFrom(message)  # type: ignore[arg-type]
        return request.SerializeToString()

    return st.one_of(random.map(lambda message: message.SerializeToString()), random.map(merged))


CALLS = st.sampled_from(METHODS).flatmap(lambda name: st.tuples(st.just(name), requests(name)))


def start(channel: grpc.Channel, name: str, request: bytes, timeout_s: float = TIMEOUT_S) -> Any:
    """Starts a call on raw bytes; its answers can be iterated."""
    path = f"/{SERVICE.full_name}/{name}"
    if SERVICE.methods_by_name[name].server_streaming:
        return channel.unary_stream(path)(request, timeout=timeout_s)
    return OneAnswer(channel.unary_unary(path).future(request, timeout=timeout_s))


class OneAnswer:
    """A unary call with a stream's face."""

    def __init__(self, future: Any) -> None:
        self.future = future

    def __iter__(self) -> Iterator[bytes]:
        yield self.future.result()

    def cancel(self) -> None:
        self.future.cancel()


def code_of(error: Any) -> grpc.StatusCode:
    code: grpc.StatusCode = error.code()
    if code in DEFECTS:
        raise AssertionError(f"a defect: {error}") from error
    return code


def ends_well(call: Any) -> grpc.StatusCode:
    began_at_s = time.monotonic()
    code = grpc.StatusCode.OK
    try:
        for _ in call:
            pass
    except grpc.RpcError as error:
        code = code_of(error)
    except grpc.FutureCancelledError:
        code = grpc.StatusCode.CANCELLED
    assert time.monotonic() - began_at_s < TIMEOUT_S + GRACE_S, "it hangs"
    return code


@examples
def test_random_messages(channel: grpc.Channel, num_examples: int) -> None:
    seen: set[grpc.StatusCode] = set()

    @many(num_examples)
    @given(CALLS)
    def fuzz(call: tuple[str, bytes]) -> None:
        seen.add(ends_well(start(channel, *call)))

    fuzz()
    # It is not all refused at the door, and not all let in.
    assert {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT} <= seen


@examples
def test_random_bytes(channel: grpc.Channel, num_examples: int) -> None:
    seen: set[grpc.StatusCode] = set()

    @many(num_examples)
    @given(st.sampled_from(METHODS), st.binary(max_size=200))
    def fuzz(name: str, request: bytes) -> None:
        seen.add(ends_well(start(channel, name, request)))

    fuzz()
    assert grpc.StatusCode.INVALID_ARGUMENT in seen


@examples
def test_damaged_messages(channel: grpc.Channel, num_examples: int) -> None:
    whole = valid().SerializeToString()

    @many(num_examples)
    @given(st.integers(0, len(whole) - 1), st.binary(max_size=4), st.integers(0, 4))
    def fuzz(at: int, change: bytes, num_removed: int) -> None:
        damaged = whole[:at] + change + whole[at + num_removed :]
        ends_well(start(channel, "Generate", damaged))

    fuzz()


@examples
def test_random_sequences_with_abrupt_cancels(channel: grpc.Channel, num_examples: int) -> None:
    steps = st.lists(
        st.tuples(CALLS, st.sampled_from(["leave", "cancel", "read one", "read"])),
        min_size=1,
        max_size=8,
    )

    @many(num_examples // 4)
    @given(steps)
    def fuzz(sequence: list[tuple[tuple[str, bytes], str]]) -> None:
        started = [(start(channel, *call), what) for call, what in sequence]
        for call, what in started:
            if what == "cancel":
                call.cancel()
            elif what == "read one":
                try:
                    next(iter(call), None)
                except grpc.RpcError as error:
                    code_of(error)
                call.cancel()
            elif what == "read":
                ends_well(call)
        for call, _ in started:
            call.cancel()

    fuzz()


def test_a_client_that_vanishes(system: System) -> None:
    """Its connection is closed with calls at every stage."""
    address = next(p.address for p in system.processes if p.role == "scheduler")
    for delay_s in (0.0, 0.01, 0.03, 0.1):
        with grpc.insecure_channel(address) as doomed:
            request = valid()
            request.sampling.max_tokens = 200
            calls = [start(doomed, "Generate", request.SerializeToString()) for _ in range(4)]
            threading.Event().wait(delay_s)
        assert len(calls) == 4
    assert_nothing_held(system)
