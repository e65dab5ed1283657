"""Requests for text: a prompt, how its tokens are chosen, and where a broken answer goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from baton.core.errors import InvalidRequest
from baton.core.prompt import Prompt, TextPrompt
from baton.core.sampling import SamplingParams
from baton.v1 import inference_pb2 as pb2
from baton.wire.fields import as_message, as_value
from baton.wire.prompt import chat_from_pb, prompt_fields
from baton.wire.sampling import sampling_from_pb, sampling_to_pb

MAX_CACHE_SALT_CHARS = 256
MAX_CHAT_MESSAGES = 4096
_WITH_SERVER_DEFAULT = ("temperature", "top_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Where an answer broke off."""

    token_ids: tuple[int, ...]
    """Output tokens that the caller has."""
    num_chars: int
    """Characters of the output's text that the caller has; the tokens may stand for more."""
    fingerprint: bytes = b""
    """Digest of the model that began the answer: no other may continue it. Empty allows any."""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A request for one completion, from the SDK to the scheduler's last attempt."""

    prompt: Prompt
    sampling: SamplingParams
    model: str = ""
    """Empty takes the only model served."""
    request_id: str = ""
    """Empty lets the scheduler make one."""
    priority: int = 0
    cache_salt: str = ""
    explain: bool = False
    """Return stages and placement with the last chunk."""
    return_token_ids: bool = False
    keep_special_tokens: bool = False
    fork_of: str = ""
    """Id of a running request with the same prompt, whose KV this one shares."""
    cache_response: bool = False
    """Allow the kept answer of an identical request, and keep this one's."""
    resume: ResumePoint | None = None
    unset: frozenset[str] = frozenset()
    """Sampling fields that the caller leaves to the server's defaults."""

    @property
    def can_reuse_answer(self) -> bool:
        """True when a kept answer may be sent in place of a computed one."""
        return self.cache_response and self.resume is None

    @property
    def received_ids(self) -> tuple[int, ...]:
        """Output tokens that the caller has from a call that broke."""
        return self.resume.token_ids if self.resume else ()


@dataclass(frozen=True, slots=True)
class TokenizeRequest:
    """A text or a conversation to turn into token ids."""

    prompt: TextPrompt
    model: str = ""


@dataclass(frozen=True, slots=True)
class Tokenized:
    """The token ids of a prompt."""

    token_ids: tuple[int, ...]
    max_model_len_tokens: int
    """Most tokens that the model takes, output included; 0 when unknown."""


def unset_sampling(given: Mapping[str, object]) -> frozenset[str]:
    """Sampling fields with a default at the server that `given` does not name."""
    return frozenset(name for name in _WITH_SERVER_DEFAULT if given.get(name) is None)


@contextmanager
def fitting() -> Iterator[None]:
    """Within it, a value that a message's field cannot hold raises InvalidRequest."""
    try:
        yield
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(f"a value does not fit its field: {error}") from error


def generate_to_pb(
    request: GenerateRequest, *, with_token_ids: bool = False
) -> pb2.GenerateRequest:
    """The wire's form; `with_token_ids` asks for token ids although the request does not.

    Raises:
        InvalidRequest: a value does not fit its field.
    """
    with fitting():
        resume = None
        if (point := request.resume) is not None:
            resume = as_message(pb2.ResumePoint, point, text_chars=point.num_chars)
        message = as_message(
            pb2.GenerateRequest,
            request,
            sampling=sampling_to_pb(request.sampling),
            return_token_ids=request.return_token_ids or with_token_ids,
            resume=resume,
            **prompt_fields(request.prompt),
        )
        for name in request.unset:
            message.sampling.ClearField(name)
    return message


def generate_from_pb(pb: pb2.GenerateRequest) -> GenerateRequest:
    """A request with checked values.

    Raises:
        InvalidRequest: a value is out of range, or the prompt is empty.
    """
    checked_salt(pb.cache_salt)
    resume = None
    if pb.HasField("resume"):
        resume = as_value(ResumePoint, pb.resume, num_chars=pb.resume.text_chars)
    return as_value(
        GenerateRequest,
        pb,
        prompt=prompt_from_pb(pb),
        sampling=sampling_from_pb(pb.sampling),
        resume=resume,
        unset=frozenset(name for name in _WITH_SERVER_DEFAULT if not pb.sampling.HasField(name)),
    )


def tokenize_to_pb(request: TokenizeRequest) -> pb2.TokenizeRequest:
    """The wire's form.

    Raises:
        InvalidRequest: a value does not fit its field.
    """
    with fitting():
        return pb2.TokenizeRequest(model=request.model, **prompt_fields(request.prompt))


def tokenize_from_pb(pb: pb2.TokenizeRequest) -> TokenizeRequest:
    """What to tokenize.

    Raises:
        InvalidRequest: neither a text nor a conversation, or one without messages.
    """
    kind = pb.WhichOneof("input")
    if kind is None:
        raise InvalidRequest("set text or chat")
    return TokenizeRequest(pb.text if kind == "text" else _checked_chat(pb.chat), pb.model)


def prompt_from_pb(pb: pb2.GenerateRequest | pb2.PinPrefixRequest) -> Prompt:
    """A prompt that is not empty.

    Raises:
        InvalidRequest: it is.
    """
    kind = pb.WhichOneof("prompt")
    if kind == "text" and pb.text:
        return pb.text
    if kind == "chat":
        return _checked_chat(pb.chat)
    if kind == "tokens" and pb.tokens.token_ids:
        return tuple(pb.tokens.token_ids)
    raise InvalidRequest(
        "the prompt is empty; set text, chat or tokens to something that is not empty"
    )


def checked_salt(cache_salt: str) -> str:
    """Returns a caller's salt unchanged.

    Raises:
        InvalidRequest: it is too long.
    """
    if len(cache_salt) > MAX_CACHE_SALT_CHARS:
        raise InvalidRequest(f"cache_salt must have at most {MAX_CACHE_SALT_CHARS} characters")
    return cache_salt


def _checked_chat(pb: pb2.ChatPrompt) -> TextPrompt:
    if not 0 < len(pb.messages) <= MAX_CHAT_MESSAGES:
        raise InvalidRequest(
            f"chat must have 1 to {MAX_CHAT_MESSAGES} messages, got {len(pb.messages)}"
        )
    return chat_from_pb(pb)
