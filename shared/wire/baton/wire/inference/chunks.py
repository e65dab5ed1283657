"""Pieces of an answer: what the scheduler emits is what the SDK hands to its user."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from baton.core.output import Usage
from baton.core.request import Stage
from baton.core.sampling import FinishReason
from baton.v1 import common_pb2
from baton.v1 import inference_pb2 as pb2
from baton.wire.fields import as_message, as_value
from baton.wire.sampling import finish_to_pb
from baton.wire.timing import seconds_from_pb

MAX_PART_BYTES = 1 << 20
"""Most prompt log-probabilities in one message; callers accept messages of up to 4 MiB."""
_FINISH_NAMES = {0: "", **{reason.value: reason.name.lower() for reason in FinishReason}}


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One of the most likely tokens at a position."""

    token_id: int
    token: str
    token_bytes: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability (natural) of one token, of the output or the prompt."""

    token_id: int
    token: str
    """Text; incomplete UTF-8 is replaced."""
    token_bytes: bytes
    logprob: float
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class PlacementTaken:
    """Where a request ran, and why. The SDK calls it `Placement`."""

    prefill_worker_id: str = ""
    decode_worker_id: str = ""
    local_prefill: bool = False
    reason: str = ""
    attempts: int = 0
    decode_cached_tokens: int = 0
    prefill_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a streamed answer. Only the last one has a `finish_reason`."""

    text: str = ""
    token_index: int = 0
    """Index of the first output token that the chunk covers."""
    num_tokens: int = 0
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprob, ...] = ()
    prompt_logprobs: tuple[Logprob, ...] = ()
    """Of the prompt's tokens from the second on, if requested; maybe split over several chunks."""
    request_id: str = ""
    model: str = ""
    trace_id: str = ""
    finish_reason: str = ""
    """"stop", "length", "cancelled", "error"; empty until the last chunk."""
    stop_reason: str = ""
    """Stop string or token that ended the output, if one did."""
    usage: Usage | None = None
    stages: tuple[Stage, ...] = ()
    placement: PlacementTaken | None = None
    seed: int | None = None
    """Seed of the sampling noise. Only the first chunk has it, and `fingerprint`."""
    fingerprint: bytes = b""
    """Digest of the model that computes the answer; only the same model may resume it."""


def chunk_to_pb(chunk: Chunk, request: pb2.GenerateRequest) -> Iterable[pb2.GenerateResponse]:
    """The chunk as the request wants it: one message, or several where one would be too large."""
    message = content_to_pb(chunk)
    message.request_id = chunk.request_id
    message.model = chunk.model
    message.trace_id = chunk.trace_id
    message.fingerprint = chunk.fingerprint
    if chunk.seed is not None:
        message.seed = chunk.seed
    if not request.return_token_ids:
        message.ClearField("token_ids")
    if request.explain:
        message.stages.extend(stage_to_pb(stage) for stage in chunk.stages)
        if chunk.placement is not None:
            message.placement.CopyFrom(placement_to_pb(chunk.placement))
    if not chunk.prompt_logprobs or message.ByteSize() <= MAX_PART_BYTES:
        return (message,)
    return _in_parts(message)


def _in_parts(
    message: pb2.GenerateResponse,
) -> Iterable[pb2.GenerateResponse]:
    """Splits a message: prompt log-probabilities first, then everything else."""
    entries = list(message.prompt_logprobs)
    message.ClearField("prompt_logprobs")
    # Each part names the request, as the first message must; the text comes with the last one.
    named = pb2.GenerateResponse(
        request_id=message.request_id,
        model=message.model,
        trace_id=message.trace_id,
        fingerprint=message.fingerprint,
        seed=message.seed if message.HasField("seed") else None,
    )
    part, num_bytes = _copy(named), 0
    for entry in entries:
        num_bytes += entry.ByteSize()
        if num_bytes > MAX_PART_BYTES and part.prompt_logprobs:
            yield part
            part, num_bytes = _copy(named), entry.ByteSize()
        part.prompt_logprobs.append(entry)
    yield part
    yield message


