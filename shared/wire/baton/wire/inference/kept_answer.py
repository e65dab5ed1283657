"""Whole answers as the cache keeps them: serialized chunks, without what names their request."""

from __future__ import annotations

from dataclasses import replace

from baton.core.errors import InvalidRequest
from baton.core.output import Usage
from baton.v1 import cache_pb2
from baton.wire.fields import parsed
from baton.wire.inference.chunks import Chunk, PlacementTaken, chunk_from_pb, content_to_pb


def answer_part(chunk: Chunk) -> bytes:
    """A part of a serialized Answer, without what names its request: parts in a row make it."""
    return cache_pb2.Answer(messages=[content_to_pb(chunk)]).SerializeToString()


def chunks_of_answer(answer: bytes) -> list[Chunk]:
    """The chunks of a serialized Answer, with the usage of an answer that no model computed.

    Raises:
        InvalidRequest: it is none, or it is not whole.
    """
    messages = parsed(cache_pb2.Answer, answer, "answer").messages
    chunks = [chunk_from_pb(message) for message in messages]
    endings = [bool(chunk.finish_reason) for chunk in chunks]
    if not chunks or endings != [False] * (len(chunks) - 1) + [True]:
        raise InvalidRequest("the answer is not whole")
    usage = chunks[-1].usage or Usage()
    # Nothing was computed this time: all of the prompt counts as cached, and nothing as drafted.
    kept = Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.prompt_tokens,
        response_cached=True,
    )
    return [*chunks[:-1], replace(chunks[-1], usage=kept, placement=PlacementTaken())]
