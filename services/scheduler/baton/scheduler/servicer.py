"""InferenceService on the wire: protobuf in, protobuf out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from baton.core.embedding import MAX_INPUTS, pooling_of
from baton.core.errors import InvalidRequest
from baton.core.ids import check_request_id, make_id
from baton.core.placement import DECODE_ROLE, PREFILL_ROLE
from baton.core.prompt import Chat, Prompt
from baton.rpc.logs import bind_request_id
from baton.scheduler.callers import mark, salted, unsalted
from baton.scheduler.convert import output_to_pb
from baton.scheduler.embeddings import Embedder, EmbedJob
from baton.scheduler.encoder import Encoder
from baton.scheduler.live import LiveRequest
from baton.scheduler.messages import (
    GenerateJob,
    Output,
    PlacementTaken,
)
from baton.scheduler.orchestrator import Orchestrator
from baton.scheduler.pins import PinTarget, PrefixPins
from baton.scheduler.recent import RequestRecord
from baton.scheduler.scheduler_metrics import SchedulerMetrics
from baton.scheduler.view import ClusterWatch
from baton.v1 import inference_pb2, inference_pb2_grpc
from baton.wire.cluster import status_to_pb
from baton.wire.inference.pins import PinnedPrefix, pin_to_pb
from baton.wire.prompt import chat_from_pb
from baton.wire.sampling import sampling_from_pb
from baton.wire.timing import duration_from_pb, duration_to_pb, slice_to_pb, stage_to_pb

MAX_CACHE_SALT_CHARS = 256
MAX_CHAT_MESSAGES = 4096
MAX_EMBED_ID_CHARS = 96
"""Leaves room for each input's number."""
PIN_TTL_S = 24 * 3600.0
"""Of pins whose caller names no time."""


