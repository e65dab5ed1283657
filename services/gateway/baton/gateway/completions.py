"""/v1/completions: its request body, and its answers in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

from pydantic import Field

from baton.client import Chunk, Completion, GenerateOptions, InvalidRequest, Logprob, TopLogprob
from baton.gateway.answer_format import (
    AnswerHeader,
    Json,
    finite,
    prompt_logprobs_json,
    token_ids_json,
    with_explanation,
)
from baton.gateway.sampling_body import ChoiceRequest, SamplingBody

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of `max_tokens`."""


class CompletionBody(SamplingBody):
    """Body of POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(default=None, ge=0, le=20)
    best_of: int | None = None
    add_special_tokens: Literal[True] | None = None

    def choices(self, max_choices: int) -> list[ChoiceRequest]:
        """All `n` choices of the first prompt, then those of the next.

        Raises:
            InvalidRequest: there is no prompt, there are too many choices, or a field is not
                supported.
        """
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise InvalidRequest("best_of must be n: answers are not ranked here; leave it out")
        prompts = self._prompts()
        self.check_num_choices(len(prompts), max_choices)
        options = self.shared_options()
        options["max_tokens"] = (
            DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        )
        if self.logprobs is not None:
            options["logprobs"] = True
            options["top_logprobs"] = self.logprobs
        choices: list[ChoiceRequest] = []
        for prompt in prompts:
            if isinstance(prompt, str):
                choices += self.choices_of(prompt, options)
            else:
                choices += self.choices_of(None, GenerateOptions(**options, token_ids=prompt))
        return choices

    def _prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise InvalidRequest("prompt must not be empty")
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class CompletionFormat:
    """Implements AnswerFormat for one answer; text offsets run through each choice."""

    chunk_kind = "text_completion"

    def __init__(self, header: AnswerHeader) -> None:
        self.header = header
        self._offsets: dict[int, int] = {}

    def opening(self, index: int) -> list[Json]:
        """Nothing: the first piece opens a choice."""
        del index
        return []

    def pieces(self, index: int, chunk: Chunk) -> list[Json]:
        """See AnswerFormat."""
        if not (chunk.text or chunk.finish_reason or chunk.logprobs or chunk.token_ids):
            return []
        body = self.header.chunk(self.chunk_kind, [self._choice(index, chunk)])
        return [with_explanation(body, [chunk])]

    def whole(self, answers: Sequence[Completion], usage: Json) -> Json:
        """See AnswerFormat."""
        choices = [
            {**self._choice(index, answer), **prompt_logprobs_json(answer)}
            for index, answer in enumerate(answers)
        ]
        body = {**self.header.object("text_completion", choices), "usage": usage}
        return with_explanation(body, answers)

    def _choice(self, index: int, part: Chunk | Completion) -> Json:
        return {
            "index": index,
            "text": part.text,
            "logprobs": self._logprobs(index, part.logprobs) if part.logprobs else None,
            "finish_reason": part.finish_reason or None,
            "stop_reason": part.stop_reason or None,
            **token_ids_json(part),
        }

    def _logprobs(self, index: int, entries: Sequence[Logprob]) -> Json:
        first = self._offsets.get(index, 0)
        offsets = list(accumulate((len(entry.token) for entry in entries), initial=first))
        self._offsets[index] = offsets.pop()
        has_top = any(entry.top for entry in entries)
        return {
            "tokens": [_token_name(entry) for entry in entries],
            "token_logprobs": [finite(entry.logprob) for entry in entries],
            "top_logprobs": (
                [{_token_name(top): finite(top.logprob) for top in entry.top} for entry in entries]
                if has_top
                else None
            ),
            "text_offset": offsets,
        }


def _token_name(entry: Logprob | TopLogprob) -> str:
    """The token's text; its bytes, as OpenAI writes them, where it is part of a character."""
    if "\ufffd" not in entry.token:
        return entry.token
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry.token_bytes)
