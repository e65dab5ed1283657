"""The request fields that /v1/completions and /v1/chat/completions share.

Fields beyond OpenAI's own (`top_k`, `min_p`, `ignore_eos`, ...) have the names of vLLM's
`extra_body`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from baton.client import GenerateOptions, InvalidRequest
from baton.gateway.guides import GuideBody
from baton.gateway.unsupported_fields import refuse_unsupported

_SEEDS = 1 << 64
Body = TypeVar("Body", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class ChoiceRequest:
    """One choice of an answer: what the SDK generates it from."""

    prompt: str | None
    options: GenerateOptions


class StreamOptions(BaseModel):
    """`stream_options`."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class SamplingBody(GuideBody):
    """What both endpoints take."""

    model: str = ""
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = Field(default=None, ge=1)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: Literal[True] | None = None
    speculation: bool | None = None
    draft_source: Literal["model", "ngram"] | None = None
    prompt_logprobs: int | None = None
    priority: int = 0
    cache_salt: str | None = None
    cache_response: bool = False
    explain: bool = False
    return_token_ids: bool = False

    @property
    def has_usage_chunk(self) -> bool:
        """The answer is a stream that ends with a chunk of usage."""
        asked = self.stream_options is not None and self.stream_options.include_usage
        return bool(self.stream) and asked

    def check_num_choices(self, num_prompts: int, max_choices: int) -> None:
        """Checks `n` before anything is built for each choice.

        Raises:
            InvalidRequest: the answer would have too many choices.
        """
        num_choices = (self.n or 1) * num_prompts
        if num_choices > max_choices:
            raise InvalidRequest(
                f"n times the number of prompts must be at most {max_choices}, got {num_choices}"
            )

    def shared_options(self) -> GenerateOptions:
        """The SDK's options, the same for every choice but for the seed.

        Raises:
            InvalidRequest: two fields contradict each other, or one is not supported.
        """
        if self.stream_options is not None and self.stream_options.continuous_usage_stats:
            raise InvalidRequest(
                "stream_options.continuous_usage_stats is not supported; "
                "include_usage reports the usage at the end"
            )
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequest("prompt_logprobs cannot be streamed; leave out one of the two")
        return GenerateOptions(
            model=self.model,
            temperature=self.temperature,
            top_k=0 if self.top_k == -1 else self.top_k,  # vLLM's -1 means all tokens
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias=self.logit_bias,
            min_tokens=self.min_tokens,
            stop=self.stop or None,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            keep_special_tokens=not self.skip_special_tokens,
            speculation=self.speculation,
            draft_source=self.draft_source,
            guide=self.guide(),
            prompt_logprobs=self.prompt_logprobs,
            priority=self.priority,
            cache_salt=self.cache_salt or "",
            cache_response=self.cache_response,
            explain=self.explain,
            return_token_ids=self.return_token_ids,
        )

    def choices_of(self, prompt: str | None, options: GenerateOptions) -> list[ChoiceRequest]:
        """The `n` choices of one prompt, each with its own seed."""
        seeds = [
            None if self.seed is None else (self.seed + number) % _SEEDS
            for number in range(self.n or 1)
        ]
        return [ChoiceRequest(prompt, GenerateOptions(**options, seed=seed)) for seed in seeds]


def parse(cls: type[Body], value: object) -> Body:
    """Validates a request body.

    Raises:
        InvalidRequest: a field is missing, mistyped or not supported; the message names it.
    """
    if isinstance(value, dict):
        refuse_unsupported(value, cls.model_fields)
    try:
        return cls.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise InvalidRequest(f"{where}: {first['msg']}") from error
