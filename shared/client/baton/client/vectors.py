"""Requests for vectors, and their answers: the protobuf half that both clients share."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

from baton.client.types import Embeddings, EmbedOptions
from baton.core.embedding import Pooling
from baton.core.errors import Internal, InvalidRequest
from baton.core.output import Usage
from baton.v1 import common_pb2, inference_pb2

EmbedInputs = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
"""A text, texts, token ids, or lists of token ids."""
_POOLINGS = MappingProxyType({pooling.name.lower(): pooling for pooling in Pooling})


def embed_request(inputs: EmbedInputs, options: EmbedOptions) -> inference_pb2.EmbedRequest:
    """The request for inputs.

    Raises:
        InvalidRequest: there are none, or one or an option is not of its type.
    """
    pooling = _POOLINGS.get(options.get("pooling", "last"))
    if pooling is None:
        raise InvalidRequest(f"pooling must be one of {', '.join(_POOLINGS)}")
    try:
        request = inference_pb2.EmbedRequest(
            model=options.get("model", ""),
            pooling=common_pb2.Pooling.Name(pooling.value),
            dimensions=options.get("dimensions") or 0,
            unscaled=not options.get("scaled", True),
            request_id=options.get("request_id", ""),
            priority=options.get("priority", 0),
            cache_salt=options.get("cache_salt", ""),
        )
        for entry in _entries(inputs):
            if isinstance(entry, str):
                request.inputs.add(text=entry)
            else:
                request.inputs.add(tokens=inference_pb2.TokenPrompt(token_ids=entry))
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"a value does not fit its field: {error}") from error
    if not request.inputs:
        raise InvalidRequest("inputs must not be empty")
    return request


def _entries(inputs: EmbedInputs) -> Sequence[Any]:
    if isinstance(inputs, str):
        return [inputs]
    if inputs and isinstance(inputs[0], int):
        return [inputs]
    return inputs


def embeddings_from(
    request: inference_pb2.EmbedRequest, messages: Sequence[inference_pb2.EmbedResponse]
) -> Embeddings:
    """All vectors, in the order of the inputs.

    Raises:
        Internal: the server left one out.
    """
    found = {message.index: message for message in messages}
    if set(found) != set(range(len(request.inputs))):
        raise Internal("the server ended the call without a vector for every input")
    ordered = [found[index] for index in range(len(request.inputs))]
    return Embeddings(
        vectors=tuple(tuple(message.values) for message in ordered),
        usage=Usage(
            prompt_tokens=sum(message.prompt_tokens for message in ordered),
            cached_tokens=sum(message.cached_tokens for message in ordered),
        ),
        model=ordered[0].model,
        request_id=ordered[0].request_id,
    )
