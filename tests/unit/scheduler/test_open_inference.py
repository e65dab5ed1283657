"""Requests of the Open Inference Protocol: nonsense is refused, and nothing else."""

from __future__ import annotations

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from baton.core.errors import BatonError
from baton.core.sampling import SamplingParams
from baton.oip import open_inference_pb2 as pb
from baton.scheduler.oip.servicer import wish_of
from baton.scheduler.oip.wish import PARAMETERS
from tests.support.protobuf_strategies import messages

NAMES = ["text_input", "input_ids", *PARAMETERS]
DATATYPES = ["BYTES", "BOOL", "INT8", "INT64", "UINT32", "UINT64", "FP32", "FP64", "FP16", ""]


@st.composite
def nonsense(draw: st.DrawFn) -> Message:
    """Any message, some with names and datatypes that mean something."""
    request = draw(messages(pb.ModelInferRequest.DESCRIPTOR))
    assert isinstance(request, pb.ModelInferRequest)
    for tensor in request.inputs:
        if draw(st.booleans()):
            tensor.name = draw(st.sampled_from(NAMES))
            tensor.datatype = draw(st.sampled_from(DATATYPES))
    for name in draw(st.lists(st.sampled_from([*NAMES, "timeout"]), max_size=4)):
        request.parameters[name].CopyFrom(draw(messages(pb.InferParameter.DESCRIPTOR)))
    return request


@given(nonsense())
def test_nonsense_is_refused_with_a_typed_error(request: pb.ModelInferRequest) -> None:
    try:
        wish = wish_of(request)
    except BatonError:
        return
    assert isinstance(wish.sampling.check(), SamplingParams)
    assert wish.prompt


def test_one_value_in_any_shape_of_one_value_is_taken() -> None:
    for shape in ([], [1], [1, 1]):
        request = pb.ModelInferRequest()
        request.inputs.add(name="text_input", datatype="BYTES", shape=shape)
        request.inputs[0].contents.bytes_contents.append(b"hello")
        assert wish_of(request).prompt == "hello"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_numbers_that_are_none_are_refused(value: float) -> None:
    request = pb.ModelInferRequest()
    request.inputs.add(name="text_input", datatype="BYTES").contents.bytes_contents.append(b"x")
    request.parameters["temperature"].double_param = value
    with pytest.raises(BatonError, match="temperature must be"):
        wish_of(request)
