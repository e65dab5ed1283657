"""Builds requests and reads answers: the protobuf half that both clients share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from google.protobuf.duration_pb2 import Duration

from baton.client.types import (
    Chunk,
    ClusterStatus,
    GenerateOptions,
    Logprob,
    Model,
    Placement,
    TopLogprob,
)
from baton.core.cluster import ServiceState, ServiceStatus
from baton.core.errors import InvalidRequest
from baton.core.guide import Guide, GuideKind
from baton.core.hashing import Fingerprint, KvLayout
from baton.core.output import Usage
from baton.core.request import Stage
from baton.core.sampling import SamplingParams
from baton.v1 import common_pb2, inference_pb2

_MAX_UINT64 = (1 << 64) - 1
_OPTIONAL_FIELDS = ("temperature", "top_p", "repetition_penalty", "max_tokens", "seed")
_STATES = MappingProxyType({state.value: state for state in ServiceState})
_PLAIN_FIELDS = ("top_k", "min_p", "frequency_penalty", "presence_penalty", "min_tokens")


def generate_request(prompt: str | None, options: GenerateOptions) -> inference_pb2.GenerateRequest:
    """The request for a prompt.

    Raises:
        InvalidRequest: not exactly one form of prompt, or an option is out of range.
    """
    messages, token_ids = options.get("messages"), options.get("token_ids")
    if sum(form is not None for form in (prompt, messages, token_ids)) != 1:
        raise InvalidRequest("give exactly one of prompt, messages and token_ids")
    if options.get("tools") and messages is None:
        raise InvalidRequest("tools need messages")
    try:
        request = inference_pb2.GenerateRequest(
            model=options.get("model", ""),
            sampling=_sampling(options),
            request_id=options.get("request_id", ""),
            priority=options.get("priority", 0),
            cache_salt=options.get("cache_salt", ""),
            cache_response=options.get("cache_response", False),
            fork_of=options.get("fork_of", ""),
            explain=options.get("explain", False),
            return_token_ids=options.get("return_token_ids", False),
            keep_special_tokens=options.get("keep_special_tokens", False),
        )
        if prompt is not None:
            request.text = prompt
        elif messages is not None:
            request.chat.CopyFrom(_chat(messages, options.get("tools")))
        else:
            request.tokens.CopyFrom(inference_pb2.TokenPrompt(token_ids=token_ids))
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"a value does not fit its field: {error}") from error
    return request


def tokenize_request(
    text: str | None, messages: Sequence[Mapping[str, Any]] | None, model: str
) -> inference_pb2.TokenizeRequest:
    """The request for token ids.

    Raises:
        InvalidRequest: not exactly one of text and messages.
    """
    if (text is None) == (messages is None):
        raise InvalidRequest("give exactly one of text and messages")
    if text is not None:
        return inference_pb2.TokenizeRequest(model=model, text=text)
    return inference_pb2.TokenizeRequest(model=model, chat=_chat(messages or ()))


def detokenize_request(token_ids: Sequence[int], model: str) -> inference_pb2.DetokenizeRequest:
    """The request for text.

    Raises:
        InvalidRequest: a token id is not one.
    """
    try:
        return inference_pb2.DetokenizeRequest(model=model, token_ids=token_ids)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"token_ids must be non-negative integers: {error}") from error


def _chat(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
) -> inference_pb2.ChatPrompt:
    chat = inference_pb2.ChatPrompt(tools_json=_json(tools))
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise InvalidRequest(f"messages[{index}] must have a role and a content, both texts")
        chat.messages.add(
            role=role,
            content=content,
            tool_calls_json=_json(message.get("tool_calls")),
            tool_call_id=message.get("tool_call_id"),
            name=message.get("name"),
        )
    if not chat.messages:
        raise InvalidRequest("messages must not be empty")
    return chat


def _json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False) if value else ""
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest("tools and tool_calls must be plain JSON values") from error


def _sampling(options: GenerateOptions) -> common_pb2.SamplingParams:
    stop = options.get("stop") or ()
    top_logprobs = options.get("top_logprobs") or 0
    given = {
        name: options[name]  # type: ignore[literal-required]
        for name in (*_OPTIONAL_FIELDS, *_PLAIN_FIELDS)
        if options.get(name) is not None
    }
    params = SamplingParams(
        **given,
        logit_bias=options.get("logit_bias") or {},
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=tuple(options.get("stop_token_ids") or ()),
        ignore_eos=options.get("ignore_eos", False),
        logprobs=options.get("logprobs", False) or top_logprobs > 0,
        top_logprobs=top_logprobs,
        prompt_logprobs=options.get("prompt_logprobs"),
        guide=options.get("guide"),
    ).check()
    if params.seed is not None and not 0 <= params.seed <= _MAX_UINT64:
        raise InvalidRequest(f"seed must be in [0, 2**64 - 1], got {params.seed}")
    sampling = common_pb2.SamplingParams(
        **given,
        logit_bias=params.logit_bias,
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        logprobs=params.logprobs,
        top_logprobs=params.top_logprobs,
        prompt_logprobs=params.prompt_logprobs,
    )
    speculation = options.get("speculation")
    if speculation is not None:
        sampling.speculation = speculation
    draft_source = options.get("draft_source")
    if draft_source is not None:
        if draft_source not in {"model", "ngram"}:
            raise InvalidRequest(f"draft_source must be model or ngram, got {draft_source!r}")
        sampling.draft_source = (
            common_pb2.DRAFT_SOURCE_NGRAM
            if draft_source == "ngram"
            else common_pb2.DRAFT_SOURCE_MODEL
        )
    if params.guide is not None:
        sampling.guide.CopyFrom(_guide(params.guide))
    return sampling


def _guide(guide: Guide) -> common_pb2.Guide:
    match guide.kind:
        case GuideKind.JSON_SCHEMA:
            return common_pb2.Guide(json_schema=guide.text)
        case GuideKind.JSON_OBJECT:
            return common_pb2.Guide(json_object=True)
        case GuideKind.REGEX:
            return common_pb2.Guide(regex=guide.text)
        case GuideKind.LARK:
            return common_pb2.Guide(lark=guide.text)
        case GuideKind.CHOICE:
            return common_pb2.Guide(choice=common_pb2.Choices(texts=guide.choices()))


def chunk_from(message: inference_pb2.GenerateResponse, *, has_token_ids: bool = True) -> Chunk:
    """A message of the stream as a value."""
    is_last = message.finish_reason != common_pb2.FINISH_REASON_UNSPECIFIED
    return Chunk(
        text=message.text,
        token_index=message.token_index,
        num_tokens=message.num_tokens,
        token_ids=tuple(message.token_ids) if has_token_ids else (),
        logprobs=tuple(_logprob(entry) for entry in message.logprobs),
        prompt_logprobs=tuple(_logprob(entry) for entry in message.prompt_logprobs),
        request_id=message.request_id,
        model=message.model,
        trace_id=message.trace_id,
        finish_reason=_finish_name(message.finish_reason) if is_last else "",
        stop_reason=message.stop_reason,
        usage=_usage(message.usage) if message.HasField("usage") else None,
        stages=tuple(stage_from(stage) for stage in message.stages),
        placement=placement_from(message.placement) if message.HasField("placement") else None,
    )


def _finish_name(reason: common_pb2.FinishReason) -> str:
    return common_pb2.FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower()


def _logprob(entry: inference_pb2.OutputLogprob) -> Logprob:
    return Logprob(
        token_id=entry.token_id,
        token=entry.token,
        token_bytes=entry.token_bytes,
        logprob=entry.logprob,
        top=tuple(
            TopLogprob(top.token_id, top.token, top.token_bytes, top.logprob) for top in entry.top
        ),
    )


def _usage(usage: common_pb2.Usage) -> Usage:
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
        draft_tokens=usage.draft_tokens,
        accepted_tokens=usage.accepted_tokens,
        response_cached=usage.response_cached,
    )


def stage_from(stage: common_pb2.StageTiming) -> Stage:
    """A stage."""
    return Stage(
        name=stage.stage,
        start_s=seconds_from(stage.start),
        duration_s=seconds_from(stage.duration),
        before_first_token=stage.before_first_token,
        worker_id=stage.worker_id,
        num_bytes=stage.bytes,
        num_tokens=stage.tokens,
        idle_s=seconds_from(stage.idle),
    )


def placement_from(placement: inference_pb2.Placement) -> Placement:
    """Where a request ran."""
    return Placement(
        prefill_worker_id=placement.prefill_worker_id,
        decode_worker_id=placement.decode_worker_id,
        local_prefill=placement.local_prefill,
        reason=placement.reason,
        attempts=placement.attempts,
        decode_cached_tokens=placement.decode_cached_tokens,
        prefill_cached_tokens=placement.prefill_cached_tokens,
    )


def models_from(message: inference_pb2.ListModelsResponse) -> list[Model]:
    """The served models."""
    return [
        Model(
            name=entry.model,
            max_model_len_tokens=entry.max_model_len_tokens,
            num_prefill_workers=entry.num_prefill_workers,
            num_decode_workers=entry.num_decode_workers,
        )
        for entry in message.models
    ]


def status_from(message: inference_pb2.GetClusterStatusResponse) -> ClusterStatus:
    """The cluster's status."""
    return ClusterStatus(
        services=tuple(_service(service) for service in message.services),
        bus_connected=message.bus_connected,
        requests_by_state=dict(message.requests_by_state),
    )


