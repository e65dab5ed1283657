"""What a tokenizer answers: checks limits, and calls the vocabulary where it does not block."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from baton.core.errors import BatonError, InvalidRequest, QueueFull
from baton.core.prompt import Chat, TextPrompt
from baton.rpc.metrics import Metrics
from baton.tokenizer.chat_template import read_array, read_message
from baton.tokenizer.detokenize import Detokenizer
from baton.tokenizer.settings import TokenizerSettings
from baton.tokenizer.vocabulary import Vocabularies, Vocabulary
from baton.wire.tokenizer import Encoded, OpenText, TextPiece, TextReply, TokenizerInfo

_Result = TypeVar("_Result")
SHORT_TEXT_CHARS = 2_000
"""Encoded on the event loop: about a millisecond, less than handing it to a thread is worth."""


class TokenizerMetrics:
    """Counts of what went through."""

    def __init__(self, metrics: Metrics) -> None:
        self.encoded_tokens = metrics.counter("tokenizer_encoded_tokens", "Token ids encoded")
        self.decoded_tokens = metrics.counter(
            "tokenizer_decoded_tokens", "Token ids turned into text"
        )
        self.open_outputs = metrics.gauge(
            "tokenizer_open_outputs", "Outputs being turned into text"
        )


@dataclass(frozen=True, slots=True)
class _OpenOutput:
    vocabulary: Vocabulary
    detokenizer: Detokenizer


class OpenOutputs:
    """Implements wire.tokenizer.TextSession, for a bounded number of outputs. Not thread-safe."""

    def __init__(
        self, vocabularies: Vocabularies, limits: TokenizerSettings, metrics: TokenizerMetrics
    ) -> None:
        self._vocabularies = vocabularies
        self._limits = limits
        self._metrics = metrics
        self._by_id: dict[int, _OpenOutput] = {}

    def answer(self, piece: TextPiece) -> TextReply:
        """Answers a piece. An error closes its output and leaves the others alone."""
        stream_id = piece.stream_id
        try:
            _check_ids(len(piece.token_ids) + len(piece.describe_token_ids), self._limits)
            if piece.open is not None:
                self._open(stream_id, piece.open)
        except BatonError as error:
            self._close(stream_id)
            return TextReply(stream_id, error=error)
        output = self._by_id.get(stream_id)
        if output is None:
            return TextReply(stream_id)
        added = output.detokenizer.add(piece.token_ids, is_last=piece.is_last)
        if piece.is_last or added.stop:
            self._close(stream_id)
        self._metrics.decoded_tokens.inc(added.num_tokens)
        return TextReply(
            stream_id,
            added.text,
            added.stop,
            added.num_tokens,
            tuple(map(output.vocabulary.describe, piece.describe_token_ids)),
        )

    def close(self) -> None:
        """Forgets all outputs."""
        self._metrics.open_outputs.dec(len(self._by_id))
        self._by_id.clear()

    def _open(self, stream_id: int, how: OpenText) -> None:
        if stream_id in self._by_id:
            raise InvalidRequest(f"stream_id {stream_id} is open already")
        if len(self._by_id) >= self._limits.max_open_outputs:
            raise QueueFull(
                f"{self._limits.max_open_outputs} outputs are open in this call", retry_after_s=1.0
            )
        vocabulary = self._vocabularies.get(how.model)
        detokenizer = Detokenizer(vocabulary, how.stop, keep_special_tokens=how.keep_special_tokens)
        self._by_id[stream_id] = _OpenOutput(vocabulary, detokenizer)
        self._metrics.open_outputs.inc()

    def _close(self, stream_id: int) -> None:
        if self._by_id.pop(stream_id, None) is not None:
            self._metrics.open_outputs.dec()


class LocalTokenizer:
    """Implements wire.tokenizer.TokenizerServer; `executor` runs what would block the loop."""

    def __init__(
        self,
        vocabularies: Vocabularies,
        limits: TokenizerSettings,
        executor: Executor,
        metrics: Metrics,
    ) -> None:
        self._vocabularies = vocabularies
        self._limits = limits
        self._executor = executor
        self._metrics = TokenizerMetrics(metrics)

    async def encode(self, model: str, prompt: TextPrompt) -> Encoded:
        """Text or a conversation to token ids."""
        vocabulary = self._vocabularies.get(model)
        if isinstance(prompt, Chat):
            token_ids = await self._encode_chat(vocabulary, prompt)
        else:
            self._check_chars(len(prompt))
            token_ids = await self._run(len(prompt), partial(vocabulary.encode_text, prompt))
        self._metrics.encoded_tokens.inc(len(token_ids))
        return Encoded(vocabulary.name, tuple(token_ids), vocabulary.tokenizer_hash)

    async def decode_text(
        self, model: str, token_ids: Sequence[int], *, keep_special_tokens: bool
    ) -> str:
        """Token ids to text."""
        vocabulary = self._vocabularies.get(model)
        _check_ids(len(token_ids), self._limits)
        decode = partial(vocabulary.decode, token_ids, keep_special_tokens=keep_special_tokens)
        text = await self._run(len(token_ids), decode)
        self._metrics.decoded_tokens.inc(len(token_ids))
        return text

    def open_session(self) -> OpenOutputs:
        """Begins to turn outputs into text; the caller closes it."""
        return OpenOutputs(self._vocabularies, self._limits, self._metrics)

    def tokenizers(self) -> list[TokenizerInfo]:
        """The models known here."""
        return [
            TokenizerInfo(
                model=vocabulary.name,
                tokenizer_hash=vocabulary.tokenizer_hash,
                vocab_size=vocabulary.vocab_size,
                eos_token_ids=vocabulary.eos_token_ids,
                has_chat_template=vocabulary.chat_template is not None,
            )
            for vocabulary in self._vocabularies
        ]

    async def _encode_chat(self, vocabulary: Vocabulary, chat: Chat) -> list[int]:
        if not 0 < len(chat.turns) <= self._limits.max_chat_messages:
            raise InvalidRequest(
                f"chat must have 1 to {self._limits.max_chat_messages} messages, "
                f"got {len(chat.turns)}"
            )
        num_chars = len(chat.tools_json) + sum(
            len(turn.role) + len(turn.content) + len(turn.tool_calls_json) for turn in chat.turns
        )
        self._check_chars(num_chars)
        messages = [read_message(turn) for turn in chat.turns]
        tools = read_array(chat.tools_json, "tools")
        return await self._run(num_chars, partial(vocabulary.encode_chat, messages, tools=tools))

    async def _run(self, size: int, function: Callable[[], _Result]) -> _Result:
        if size <= SHORT_TEXT_CHARS:
            return function()
        return await asyncio.get_running_loop().run_in_executor(self._executor, function)

    def _check_chars(self, num_chars: int) -> None:
        if num_chars > self._limits.max_text_chars:
            raise InvalidRequest(
                f"the text has {num_chars} characters; "
                f"at most {self._limits.max_text_chars} are encoded at once"
            )


def _check_ids(num_ids: int, limits: TokenizerSettings) -> None:
    if num_ids > limits.max_token_ids:
        raise InvalidRequest(
            f"the message has {num_ids} token ids; at most {limits.max_token_ids} are taken at once"
        )
