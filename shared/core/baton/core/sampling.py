"""How tokens are chosen, and why a sequence ends: plain values that every service agrees on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType

from baton.core.errors import InvalidRequest
from baton.core.guide import Guide

MAX_STOP_STRINGS = 16
MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
_NO_BIAS: Mapping[int, float] = MappingProxyType({})


class FinishReason(Enum):
    """Mirrors baton.v1.FinishReason, name for name and number for number (a test compares them)."""

    STOP = 1
    LENGTH = 2
    CANCELLED = 3
    ERROR = 4


class DraftSource(Enum):
    """Where drafts come from. Mirrors baton.v1.DraftSource."""

    MODEL = 1
    NGRAM = 2
    """Looked up in prompt and output."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """One request's sampling settings; `check()` has passed on all that reach an engine."""

    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """0 keeps all tokens."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Over prompt and output tokens."""
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    """Frequency and presence count output tokens only."""
    logit_bias: Mapping[int, float] = field(default_factory=lambda: _NO_BIAS)
    max_tokens: int | None = None
    """None: as many as the context holds."""
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    """Looked for by the tokenizer service, never by an engine."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    """None only until the scheduler has chosen one."""
    logprobs: bool = False
    top_logprobs: int = 0
    prompt_logprobs: int | None = None
    """How many of the most likely tokens to report per prompt token, besides it; None for none."""
    speculation: bool | None = None
    draft_source: DraftSource | None = None
    """None: the draft model where there is one, else looked up."""
    guide: Guide | None = None
    """What the whole output must match."""

    @property
    def has_penalty(self) -> bool:
        """Whether earlier tokens change the logits."""
        penalties = self.repetition_penalty, self.frequency_penalty, self.presence_penalty
        return penalties != (1.0, 0.0, 0.0)

    @property
    def is_greedy(self) -> bool:
        """True when no noise is involved."""
        return self.temperature == 0.0

    def check(self) -> SamplingParams:
        """Returns itself.

        Raises:
            InvalidRequest: a value is out of range; the message names it and the range.
        """
        _in_range("temperature", self.temperature, 0.0, 100.0)
        _in_range("top_k", self.top_k, 0, 1 << 31)
        _in_range("top_p", self.top_p, 0.0, 1.0, low_is_open=True)
        _in_range("min_p", self.min_p, 0.0, 1.0)
        _in_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_is_open=True)
        _in_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _in_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _in_range("top_logprobs", self.top_logprobs, 0, MAX_TOP_LOGPROBS)
        if self.prompt_logprobs is not None:
            _in_range("prompt_logprobs", self.prompt_logprobs, 0, MAX_TOP_LOGPROBS)
        if self.max_tokens is not None:
            _in_range("max_tokens", self.max_tokens, 1, 1 << 31)
        _in_range("min_tokens", self.min_tokens, 0, 1 << 31)
        if len(self.stop) > MAX_STOP_STRINGS or any(
            not text or len(text) > 1024 for text in self.stop
        ):
            raise InvalidRequest(
                f"stop must be at most {MAX_STOP_STRINGS} texts of 1 to 1024 characters each"
            )
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequest(f"logit_bias must have at most {MAX_LOGIT_BIAS} entries")
        for token_id, bias in self.logit_bias.items():
            _in_range(f"logit_bias[{token_id}]", bias, -1000.0, 1000.0)
        if self.guide is not None:
            self.guide.check()
            if self.ignore_eos:
                raise InvalidRequest(
                    "ignore_eos cannot be set with a guide, whose output ends when it matches"
                )
        return self


def _in_range(
    name: str, value: float, low: float, high: float, *, low_is_open: bool = False
) -> None:
    is_low_enough = value > low if low_is_open else value >= low
    if math.isfinite(value) and is_low_enough and value <= high:
        return
    bracket = "(" if low_is_open else "["
    raise InvalidRequest(f"{name} must be in {bracket}{low:g}, {high:g}], got {value:g}")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probabilities at one output position."""

    logprob: float
    top_token_ids: tuple[int, ...] = ()
    """Most likely tokens, most likely first."""
    top_logprobs: tuple[float, ...] = ()
