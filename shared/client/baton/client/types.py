"""Options of the SDK's methods, and the whole answer that it gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from baton.core.guide import Guide
from baton.core.output import Usage
from baton.core.request import Stage
from baton.wire.inference.chunks import Logprob, PlacementTaken


class ChatOptions(TypedDict, total=False):
    """Keyword options of `chat`; what is left out takes the server's default."""

    tools: Sequence[Mapping[str, Any]] | None
    """Tools for the chat template, as in OpenAI's API. The answer's calls stay in its text."""
    model: str
    """Empty takes the only model served."""
    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    logit_bias: Mapping[int, float] | None
    min_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool
    seed: int | None
    """0 to 2**64 - 1."""
    logprobs: bool
    top_logprobs: int | None
    """Implies `logprobs`."""
    prompt_logprobs: int | None
    """Ask for log-probabilities of the prompt too, with this many most likely tokens each."""
    speculation: bool | None
    draft_source: Literal["model", "ngram"] | None
    """Where drafts come from; "ngram" looks them up in prompt and output."""
    guide: Guide | None
    """What the whole output must match."""
    explain: bool
    """Ask for the stage breakdown and the placement."""
    return_token_ids: bool
    """Fill `token_ids` of the answer and its chunks, which are empty otherwise."""
    keep_special_tokens: bool
    request_id: str
    priority: int
    cache_salt: str
    cache_response: bool
    """Allow an answer kept of an identical request, and keep this one's. Only with a `seed`, or
    temperature 0; ignored otherwise."""
    fork_of: str
    """Request id of a call with the same prompt, started just before: this one waits for its
    prompt, and shares the prompt's KV."""
    timeout_s: float | None
    """Deadline of the whole call, retries included; None takes the client's."""


class GenerateOptions(ChatOptions, total=False):
    """Keyword options of `generate`."""

    messages: Sequence[Mapping[str, Any]]
    """A conversation instead of a prompt, as `{"role": ..., "content": ...}`, oldest first.
    OpenAI's `tool_calls`, `tool_call_id` and `name` may come along."""
    token_ids: Sequence[int]
    """A prompt as token ids instead of text."""


class EmbedOptions(TypedDict, total=False):
    """Keyword options of `embed`."""

    model: str
    """Empty takes the only model served."""
    pooling: Literal["last", "mean"]
    """Which hidden states become the vector: the last token's (the default), or all, averaged."""
    dimensions: int | None
    """Keep only this many leading values."""
    scaled: bool
    """Scale vectors to length 1, as is done by default."""
    request_id: str
    priority: int
    cache_salt: str
    timeout_s: float | None
    """Deadline of the whole call, retries included; None takes the client's."""


class PinOptions(TypedDict, total=False):
    """Keyword options of `pin_prefix`."""

    messages: Sequence[Mapping[str, Any]]
    """A conversation instead of a prompt, as in `generate`."""
    token_ids: Sequence[int]
    model: str
    cache_salt: str
    ttl_s: float
    """How long it is kept: a day, if not given."""
    label: str
    """Your name for it."""
    timeout_s: float | None


@dataclass(frozen=True, slots=True)
class Tls:
    """Certificates as PEM bytes. Without `ca` the system's roots are used."""

    ca: bytes | None = None
    cert: bytes | None = None
    key: bytes | None = None
    server_name: str = ""
    """Name to expect in the server's certificate, when it is not the address's host."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer."""

    text: str
    finish_reason: str
    usage: Usage
    token_ids: tuple[int, ...] = ()
    """Empty unless asked for with `return_token_ids`."""
    stop_reason: str = ""
    logprobs: tuple[Logprob, ...] = ()
    prompt_logprobs: tuple[Logprob, ...] = ()
    """Of the prompt's tokens from the second on, where asked for."""
    stages: tuple[Stage, ...] = ()
    """Empty unless asked for with `explain`."""
    placement: PlacementTaken | None = None
    request_id: str = ""
    model: str = ""
    trace_id: str = ""
    ttft_s: float | None = None
    """At this client: from the call's start to the first message with text or a token."""
    elapsed_s: float = 0.0
    """At this client: from the call's start to its end."""
    num_attempts: int = 1
    """Calls made: more than one when the server refused at first, or the answer broke off."""
    seed: int | None = None
    """Of the noise, given or chosen by the server: the same one gives the same answer again."""
