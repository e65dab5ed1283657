"""Arguments of the SDK's methods as requests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from baton.client.types import EmbedOptions, GenerateOptions, PinOptions
from baton.core.embedding import Pooling
from baton.core.errors import InvalidRequest
from baton.core.prompt import Chat, ChatTurn, Prompt
from baton.core.sampling import DraftSource, SamplingParams
from baton.wire.inference.pins import PinRequest
from baton.wire.inference.requests import (
    GenerateRequest,
    TokenizeRequest,
    fitting,
    unset_sampling,
)
from baton.wire.inference.vectors import EmbedRequest

EmbedInputs = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
"""A text, texts, token ids, or lists of token ids."""
_MAX_UINT64 = (1 << 64) - 1
_SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty"),
    *("presence_penalty", "max_tokens", "min_tokens", "seed", "prompt_logprobs", "speculation"),
    "guide",
)
_COMMON = ("model", "request_id", "priority", "cache_salt")
_GENERATE = (
    *_COMMON,
    *("explain", "return_token_ids", "keep_special_tokens", "fork_of", "cache_response"),
)
_DRAFT_SOURCES = MappingProxyType({source.name.lower(): source for source in DraftSource})
_POOLINGS = MappingProxyType({pooling.name.lower(): pooling for pooling in Pooling})


def generate_request(prompt: str | None, options: GenerateOptions) -> GenerateRequest:
    """The request for a prompt.

    Raises:
        InvalidRequest: not exactly one form of prompt, or an option is out of range.
    """
    asked = _prompt(prompt, options.get("messages"), options.get("token_ids"), options.get("tools"))
    given = {name: value for name, value in _named(_SAMPLING, options).items() if value is not None}
    with fitting():
        sampling = _sampling(given, options)
    return GenerateRequest(
        prompt=asked, sampling=sampling, unset=unset_sampling(given), **_named(_GENERATE, options)
    )


def tokenize_request(
    text: str | None, messages: Sequence[Mapping[str, Any]] | None, model: str
) -> TokenizeRequest:
    """The request for token ids.

    Raises:
        InvalidRequest: not exactly one of text and messages.
    """
    if (text is None) == (messages is None):
        raise InvalidRequest("give exactly one of text and messages")
    return TokenizeRequest(text if text is not None else _chat(messages or (), None), model)


def embed_request(inputs: EmbedInputs, options: EmbedOptions) -> EmbedRequest:
    """The request for vectors.

    Raises:
        InvalidRequest: there are no inputs, or one or an option is not of its type.
    """
    pooling = _POOLINGS.get(options.get("pooling", "last"))
    if pooling is None:
        raise InvalidRequest(f"pooling must be one of {', '.join(_POOLINGS)}")
    with fitting():
        entries = tuple(
            entry if isinstance(entry, str) else tuple(entry) for entry in _entries(inputs)
        )
    if not entries:
        raise InvalidRequest("inputs must not be empty")
    return EmbedRequest(
        inputs=entries,
        pooling=pooling,
        dimensions=options.get("dimensions") or 0,
        is_scaled=options.get("scaled", True),
        **_named(_COMMON, options),
    )


def pin_request(prompt: str | None, options: PinOptions) -> PinRequest:
    """The request to pin a prompt.

    Raises:
        InvalidRequest: not exactly one form of prompt.
    """
    asked = _prompt(prompt, options.get("messages"), options.get("token_ids"))
    return PinRequest(prompt=asked, **_named(("model", "cache_salt", "ttl_s", "label"), options))


def _named(names: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of these names that are given; a request has the same fields and defaults."""
    return {name: options[name] for name in names if name in options}


def _prompt(
    text: str | None,
    messages: Sequence[Mapping[str, Any]] | None,
    token_ids: Sequence[int] | None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Prompt:
    if sum(form is not None for form in (text, messages, token_ids)) != 1:
        raise InvalidRequest("give exactly one of prompt, messages and token_ids")
    if tools and messages is None:
        raise InvalidRequest("tools need messages")
    if text is not None:
        return text
    if messages is not None:
        return _chat(messages, tools)
    with fitting():
        return tuple(token_ids or ())


def _chat(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> Chat:
    turns = []
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise InvalidRequest(f"messages[{index}] must have a role and a content, both texts")
        turns.append(
            ChatTurn(
                role=role,
                content=content,
                tool_calls_json=_json(message.get("tool_calls")),
                tool_call_id=message.get("tool_call_id") or "",
                name=message.get("name") or "",
            )
        )
    if not turns:
        raise InvalidRequest("messages must not be empty")
    return Chat(tuple(turns), _json(tools))


def _json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False) if value else ""
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest("tools and tool_calls must be plain JSON values") from error


def _sampling(given: Mapping[str, Any], options: GenerateOptions) -> SamplingParams:
    stop = options.get("stop") or ()
    top_logprobs = options.get("top_logprobs") or 0
    draft_source = options.get("draft_source")
    if draft_source is not None and draft_source not in _DRAFT_SOURCES:
        raise InvalidRequest(f"draft_source must be model or ngram, got {draft_source!r}")
    params = SamplingParams(
        **given,
        logit_bias=options.get("logit_bias") or {},
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=tuple(options.get("stop_token_ids") or ()),
        ignore_eos=options.get("ignore_eos", False),
        logprobs=options.get("logprobs", False) or top_logprobs > 0,
        top_logprobs=top_logprobs,
        draft_source=_DRAFT_SOURCES[draft_source] if draft_source is not None else None,
    ).check()
    if params.seed is not None and not 0 <= params.seed <= _MAX_UINT64:
        raise InvalidRequest(f"seed must be in [0, 2**64 - 1], got {params.seed}")
    return params


def _entries(inputs: EmbedInputs) -> Sequence[Any]:
    if isinstance(inputs, str):
        return [inputs]
    if inputs and isinstance(inputs[0], int):
        return [inputs]
    return inputs
