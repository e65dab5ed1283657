"""What the answers of both generation endpoints share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from baton.client import Chunk, Completion, Logprob, Model, TopLogprob, Usage

Json = dict[str, Any]
_LOWEST_LOGPROB = -9999.0
"""JSON has no -inf. Source: vLLM uses the same."""


@dataclass(slots=True)
class AnswerHeader:
    """The fields that every object of one answer begins with."""

    answer_id: str
    created: int
    """Unix time in seconds."""
    model: str
    """Empty until the first chunk names it, where the request named none."""
    has_usage: bool = False
    """Chunks have a `usage`, null in all but the last."""

    def object(self, kind: str, choices: list[Json]) -> Json:
        """An object of an answer."""
        return {
            "id": self.answer_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def chunk(self, kind: str, choices: list[Json], usage: Json | None = None) -> Json:
        """An object of a streamed answer; the last one has a usage and no choices."""
        body = self.object(kind, choices)
        return {**body, "usage": usage} if self.has_usage else body


class AnswerFormat(Protocol):
    """Turns one answer into the JSON of its endpoint."""

    header: AnswerHeader
    chunk_kind: str
    """The `object` of a chunk."""

    def opening(self, index: int) -> list[Json]:
        """Chunks that open a choice."""

    def pieces(self, index: int, chunk: Chunk) -> list[Json]:
        """Chunks for a piece of a choice."""

    def whole(self, answers: Sequence[Completion], usage: Json) -> Json:
        """The answer as one object."""


def usage_json(usages: Sequence[Usage], outputs_per_prompt: int) -> Json:
    """The `usage` of an answer; a prompt with several outputs counts once."""
    prompts = usages[::outputs_per_prompt]
    prompt_tokens = sum(usage.prompt_tokens for usage in prompts)
    completion_tokens = sum(usage.completion_tokens for usage in usages)
    accepted_tokens = sum(usage.accepted_tokens for usage in usages)
    is_cached = all(usage.response_cached for usage in usages)
    return {
        **({"response_cached": True} if is_cached else {}),
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in prompts)},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "accepted_prediction_tokens": accepted_tokens,
            "rejected_prediction_tokens": sum(usage.draft_tokens for usage in usages)
            - accepted_tokens,
        },
    }


def model_json(model: Model, created: int) -> Json:
    """An entry of /v1/models."""
    return {
        "id": model.name,
        "object": "model",
        "created": created,
        "owned_by": "baton",
        "root": model.name,
        "parent": None,
        "max_model_len": model.max_model_len_tokens,
        "permission": [],
    }


def token_ids_json(part: Chunk | Completion) -> Json:
    """The `token_ids` of vLLM, if requested."""
    return {"token_ids": list(part.token_ids)} if part.token_ids else {}


def prompt_logprobs_json(answer: Completion) -> Json:
    """The `prompt_logprobs` of vLLM, if requested: null first, then candidates by token id."""
    if not answer.prompt_logprobs:
        return {}
    positions: list[Json | None] = [None]
    for entry in answer.prompt_logprobs:
        candidates = {str(entry.token_id): _candidate(entry, None)}
        for rank, top in enumerate(entry.top, start=1):
            candidates[str(top.token_id)] = _candidate(top, rank)
        positions.append(candidates)
    return {"prompt_logprobs": positions}


def _candidate(entry: Logprob | TopLogprob, rank: int | None) -> Json:
    return {"logprob": finite(entry.logprob), "rank": rank, "decoded_token": entry.token}


def finite(logprob: float) -> float:
    """The log-probability as JSON can hold it."""
    return max(logprob, _LOWEST_LOGPROB)


def with_explanation(body: Json, parts: Iterable[Chunk | Completion]) -> Json:
    """Adds stages and placement to `body`, if the request set `explain` and any arrived."""
    explained = [part for part in parts if part.stages or part.placement]
    if explained:
        body["baton"] = [
            {
                "trace_id": part.trace_id,
                "stages": [asdict(stage) for stage in part.stages],
                "placement": asdict(part.placement) if part.placement else None,
            }
            for part in explained
        ]
    return body
