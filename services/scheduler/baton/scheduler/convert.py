"""Outputs between protobuf and plain values: for callers, and for answers that are kept."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.message import DecodeError

from baton.core.errors import InvalidRequest
from baton.core.output import TokenText, Usage
from baton.core.sampling import FinishReason
from baton.scheduler.messages import NOWHERE, Ending, Output, OutputToken
from baton.v1 import cache_pb2, common_pb2, inference_pb2
from baton.wire.sampling import finish_from_pb, finish_to_pb


def output_to_pb(output: Output) -> inference_pb2.GenerateResponse:
    """What it says, without what names its request."""
    message = inference_pb2.GenerateResponse(
        text=output.text,
        token_index=output.token_index,
        num_tokens=len(output.token_ids),
        token_ids=output.token_ids,
        logprobs=[_logprob_to_pb(token) for token in output.logprobs],
        prompt_logprobs=[_logprob_to_pb(token) for token in output.prompt_logprobs],
    )
    if output.ending is not None:
        usage = output.ending.usage
        message.finish_reason = finish_to_pb(output.ending.finish_reason)
        message.stop_reason = output.ending.stop_reason
        message.usage.CopyFrom(
            common_pb2.Usage(
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
                cached_tokens=usage.cached_tokens,
                draft_tokens=usage.draft_tokens,
                accepted_tokens=usage.accepted_tokens,
                response_cached=usage.response_cached,
            )
        )
    return message


def output_to_bytes(output: Output) -> bytes:
    """A part of a serialized Answer: parts that follow one another make the whole."""
    return cache_pb2.Answer(messages=[output_to_pb(output)]).SerializeToString()


def outputs_from_bytes(answer: bytes) -> list[Output]:
    """The outputs of a serialized Answer.

    Raises:
        InvalidRequest: it is none, or it is not whole.
    """
    try:
        messages = cache_pb2.Answer.FromString(answer).messages
    except DecodeError as error:
        raise InvalidRequest("this is no answer") from error
    outputs = [_output_from_pb(message) for message in messages]
    endings = [output.ending is not None for output in outputs]
    if not outputs or endings != [False] * (len(outputs) - 1) + [True]:
        raise InvalidRequest("the answer is not whole")
    return outputs


def _output_from_pb(message: inference_pb2.GenerateResponse) -> Output:
    reason = finish_from_pb(message.finish_reason)
    return Output(
        text=message.text,
        token_index=message.token_index,
        token_ids=tuple(message.token_ids),
        logprobs=_tokens(message.logprobs),
        prompt_logprobs=_tokens(message.prompt_logprobs),
        ending=None if reason is None else _ending(message, reason),
    )


def _ending(message: inference_pb2.GenerateResponse, reason: FinishReason) -> Ending:
    # Nothing was computed this time: all of the prompt counts as cached, and nothing as drafted.
    usage = Usage(
        prompt_tokens=message.usage.prompt_tokens,
        completion_tokens=message.usage.completion_tokens,
        cached_tokens=message.usage.prompt_tokens,
        response_cached=True,
    )
    return Ending(reason, message.stop_reason, usage, (), NOWHERE)


def _tokens(logprobs: Iterable[inference_pb2.OutputLogprob]) -> tuple[OutputToken, ...]:
    return tuple(
        OutputToken(
            pb.token_id,
            TokenText(pb.token_bytes, pb.token),
            pb.logprob,
            tuple(
                OutputToken(top.token_id, TokenText(top.token_bytes, top.token), top.logprob)
                for top in pb.top
            ),
        )
        for pb in logprobs
    )


def _logprob_to_pb(token: OutputToken) -> inference_pb2.OutputLogprob:
    return inference_pb2.OutputLogprob(
        token_id=token.token_id,
        token=token.text.text,
        token_bytes=token.text.token_bytes,
        logprob=token.logprob,
        top=[
            inference_pb2.TopLogprob(
                token_id=top.token_id,
                token=top.text.text,
                token_bytes=top.text.token_bytes,
                logprob=top.logprob,
            )
            for top in token.top
        ],
    )
