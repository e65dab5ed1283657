"""The Open Inference Protocol: Triton's own client unchanged, and plain calls."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio

from baton.core.errors import ErrorReason, InvalidRequest
from baton.oip import open_inference_pb2 as pb
from baton.oip import open_inference_pb2_grpc
from baton.scheduler.oip.wish import from_raw, to_raw
from baton.wire.errors import error_from_rpc
from tests.support.eventually import eventually
from tests.support.fake_workers import expected_text
from tests.support.repository import ROOT
from tests.support.scheduler_rig import Rig


@pytest_asyncio.fixture
async def rig() -> AsyncIterator[Rig]:
    async with Rig() as rig:
        yield rig


@pytest_asyncio.fixture
async def stub(rig: Rig) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(rig.address) as channel:
        yield open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)


def _request(text: str = "hello", **parameters: Any) -> pb.ModelInferRequest:
    """Values are in `contents`, as KServe's plain clients send them."""
    request = pb.ModelInferRequest(model_name="demo", id="x")
    if text:
        tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(text.encode())
    fields = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
    for name, value in {"max_tokens": 8, **parameters}.items():
        setattr(request.parameters[name], fields[type(value)], value)
    return request


async def test_tritons_client_works_unchanged(rig: Rig) -> None:
    if importlib.util.find_spec("tritonclient") is None:
        pytest.skip("tritonclient is not installed: pip install 'tritonclient[grpc]'")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.support.triton_caller",
        rig.address,
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    report = json.loads(out)
    assert (report["live"], report["ready"], report["server"]) == (True, True, "baton")
    assert report["model_ready"] == [True, False]
    assert {"text_input", "max_tokens", "temperature", "stream", "seed"} <= set(report["inputs"])
    text = expected_text("hello", 8)
    assert report["infer"] == {
        "text": text,
        "ids": [ord(letter) for letter in text],
        "id": "mine",
        "finish_reason": "length",
        "prompt_tokens": 5,
    }
    assert [status for status, _ in report["refused"]] == ["StatusCode.INVALID_ARGUMENT"] * 2
    assert "max_tokens must be" in report["refused"][0][1]
    assert "'unheard_of' is neither" in report["refused"][1][1]
    texts = report["stream"]["texts"]
    assert "".join(texts["a"]) == text
    assert "".join(texts["b"]) == expected_text("other", 5)
    assert len(texts["a"]) > 2
    assert texts["a"][-1] == ""  # the empty last one that was asked for
    assert texts["b"][-1] != ""
    [error] = report["stream"]["errors"]
    assert error.startswith("PROMPT_TOO_LONG: ")
    _assert_same_contract(report["contract"])
    await eventually(rig.nothing_held)


def _assert_same_contract(theirs: dict[str, Any]) -> None:
    service = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    for method in service.methods:
        ours = [method.input_type.name, method.output_type.name]
        assert theirs["methods"][method.name] == ours
    for message in pb.DESCRIPTOR.message_types_by_name.values():
        _assert_same_message(message, theirs["messages"][message.name])


def _assert_same_message(message: Any, theirs: dict[str, Any]) -> None:
    assert {field.name: [field.number, field.type] for field in message.fields} == theirs["fields"]
    for nested in message.nested_types:
        _assert_same_message(nested, theirs["nested"][nested.name])


async def test_contents_are_answered_with_contents(stub: Any) -> None:
    request = _request(seed=5, stop="never")
    for name in ("finish_reason", "text_output"):
        request.outputs.add(name=name)
    response = await stub.ModelInfer(request, timeout=20)
    assert [output.name for output in response.outputs] == ["finish_reason", "text_output"]
    reason, text = (output.contents.bytes_contents[0].decode() for output in response.outputs)
    assert (reason, text) == ("length", expected_text("hello", 8))
    assert not response.raw_output_contents
    assert (response.id, response.model_name, response.model_version) == ("x", "demo", "1")
    assert response.parameters["completion_tokens"].int64_param == 8


async def test_token_ids_are_a_prompt_too(stub: Any) -> None:
    request = _request("", max_tokens=3)
    tensor = request.inputs.add(name="input_ids", datatype="INT64", shape=[2])
    tensor.contents.int64_contents.extend(map(ord, "ab"))
    response = await stub.ModelInfer(request, timeout=20)
    assert response.outputs[0].contents.bytes_contents[0].decode() == expected_text("ab", 3)


def _without_model() -> pb.ModelInferRequest:
    request = _request()
    request.model_name = "other"
    return request


