"""GRPCInferenceService on the wire: KServe's and Triton's clients, over the same orchestrator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from math import prod
from typing import Any

from baton.core.errors import BatonError, InvalidRequest, ModelNotFound, Unsupported
from baton.core.ids import make_id
from baton.oip import open_inference_pb2 as pb
from baton.oip import open_inference_pb2_grpc
from baton.rpc.logs import bind_request_id
from baton.rpc.version import VERSION
from baton.scheduler.attempt import SchedulerDeps
from baton.scheduler.front import salted
from baton.scheduler.oip.wish import (
    DATATYPES,
    PARAMETERS,
    TEXT_INPUT,
    TOKEN_INPUT,
    Scalar,
    Tensor,
    Wish,
    from_raw,
    read_wish,
    to_raw,
)
from baton.scheduler.orchestrator import Orchestrator
from baton.wire.errors import public_message
from baton.wire.inference.chunks import Chunk
from baton.wire.inference.requests import GenerateRequest
from baton.wire.inference.serving import Emit

MODEL_VERSION = "1"
MAX_STREAMED_AT_ONCE = 64
"""Requests of one ModelStreamInfer call that run side by side; further ones wait unread."""
MAX_DIMENSIONS = 8
_OUTPUTS = {"text_output": "BYTES", "output_ids": "UINT32", "finish_reason": "BYTES"}
_CONTENTS = {
    **{
        name: f"{name.lower()}_contents"
        for name in ("BOOL", "INT64", "UINT64", "FP32", "FP64", "BYTES")
    },
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
}
Send = Callable[[pb.ModelInferResponse], Awaitable[None]]


class OpenInferenceServicer(open_inference_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers GRPCInferenceService."""

    def __init__(self, orchestrator: Orchestrator, deps: SchedulerDeps) -> None:
        self._orchestrator = orchestrator
        self._deps = deps

    async def ServerLive(
        self, request: pb.ServerLiveRequest, context: Any
    ) -> pb.ServerLiveResponse:
        """The process answers."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(
        self, request: pb.ServerReadyRequest, context: Any
    ) -> pb.ServerReadyResponse:
        """Some model can be used."""
        return pb.ServerReadyResponse(ready=bool(self._deps.cluster.models()))

    async def ModelReady(
        self, request: pb.ModelReadyRequest, context: Any
    ) -> pb.ModelReadyResponse:
        """A model can be used."""
        is_known = request.name in self._deps.cluster.models()
        return pb.ModelReadyResponse(ready=is_known and request.version in {"", MODEL_VERSION})

    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, context: Any
    ) -> pb.ServerMetadataResponse:
        """Name and version."""
        return pb.ServerMetadataResponse(name="baton", version=VERSION)

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: Any
    ) -> pb.ModelMetadataResponse:
        """What a model takes and gives."""
        model = self._resolve(request.name, request.version)
        inputs = {TEXT_INPUT: "BYTES", TOKEN_INPUT: "INT64"}
        inputs |= {name: DATATYPES[kind] for name, kind in PARAMETERS.items()}
        describe = pb.ModelMetadataResponse.TensorMetadata
        return pb.ModelMetadataResponse(
            name=model,
            versions=[MODEL_VERSION],
            platform="baton",
            inputs=[
                describe(name=name, datatype=datatype, shape=[-1 if name == TOKEN_INPUT else 1])
                for name, datatype in inputs.items()
            ],
            outputs=[
                describe(name=name, datatype=datatype, shape=[-1 if name == "output_ids" else 1])
                for name, datatype in _OUTPUTS.items()
            ],
        )

    async def ModelInfer(
        self, request: pb.ModelInferRequest, context: Any
    ) -> pb.ModelInferResponse:
        """Completes one prompt."""
        wish = wish_of(request)
        if wish.is_stream:
            raise Unsupported("ModelInfer does not stream; call ModelStreamInfer")
        chunks: list[Chunk] = []

        async def keep(chunk: Chunk) -> None:
            chunks.append(chunk)

        model = await self._run(request, wish, context, keep)
        return _response(request, model, chunks)

    async def ModelStreamInfer(
        self, request_iterator: AsyncIterator[pb.ModelInferRequest], context: Any
    ) -> None:
        """Completes prompts side by side, as they come."""
        places = asyncio.Semaphore(MAX_STREAMED_AT_ONCE)
        writing = asyncio.Lock()

        async def send(response: pb.ModelStreamInferResponse) -> None:
            async with writing:  # one call takes one write at a time
                await context.write(response)

        async def answer(request: pb.ModelInferRequest) -> None:
            try:
                await self._stream(request, context, send)
            except BatonError as error:
                failed = pb.ModelInferResponse(id=request.id, model_name=request.model_name)
                failed.parameters["triton_final_response"].bool_param = True
                message = f"{error.reason.name}: {public_message(error)}"
                await send(
                    pb.ModelStreamInferResponse(error_message=message, infer_response=failed)
                )
            finally:
                places.release()

        async with asyncio.TaskGroup() as group:
            async for request in request_iterator:
                await places.acquire()
                group.create_task(answer(request))

    async def _stream(
        self,
        request: pb.ModelInferRequest,
        context: Any,
        send: Callable[[pb.ModelStreamInferResponse], Awaitable[None]],
    ) -> None:
        wish = wish_of(request)
        whole: list[Chunk] = []

        async def relay(model: str, chunks: list[Chunk], *, is_final: bool) -> None:
            response = _response(request, model, chunks)
            response.parameters["triton_final_response"].bool_param = is_final
            await send(pb.ModelStreamInferResponse(infer_response=response))

        async def take(chunk: Chunk) -> None:
            if not wish.is_stream:
                whole.append(chunk)
            elif chunk.text or chunk.token_ids or chunk.finish_reason:
                is_final = bool(chunk.finish_reason) and not wish.has_empty_final
                await relay(chunk.model, [chunk], is_final=is_final)

        model = await self._run(request, wish, context, take)
        if whole:
            await relay(model, whole, is_final=not wish.has_empty_final)
        if wish.has_empty_final:
            await relay(model, [], is_final=True)

    async def _run(
        self,
        request: pb.ModelInferRequest,
        wish: Wish,
        context: Any,
        emit: Emit,
    ) -> str:
        """Runs a request to its end; returns the model that answered."""
        model = self._resolve(request.model_name, request.model_version)
        job = GenerateRequest(
            model=model,
            prompt=wish.prompt,
            sampling=wish.sampling,
            # The caller's id need not be unique here.
            request_id=make_id("oip", self._deps.rng),
            cache_salt=salted(wish.cache_salt),
            keep_special_tokens=wish.keep_special_tokens,
        )
        bind_request_id(job.request_id)
        remaining_s = context.time_remaining()
        limits = (remaining_s, wish.timeout_s, self._deps.settings.request_timeout_s)
        timeout_s = min(limit for limit in limits if limit is not None)

        await self._orchestrator.generate(job, timeout_s, emit)
        return model

    def _resolve(self, name: str, version: str) -> str:
        if version not in {"", MODEL_VERSION}:
            raise ModelNotFound(f"there is only version {MODEL_VERSION!r}, not {version!r}")
        return self._deps.cluster.resolve_model(name)


def wish_of(request: pb.ModelInferRequest) -> Wish:
    """What a request asks for.

    Raises:
        InvalidRequest: it is malformed, or names an unknown output or parameter.
    """
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidRequest(
            f"raw_input_contents has {len(raw)} entries for {len(request.inputs)} inputs"
        )
    wanted = [output.name for output in request.outputs]
    unknown = [name for name in wanted if name not in _OUTPUTS]
    if unknown:
        raise InvalidRequest(f"there is no output {unknown[0]!r}; there are: {', '.join(_OUTPUTS)}")
    tensors: dict[str, Tensor] = {}
    for index, given in enumerate(request.inputs):
        if raw:
            values = from_raw(given.name, given.datatype, raw[index])
        else:
            field = _CONTENTS.get(given.datatype)
            if field is None:
                raise InvalidRequest(f"{given.name}: datatype {given.datatype!r} is not supported")
            values = tuple(getattr(given.contents, field))
        _check_shape(given, len(values))
        if given.name in tensors:
            raise InvalidRequest(f"{given.name} is given twice")
        tensors[given.name] = Tensor(given.name, values)
    parameters: dict[str, Scalar] = {}
    for name, parameter in request.parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is None:
            raise InvalidRequest(f"the parameter {name!r} has no value")
        parameters[name] = getattr(parameter, kind)
    return read_wish(tensors, parameters)


def _check_shape(given: pb.ModelInferRequest.InferInputTensor, num_values: int) -> None:
    """A shape that is left out fits anything."""
    shape = given.shape
    if len(shape) > MAX_DIMENSIONS or min(shape, default=0) < 0:
        raise InvalidRequest(f"{given.name}: a shape has at most {MAX_DIMENSIONS} sizes, from 0 up")
    if shape and prod(shape) != num_values:
        raise InvalidRequest(
            f"{given.name}: shape {list(shape)} is not that of {num_values} values"
        )


def _response(
    request: pb.ModelInferRequest, model: str, chunks: list[Chunk]
) -> pb.ModelInferResponse:
    response = pb.ModelInferResponse(model_name=model, model_version=MODEL_VERSION, id=request.id)
    if not chunks:
        return response
    last = chunks[-1]
    values: dict[str, list[Scalar]] = {
        "text_output": ["".join(chunk.text for chunk in chunks).encode()],
        "output_ids": [token_id for chunk in chunks for token_id in chunk.token_ids],
        "finish_reason": [last.finish_reason.encode()],
    }
    for name in [output.name for output in request.outputs] or ["text_output"]:
        shape, datatype = [len(values[name])], _OUTPUTS[name]
        tensor = response.outputs.add(name=name, datatype=datatype, shape=shape)
        if request.raw_input_contents:
            response.raw_output_contents.append(to_raw(datatype, values[name]))
        else:
            getattr(tensor.contents, _CONTENTS[datatype]).extend(values[name])
    if last.usage is not None:
        response.parameters["finish_reason"].string_param = last.finish_reason
        response.parameters["prompt_tokens"].int64_param = last.usage.prompt_tokens
        response.parameters["completion_tokens"].int64_param = last.usage.completion_tokens
    return response


def add_open_inference_servicer(servicer: OpenInferenceServicer, server: Any) -> str:
    """Adds it to a server; returns the service's full name."""
    open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    return str(pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name)