@dataclass(frozen=True, slots=True)
class Edge:
    """What the servicer answers from."""

    orchestrator: Orchestrator
    embedder: Embedder
    encoder: Encoder
    cluster: ClusterWatch
    metrics: SchedulerMetrics
    pins: PrefixPins
    is_bus_connected: Callable[[], bool]
    request_timeout_s: float
    rng: Random


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Answers InferenceService."""

    def __init__(self, edge: Edge) -> None:
        self._edge = edge

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Any) -> None:
        """Runs a request. Writes by itself, so that a cancelled call is noticed at once."""
        job = self._job(request)
        bind_request_id(job.request_id)

        def sender(live: LiveRequest) -> Callable[[Output], Any]:
            return _Sender(context, request, live).send

        await self._edge.orchestrator.generate(job, self._timeout_s(context), sender)

    async def Embed(self, request: inference_pb2.EmbedRequest, context: Any) -> None:
        """Vectors of inputs. Writes by itself, as Generate does."""
        job = self._embed_job(request)
        bind_request_id(job.request_id)
        async with aclosing(self._edge.embedder.embed(job, self._timeout_s(context))) as vectors:
            async for vector in vectors:
                self._edge.metrics.took_in(vector.num_tokens)
                await context.write(
                    inference_pb2.EmbedResponse(
                        index=vector.index,
                        values=vector.values,
                        prompt_tokens=vector.num_tokens,
                        cached_tokens=vector.num_cached_tokens,
                        request_id=job.request_id,
                        model=vector.model,
                    )
                )

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Any
    ) -> inference_pb2.ListModelsResponse:
        """The models that can be used now."""
        cluster = self._edge.cluster
        return inference_pb2.ListModelsResponse(
            models=[
                inference_pb2.ModelInfo(
                    model=model,
                    max_model_len_tokens=cluster.max_model_len_tokens(model),
                    num_prefill_workers=cluster.num_workers(PREFILL_ROLE, model),
                    num_decode_workers=cluster.num_workers(DECODE_ROLE, model),
                )
                for model in cluster.models()
            ]
        )

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Any
    ) -> inference_pb2.TokenizeResponse:
        """Text or a conversation to token ids."""
        cluster = self._edge.cluster
        model = cluster.resolve_model(request.model)
        kind = request.WhichOneof("input")
        if kind is None:
            raise InvalidRequest("set text or chat")
        prompt = request.text if kind == "text" else _chat(request.chat)
        token_ids = await self._edge.encoder.encode(model, prompt, self._timeout_s(context))
        return inference_pb2.TokenizeResponse(
            token_ids=token_ids, max_model_len_tokens=cluster.max_model_len_tokens(model)
        )

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Any
    ) -> inference_pb2.DetokenizeResponse:
        """Token ids to text."""
        model = self._edge.cluster.resolve_model(request.model)
        timeout_s = self._timeout_s(context)
        text = await self._edge.encoder.decode(model, list(request.token_ids), timeout_s)
        return inference_pb2.DetokenizeResponse(text=text)

    async def PinPrefix(
        self, request: inference_pb2.PinPrefixRequest, context: Any
    ) -> inference_pb2.PinPrefixResponse:
        """Has the cache keep a prefix, whatever comes."""
        _check_salt(request.cache_salt)
        model = self._edge.cluster.resolve_model(request.model)
        prompt = _prompt(request)
        if not isinstance(prompt, tuple):
            prompt = await self._edge.encoder.encode(model, prompt, self._timeout_s(context))
        ttl_s = duration_from_pb(request.ttl, "ttl") if request.HasField("ttl") else PIN_TTL_S
        target = PinTarget(model, tuple(prompt), salted(request.cache_salt))
        # The label says whose it is: nobody sees, or takes back, another tenant's pins.
        pin = await self._edge.pins.pin(target, ttl_s, salted(request.label))
        return inference_pb2.PinPrefixResponse(pin=pin_to_pb(replace(pin, label=request.label)))

    async def UnpinPrefix(
        self, request: inference_pb2.UnpinPrefixRequest, context: Any
    ) -> inference_pb2.UnpinPrefixResponse:
        """Takes that back."""
        is_own = any(pin.pin_id == request.pin_id for pin in await self._own_pins())
        found = is_own and await self._edge.pins.unpin(request.pin_id)
        return inference_pb2.UnpinPrefixResponse(found=found)

    async def ListPinnedPrefixes(
        self, request: inference_pb2.ListPinnedPrefixesRequest, context: Any
    ) -> inference_pb2.ListPinnedPrefixesResponse:
        """The prefixes that are kept."""
        pins = [pin_to_pb(pin) for pin in await self._own_pins()]
        return inference_pb2.ListPinnedPrefixesResponse(pins=pins)

    async def _own_pins(self) -> list[PinnedPrefix]:
        return [
            replace(pin, label=label)
            for pin in await self._edge.pins.current()
            if (label := unsalted(pin.label)) is not None
        ]

    async def GetClusterStatus(
        self, request: inference_pb2.GetClusterStatusRequest, context: Any
    ) -> inference_pb2.GetClusterStatusResponse:
        """Every process that the scheduler knows, itself included."""
        statuses = sorted(
            self._edge.cluster.statuses(), key=lambda status: (status.role, status.worker_id)
        )
        return inference_pb2.GetClusterStatusResponse(
            services=[status_to_pb(status) for status in statuses],
            bus_connected=self._edge.is_bus_connected(),
            requests_by_state=self._edge.orchestrator.requests_by_state(),
        )

    async def ListRequests(
        self, request: inference_pb2.ListRequestsRequest, context: Any
    ) -> inference_pb2.ListRequestsResponse:
        """The latest requests, without their texts."""
        recent, metrics = self._edge.orchestrator.recent, self._edge.metrics
        own = mark(request.tenant)
        if request.request_id:
            records = [recent.get(check_request_id(request.request_id), own)]
        else:
            records = recent.latest(request.limit, own)
        has_tracks = bool(request.request_id)
        return inference_pb2.ListRequestsResponse(
            requests=[
                _record(entry, recent.age_s(entry), has_tracks=has_tracks) for entry in records
            ],
            prompt_tokens=metrics.num_prompt_tokens,
            output_tokens=metrics.num_output_tokens,
        )

    def _timeout_s(self, context: Any) -> float:
        remaining_s = context.time_remaining()
        limit_s = self._edge.request_timeout_s
        return limit_s if remaining_s is None else float(remaining_s)

    def _embed_job(self, request: inference_pb2.EmbedRequest) -> EmbedJob:
        _check_salt(request.cache_salt)
        if not 0 < len(request.inputs) <= MAX_INPUTS:
            raise InvalidRequest(f"inputs must be 1 to {MAX_INPUTS}, got {len(request.inputs)}")
        if len(request.request_id) > MAX_EMBED_ID_CHARS:
            raise InvalidRequest(f"request_id must have at most {MAX_EMBED_ID_CHARS} characters")
        return EmbedJob(
            model=request.model,
            prompts=tuple(_input(index, entry) for index, entry in enumerate(request.inputs)),
            request_id=(
                check_request_id(request.request_id)
                if request.request_id
                else make_id("emb", self._edge.rng)
            ),
            pooling=pooling_of(request.pooling),
            dimensions=request.dimensions,
            is_scaled=not request.unscaled,
            priority=request.priority,
            cache_salt=salted(request.cache_salt),
        )

    def _job(self, request: inference_pb2.GenerateRequest) -> GenerateJob:
        _check_salt(request.cache_salt)
        return GenerateJob(
            model=request.model,
            prompt=_prompt(request),
            sampling=sampling_from_pb(request.sampling),
            request_id=(
                check_request_id(request.request_id)
                if request.request_id
                else make_id("req", self._edge.rng)
            ),
            priority=request.priority,
            cache_salt=salted(request.cache_salt),
            fork_of=request.fork_of,
            keep_special_tokens=request.keep_special_tokens,
            can_reuse_answer=request.cache_response and not request.HasField("resume"),
            output_ids=tuple(request.resume.token_ids),
            num_output_chars=request.resume.text_chars,
            output_digest=request.resume.fingerprint,
        )


class _Sender:
    """Turns one request's outputs into messages and writes them."""

    def __init__(
        self, context: Any, request: inference_pb2.GenerateRequest, live: LiveRequest
    ) -> None:
        self._context = context
        self._request = request
        self._live = live
        self._is_first = True

    async def send(self, output: Output) -> None:
        """Waits while the caller's window is full."""
        live = self._live
        message = output_to_pb(output)
        message.request_id = live.request_id
        message.model = live.asked.model
        if not self._request.return_token_ids:
            message.ClearField("token_ids")
        if self._is_first or output.ending is not None:
            message.trace_id = live.trace_id
        if self._is_first:
            message.fingerprint = live.output.digest
            if live.asked.sampling.seed is not None:
                message.seed = live.asked.sampling.seed
        if output.ending is not None and self._request.explain:
            message.stages.extend(stage_to_pb(stage) for stage in output.ending.stages)
            message.placement.CopyFrom(_placement(output.ending.placement))
        self._is_first = False
        await self._context.write(message)


