"""Requests for vectors of hidden states, and their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baton.core.embedding import MAX_INPUTS, Pooling, pooling_of
from baton.core.errors import Internal, InvalidRequest
from baton.core.output import Usage
from baton.core.prompt import Prompt
from baton.v1 import inference_pb2 as pb2
from baton.wire.fields import as_message, as_value
from baton.wire.inference.requests import checked_salt, fitting
from baton.wire.prompt import prompt_fields

MAX_EMBED_ID_CHARS = 96
"""Leaves room for each input's number."""


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """A request for the vectors of some inputs."""

    inputs: tuple[Prompt, ...]
    """Texts and token ids."""
    model: str = ""
    request_id: str = ""
    pooling: Pooling = Pooling.LAST
    dimensions: int = 0
    """Leading values of each vector to keep; 0 keeps all."""
    is_scaled: bool = True
    """Vectors are scaled to length 1."""
    priority: int = 0
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class Embedding:
    """The vector of one input."""

    index: int
    """Of the input."""
    values: tuple[float, ...]
    num_tokens: int
    num_cached_tokens: int
    model: str
    request_id: str


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Vectors of inputs."""

    vectors: tuple[tuple[float, ...], ...]
    """One per input, in order."""
    usage: Usage
    model: str = ""
    request_id: str = ""


def embed_to_pb(request: EmbedRequest) -> pb2.EmbedRequest:
    """The wire's form.

    Raises:
        InvalidRequest: a value does not fit its field.
    """
    with fitting():
        return as_message(
            pb2.EmbedRequest,
            request,
            inputs=[pb2.EmbedInput(**prompt_fields(entry)) for entry in request.inputs],
            pooling=request.pooling.value,
            unscaled=not request.is_scaled,
        )


def embed_from_pb(pb: pb2.EmbedRequest) -> EmbedRequest:
    """A request with checked values.

    Raises:
        InvalidRequest: a value is out of range, or an input is empty.
    """
    if not 0 < len(pb.inputs) <= MAX_INPUTS:
        raise InvalidRequest(f"inputs must be 1 to {MAX_INPUTS}, got {len(pb.inputs)}")
    if len(pb.request_id) > MAX_EMBED_ID_CHARS:
        raise InvalidRequest(f"request_id must have at most {MAX_EMBED_ID_CHARS} characters")
    checked_salt(pb.cache_salt)
    return as_value(
        EmbedRequest,
        pb,
        inputs=tuple(_input(index, entry) for index, entry in enumerate(pb.inputs)),
        pooling=pooling_of(pb.pooling),
        is_scaled=not pb.unscaled,
    )


def embedding_to_pb(embedding: Embedding) -> pb2.EmbedResponse:
    """The wire's form."""
    return as_message(
        pb2.EmbedResponse,
        embedding,
        prompt_tokens=embedding.num_tokens,
        cached_tokens=embedding.num_cached_tokens,
    )


def embeddings_from_pb(messages: Sequence[pb2.EmbedResponse], num_inputs: int) -> Embeddings:
    """All vectors, in the order of the inputs.

    Raises:
        Internal: the server left one out.
    """
    found = {message.index: message for message in messages}
    if set(found) != set(range(num_inputs)):
        raise Internal("the server ended the call without a vector for every input")
    ordered = [found[index] for index in range(num_inputs)]
    return Embeddings(
        vectors=tuple(tuple(message.values) for message in ordered),
        usage=Usage(
            prompt_tokens=sum(message.prompt_tokens for message in ordered),
            cached_tokens=sum(message.cached_tokens for message in ordered),
        ),
        model=ordered[0].model,
        request_id=ordered[0].request_id,
    )


def _input(index: int, entry: pb2.EmbedInput) -> Prompt:
    if entry.WhichOneof("input") == "text" and entry.text:
        return entry.text
    if entry.tokens.token_ids:
        return tuple(entry.tokens.token_ids)
    raise InvalidRequest(f"input {index} is empty; set text or tokens to something that is not")