def _copy(message: pb2.GenerateResponse) -> pb2.GenerateResponse:
    copy = pb2.GenerateResponse()
    copy.CopyFrom(message)
    return copy


def chunk_from_pb(pb: pb2.GenerateResponse, *, has_token_ids: bool = True) -> Chunk:
    """A message of the stream."""
    return Chunk(
        text=pb.text,
        token_index=pb.token_index,
        num_tokens=pb.num_tokens,
        token_ids=tuple(pb.token_ids) if has_token_ids else (),
        logprobs=_logprobs(pb.logprobs),
        prompt_logprobs=_logprobs(pb.prompt_logprobs),
        request_id=pb.request_id,
        model=pb.model,
        trace_id=pb.trace_id,
        finish_reason=_FINISH_NAMES.get(pb.finish_reason, "error"),
        stop_reason=pb.stop_reason,
        usage=as_value(Usage, pb.usage) if pb.HasField("usage") else None,
        stages=tuple(stage_from_pb(stage) for stage in pb.stages),
        placement=placement_from_pb(pb.placement) if pb.HasField("placement") else None,
        seed=pb.seed if pb.HasField("seed") else None,
        fingerprint=pb.fingerprint,
    )


def stage_to_pb(stage: Stage) -> common_pb2.StageTiming:
    """The wire's form."""
    return as_message(
        common_pb2.StageTiming,
        stage,
        stage=stage.name,
        bytes=stage.num_bytes,
        tokens=stage.num_tokens,
    )


def stage_from_pb(pb: common_pb2.StageTiming) -> Stage:
    """A stage, for display: its times are not checked."""
    return as_value(
        Stage,
        pb,
        name=pb.stage,
        start_s=seconds_from_pb(pb.start),
        duration_s=seconds_from_pb(pb.duration),
        idle_s=seconds_from_pb(pb.idle),
        num_bytes=pb.bytes,
        num_tokens=pb.tokens,
    )


def placement_to_pb(placement: PlacementTaken) -> pb2.Placement:
    """The wire's form."""
    return as_message(pb2.Placement, placement)


def placement_from_pb(pb: pb2.Placement) -> PlacementTaken:
    """Where a request ran."""
    return as_value(PlacementTaken, pb)


def content_to_pb(chunk: Chunk) -> pb2.GenerateResponse:
    """The chunk's message, without the fields that identify its request."""
    message = pb2.GenerateResponse(
        text=chunk.text,
        token_index=chunk.token_index,
        num_tokens=chunk.num_tokens,
        token_ids=chunk.token_ids,
        logprobs=[_logprob_to_pb(entry) for entry in chunk.logprobs],
        prompt_logprobs=[_logprob_to_pb(entry) for entry in chunk.prompt_logprobs],
    )
    if chunk.finish_reason:
        message.finish_reason = finish_to_pb(FinishReason[chunk.finish_reason.upper()])
        message.stop_reason = chunk.stop_reason
    if chunk.usage is not None:
        message.usage.CopyFrom(as_message(common_pb2.Usage, chunk.usage))
    return message


def _logprob_to_pb(entry: Logprob) -> pb2.OutputLogprob:
    return pb2.OutputLogprob(
        token_id=entry.token_id,
        token=entry.token,
        token_bytes=entry.token_bytes,
        logprob=entry.logprob,
        top=[
            pb2.TopLogprob(
                token_id=top.token_id,
                token=top.token,
                token_bytes=top.token_bytes,
                logprob=top.logprob,
            )
            for top in entry.top
        ],
    )


def _logprobs(entries: Iterable[pb2.OutputLogprob]) -> tuple[Logprob, ...]:
    return tuple(
        Logprob(
            entry.token_id,
            entry.token,
            entry.token_bytes,
            entry.logprob,
            tuple(
                TopLogprob(top.token_id, top.token, top.token_bytes, top.logprob)
                for top in entry.top
            ),
        )
        for entry in entries
    )
