"""Sampling settings, guides and log-probabilities on the wire.

`*_from_pb` check every value: they apply the defaults that the .proto documents and raise
InvalidRequest with the field's name and the accepted range.
"""

from __future__ import annotations

import math
from typing import cast

from baton.core.errors import InvalidRequest
from baton.core.guide import Guide, GuideKind
from baton.core.sampling import (
    MAX_LOGIT_BIAS,
    DraftSource,
    FinishReason,
    SamplingParams,
    TokenLogprob,
)
from baton.v1 import common_pb2
from baton.wire.fields import as_message, as_value

MAX_STOP_TOKEN_IDS = 1024


def finish_to_pb(reason: FinishReason | None) -> common_pb2.FinishReason:
    """The wire's enum value; None means not finished."""
    return cast("common_pb2.FinishReason", reason.value if reason else 0)


def finish_from_pb(value: int) -> FinishReason | None:
    """Why a sequence ended, None when it has not.

    Raises:
        InvalidRequest: the value is not known.
    """
    if value == 0:
        return None
    try:
        return FinishReason(value)
    except ValueError as error:
        raise InvalidRequest(f"finish_reason must be 0 to 4, got {value}") from error


def sampling_to_pb(params: SamplingParams) -> common_pb2.SamplingParams:
    """The wire's form; an unset `max_tokens`, `seed` or `speculation` stays absent."""
    return as_message(
        common_pb2.SamplingParams,
        params,
        draft_source=params.draft_source.value if params.draft_source else 0,
        guide=guide_to_pb(params.guide) if params.guide else None,
    )


def sampling_from_pb(pb: common_pb2.SamplingParams) -> SamplingParams:
    """Checked sampling settings, with defaults where an optional field is absent.

    Raises:
        InvalidRequest: a value is out of range or not a number.
    """
    _at_most("stop_token_ids", len(pb.stop_token_ids), MAX_STOP_TOKEN_IDS)
    _at_most("logit_bias", len(pb.logit_bias), MAX_LOGIT_BIAS)
    return as_value(
        SamplingParams,
        pb,
        # A hint: the output is the same, so another source than a newer peer's does.
        draft_source=DraftSource(pb.draft_source) if pb.draft_source in {1, 2} else None,
        guide=guide_from_pb(pb.guide) if pb.HasField("guide") else None,
    ).check()


def guide_to_pb(guide: Guide) -> common_pb2.Guide:
    """The wire's form."""
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


def guide_from_pb(pb: common_pb2.Guide) -> Guide:
    """What an output must match; not checked yet.

    Raises:
        InvalidRequest: nothing is set.
    """
    match pb.WhichOneof("kind"):
        case "json_schema":
            return Guide(GuideKind.JSON_SCHEMA, pb.json_schema)
        case "json_object" if pb.json_object:
            return Guide(GuideKind.JSON_OBJECT)
        case "regex":
            return Guide(GuideKind.REGEX, pb.regex)
        case "lark":
            return Guide(GuideKind.LARK, pb.lark)
        case "choice":
            return Guide.choice(tuple(pb.choice.texts))
    names = ", ".join(kind.value for kind in GuideKind)
    raise InvalidRequest(f"guide must have exactly one of {names}")


def logprob_to_pb(logprob: TokenLogprob) -> common_pb2.TokenLogprob:
    """The wire's form."""
    return common_pb2.TokenLogprob(
        logprob=logprob.logprob,
        top_token_ids=logprob.top_token_ids,
        top_logprobs=logprob.top_logprobs,
    )


def logprob_from_pb(pb: common_pb2.TokenLogprob) -> TokenLogprob:
    """Log-probabilities at one position.

    Raises:
        InvalidRequest: one is NaN, or ids and log-probabilities differ in number.
    """
    if len(pb.top_token_ids) != len(pb.top_logprobs):
        raise InvalidRequest(
            "top_token_ids and top_logprobs must be equally long, got "
            f"{len(pb.top_token_ids)} and {len(pb.top_logprobs)}"
        )
    if math.isnan(pb.logprob) or any(math.isnan(value) for value in pb.top_logprobs):
        raise InvalidRequest("logprob must be a number, got NaN")
    return TokenLogprob(pb.logprob, tuple(pb.top_token_ids), tuple(pb.top_logprobs))


def _at_most(field: str, count: int, limit: int) -> None:
    if count > limit:
        raise InvalidRequest(f"{field} must have at most {limit} entries, got {count}")
