"""Bodies of OpenAI's API, checked, and what they ask the SDK for. Unknown fields are ignored.

Fields beyond OpenAI's own (`top_k`, `min_p`, `ignore_eos`, …) are those that vLLM takes in its
`extra_body`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from baton.client import GenerateOptions, InvalidRequest
from baton.gateway.guides import GuideBody
from baton.gateway.message import Message, for_sdk
from baton.gateway.tools import Choice, Tool, ToolUse

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of /v1/completions."""
_SEEDS = 1 << 64
_UNSUPPORTED = (
    "allowed_token_ids", "bad_words", "chat_template", "continue_final_message", "echo",
    "include_stop_str_in_output", "suffix", "truncate_prompt_tokens", "use_beam_search",
)  # fmt: skip
Body = TypeVar("Body", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Job:
    """One output to generate: what to call the SDK with."""

    prompt: str | None
    options: GenerateOptions


class StreamOptions(BaseModel):
    """`stream_options`."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class SamplingBody(GuideBody):
    """What both endpoints take."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())

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
    speculation: bool | None = None
    draft_source: Literal["model", "ngram"] | None = None
    prompt_logprobs: int | None = None
    priority: int = 0
    cache_salt: str | None = None
    cache_response: bool = False
    explain: bool = False
    return_token_ids: bool = False
    allowed_token_ids: Any = None
    """This and those below are refused: to ignore them would change the answer's meaning."""
    bad_words: Any = None
    chat_template: Any = None
    continue_final_message: Any = None
    echo: Any = None
    include_stop_str_in_output: Any = None
    suffix: Any = None
    truncate_prompt_tokens: Any = None
    use_beam_search: Any = None

    @property
    def is_stream(self) -> bool:
        """True when the answer is to be streamed."""
        return bool(self.stream)

    @property
    def has_usage_chunk(self) -> bool:
        """True when a stream ends with a chunk that tells the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def shared_options(self) -> GenerateOptions:
        """Options of every output.

        Raises:
            InvalidRequest: it asks for what is not supported.
        """
        self._check_supported()
        return GenerateOptions(
            model=self.model,
            temperature=self.temperature,
            top_k=_k(self.top_k),
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

    def _check_supported(self) -> None:
        for name in _UNSUPPORTED:
            if getattr(self, name):
                raise InvalidRequest(f"{name} is not supported; leave it out")
        if self.stream_options is not None and self.stream_options.continuous_usage_stats:
            raise InvalidRequest(
                "stream_options.continuous_usage_stats is not supported; "
                "include_usage tells the usage at the end"
            )
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequest("prompt_logprobs cannot be streamed; leave out one of the two")

    def seed_of(self, output: int) -> int | None:
        """Seed of the output with this number among the `n` of a prompt."""
        return None if self.seed is None else (self.seed + output) % _SEEDS


class CompletionBody(SamplingBody):
    """Body of POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(default=None, ge=0, le=20)
    best_of: int | None = None

    def jobs(self) -> list[Job]:
        """One job per choice: the first prompt's `n`, then the next one's.

        Raises:
            InvalidRequest: it asks for what is not supported, or has no prompt.
        """
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise InvalidRequest("best_of must be n: answers are not ranked here; leave it out")
        options = self.shared_options()
        options["max_tokens"] = (
            DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        )
        if self.logprobs is not None:
            options["logprobs"] = True
            options["top_logprobs"] = self.logprobs
        jobs: list[Job] = []
        for prompt in self._prompts():
            for output in range(self.n or 1):
                own = GenerateOptions(**options, seed=self.seed_of(output))
                if isinstance(prompt, str):
                    jobs.append(Job(prompt, own))
                else:
                    own["token_ids"] = prompt
                    jobs.append(Job(None, own))
        return jobs

    def _prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise InvalidRequest("prompt must not be empty")
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class ChatBody(SamplingBody):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[Tool] | None = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None
    functions: Any = None
    function_call: Any = None

    def tool_use(self) -> ToolUse:
        """Which tools it may or must call.

        Raises:
            InvalidRequest: it must call one that there is not.
        """
        is_parallel = self.parallel_tool_calls is not False
        return ToolUse.of(self.tools, self.tool_choice, is_parallel=is_parallel)

    def jobs(self) -> list[Job]:
        """One job per choice.

        Raises:
            InvalidRequest: it asks for what is not supported.
        """
        if self.functions is not None or self.function_call is not None:
            raise InvalidRequest("functions are not supported; use tools")
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true")
        options = self.shared_options()
        options["messages"] = for_sdk(self.messages)
        tool_use = self.tool_use()
        options["tools"] = tool_use.for_template()
        forced = tool_use.guide()
        if forced is not None and options["guide"] is not None:
            raise InvalidRequest("tool_choice demands a call: leave out what the text must match")
        options["guide"] = forced or options["guide"]
        limit = self.max_completion_tokens
        options["max_tokens"] = self.max_tokens if limit is None else limit
        options["logprobs"] = bool(self.logprobs)
        options["top_logprobs"] = self.top_logprobs
        return [
            Job(None, GenerateOptions(**options, seed=self.seed_of(output)))
            for output in range(self.n or 1)
        ]


class TokenizeBody(BaseModel):
    """Body of POST /tokenize."""

    model: str = ""
    prompt: str | None = None
    messages: list[Message] | None = None


class DetokenizeBody(BaseModel):
    """Body of POST /detokenize."""

    model: str = ""
    tokens: list[int]


def parse(cls: type[Body], value: object) -> Body:
    """The body as a value.

    Raises:
        InvalidRequest: a field is missing or has a wrong type; the message names it.
    """
    try:
        return cls.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise InvalidRequest(f"{where}: {first['msg']}") from error


def _k(top_k: int | None) -> int | None:
    """VLLM's -1 means all tokens, as 0 does here."""
    return 0 if top_k == -1 else top_k