def _check_salt(cache_salt: str) -> None:
    if len(cache_salt) > MAX_CACHE_SALT_CHARS:
        raise InvalidRequest(f"cache_salt must have at most {MAX_CACHE_SALT_CHARS} characters")


def _input(index: int, entry: inference_pb2.EmbedInput) -> Prompt:
    if entry.WhichOneof("input") == "text" and entry.text:
        return str(entry.text)
    if entry.tokens.token_ids:
        return tuple(entry.tokens.token_ids)
    raise InvalidRequest(f"input {index} is empty; set text or tokens to something that is not")


def _prompt(request: inference_pb2.GenerateRequest | inference_pb2.PinPrefixRequest) -> Prompt:
    kind = request.WhichOneof("prompt")
    if kind == "text" and request.text:
        return str(request.text)
    if kind == "chat":
        return _chat(request.chat)
    if kind == "tokens" and request.tokens.token_ids:
        return tuple(request.tokens.token_ids)
    raise InvalidRequest(
        "the prompt is empty; set text, chat or tokens to something that is not empty"
    )


def _chat(chat: inference_pb2.ChatPrompt) -> Chat:
    if not 0 < len(chat.messages) <= MAX_CHAT_MESSAGES:
        raise InvalidRequest(
            f"chat must have 1 to {MAX_CHAT_MESSAGES} messages, got {len(chat.messages)}"
        )
    return chat_from_pb(chat)


def _placement(placement: PlacementTaken) -> inference_pb2.Placement:
    return inference_pb2.Placement(
        prefill_worker_id=placement.prefill_worker_id,
        decode_worker_id=placement.decode_worker_id,
        local_prefill=placement.is_local,
        reason=placement.reason,
        attempts=placement.attempts,
        decode_cached_tokens=placement.decode_cached_tokens,
        prefill_cached_tokens=placement.prefill_cached_tokens,
    )


def _record(
    record: RequestRecord, age_s: float, *, has_tracks: bool
) -> inference_pb2.RequestRecord:
    tracks = [
        inference_pb2.Track(
            name=track.name,
            worker_id=track.worker_id,
            slices=[slice_to_pb(part) for part in track.slices],
        )
        for track in record.tracks
    ]
    return inference_pb2.RequestRecord(
        request_id=record.request_id,
        trace_id=record.trace_id,
        model=record.model,
        state=record.state,
        outcome=record.outcome,
        age=duration_to_pb(age_s),
        elapsed=duration_to_pb(record.elapsed_s),
        ttft=None if record.ttft_s is None else duration_to_pb(record.ttft_s),
        prompt_tokens=record.prompt_tokens,
        output_tokens=record.output_tokens,
        draft_tokens=record.draft_tokens,
        accepted_tokens=record.accepted_tokens,
        placement=_placement(record.placement) if record.placement else None,
        stages=[stage_to_pb(stage) for stage in record.stages],
        tracks=tracks if has_tracks else (),
    )


def add_inference_servicer(servicer: InferenceServicer, server: Any) -> str:
    """Adds it to a server; returns the service's full name."""
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
    return str(inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name)