def _of_version(version: str) -> pb.ModelInferRequest:
    request = _request()
    request.model_version = version
    return request


def _raw(*data: bytes) -> pb.ModelInferRequest:
    request = _request()
    request.inputs[0].ClearField("contents")
    request.raw_input_contents.extend(data)
    return request


def _shaped(*shape: int) -> pb.ModelInferRequest:
    request = _request()
    request.inputs[0].shape[:] = shape
    return request


def _wanting(name: str) -> pb.ModelInferRequest:
    request = _request()
    request.outputs.add(name=name)
    return request


@pytest.mark.parametrize(
    ("asked", "reason", "message"),
    [
        (_without_model(), ErrorReason.MODEL_NOT_FOUND, "'other'"),
        (_of_version("2"), ErrorReason.MODEL_NOT_FOUND, "version"),
        (_request(""), ErrorReason.INVALID_REQUEST, "exactly one of the tensors"),
        (_request(max_tokens="8"), ErrorReason.INVALID_REQUEST, "max_tokens must be of type int"),
        (_request(temperature=-1), ErrorReason.INVALID_REQUEST, "temperature must be"),
        (_request(seed=-1), ErrorReason.INVALID_REQUEST, "seed must be"),
        (_request(timeout=-1), ErrorReason.INVALID_REQUEST, "microseconds"),
        (_request(stream=True), ErrorReason.UNSUPPORTED, "ModelStreamInfer"),
        (_request(sequence_id=4), ErrorReason.INVALID_REQUEST, "'sequence_id' is neither"),
        (_raw(b"\x09\0\0\0hello"), ErrorReason.INVALID_REQUEST, "no BYTES values"),
        (_raw(b"", b""), ErrorReason.INVALID_REQUEST, "2 entries for 1 inputs"),
        (_wanting("logits"), ErrorReason.INVALID_REQUEST, "no output 'logits'"),
        (_shaped(2), ErrorReason.INVALID_REQUEST, "shape [2] is not that of 1 values"),
        (_shaped(1 << 62, 4), ErrorReason.INVALID_REQUEST, "is not that of 1 values"),
        (_shaped(-1, -1), ErrorReason.INVALID_REQUEST, "sizes, from 0 up"),
        (_shaped(*[1 << 62] * 300_000), ErrorReason.INVALID_REQUEST, "at most 8 sizes"),
    ],
)
async def test_bad_requests_say_what_is_wrong(
    stub: Any, asked: pb.ModelInferRequest, reason: ErrorReason, message: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ModelInfer(asked, timeout=20)
    error = error_from_rpc(caught.value)
    assert error.reason is reason
    assert message in error.message


async def test_a_timeout_in_microseconds_ends_the_request(rig: Rig, stub: Any) -> None:
    rig.prefills[0].pauses.hold("compute")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ModelInfer(_request(timeout=200_000), timeout=20)
    assert error_from_rpc(caught.value).reason is ErrorReason.DEADLINE
    await eventually(rig.nothing_held)


async def test_leaving_a_stream_cancels_its_requests(rig: Rig, stub: Any) -> None:
    rig.prefills[0].pauses.hold("compute")
    call = stub.ModelStreamInfer()
    for _ in range(3):
        await call.write(pb.ModelInferRequest.FromString(_request(stream=True).SerializeToString()))
    await eventually(lambda: rig.service.snapshot().num_running == 3)
    call.cancel()
    await eventually(lambda: rig.service.snapshot().num_running == 0)
    await eventually(rig.nothing_held)


@pytest.mark.parametrize(
    ("datatype", "values"),
    [
        ("BOOL", (True, False)),
        ("INT32", (-1, 5)),
        ("UINT64", (1 << 63,)),
        ("FP64", (0.5,)),
        ("BYTES", (b"", b"ab", b"\xff")),
        ("INT8", ()),
    ],
)
def test_raw_contents_there_and_back(datatype: str, values: tuple[Any, ...]) -> None:
    assert from_raw("t", datatype, to_raw(datatype, values)) == values


@pytest.mark.parametrize(
    ("datatype", "data"),
    [("INT32", b"abc"), ("BYTES", b"ab"), ("BYTES", b"\x05\0\0\0ab"), ("FP16", b"ab")],
)
def test_raw_contents_that_do_not_fit_are_refused(datatype: str, data: bytes) -> None:
    with pytest.raises(InvalidRequest):
        from_raw("t", datatype, data)