def _service(status: inference_pb2.ServiceStatus) -> ServiceStatus:
    return ServiceStatus(
        worker_id=status.worker_id,
        role=status.role,
        address=status.address,
        state=_STATES.get(status.state, ServiceState.STARTING),
        model=status.model,
        fingerprint=_fingerprint(status.fingerprint) if status.HasField("fingerprint") else None,
        kv_blocks=dict(status.kv_blocks),
        num_requests_running=status.num_requests_running,
        num_requests_waiting=status.num_requests_waiting,
        uptime_s=seconds_from(status.uptime),
        pid=status.pid,
        metrics_address=status.metrics_address,
        stats=dict(status.stats),
        version=status.version,
        cores=tuple(status.cores),
    )


def _fingerprint(fingerprint: common_pb2.ModelFingerprint) -> Fingerprint:
    layout = fingerprint.layout
    return Fingerprint(
        model=fingerprint.model,
        config_hash=fingerprint.config_hash,
        weights_hash=fingerprint.weights_hash,
        tokenizer_hash=fingerprint.tokenizer_hash,
        layout=KvLayout(
            block_size=layout.block_size,
            dtype=layout.dtype,
            num_kv_heads=tuple(layout.num_kv_heads),
            head_dim=tuple(layout.head_dim),
        ),
    )


def seconds_from(duration: Duration) -> float:
    """A duration in seconds."""
    return duration.seconds + duration.nanos / 1e9
