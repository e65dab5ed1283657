"""What a tokenizer answers: checks limits, and calls the vocabulary where it does not block."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from baton.core.errors import InvalidRequest
from baton.core.prompt import Chat, TextPrompt
from baton.tokenizer.conversation import read_array, read_message
from baton.tokenizer.outputs import OpenOutputs, TokenizerMetrics
from baton.tokenizer.vocabulary import Vocabularies, Vocabulary
from baton.wire.tokenizer import Encoded, TokenizerInfo

_Result = TypeVar("_Result")
SHORT_TEXT_CHARS = 2_000
"""Encoded on the event loop: about a millisecond, less than handing it to a thread is worth."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on one message."""

    max_text_chars: int
    max_token_ids: int
    max_chat_messages: int
    max_open_outputs: int


class LocalTokenizer:
    """Implements wire.tokenizer.TokenizerServer; `executor` runs what would block the loop."""

    def __init__(
        self,
        vocabularies: Vocabularies,
        limits: Limits,
        executor: Executor,
        metrics: TokenizerMetrics,
    ) -> None:
        self._vocabularies = vocabularies
        self._limits = limits
        self._executor = executor
        self._metrics = metrics

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
        self._check_ids(len(token_ids))
        decode = partial(vocabulary.decode, token_ids, keep_special_tokens=keep_special_tokens)
        text = await self._run(len(token_ids), decode)
        self._metrics.decoded_tokens.inc(len(token_ids))
        return text

    def open_session(self) -> OpenOutputs:
        """Begins to turn outputs into text; the caller closes it."""
        return OpenOutputs(
            self._vocabularies, self._limits.max_open_outputs, self._check_ids, self._metrics
        )

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

    def _check_ids(self, num_ids: int) -> None:
        if num_ids > self._limits.max_token_ids:
            raise InvalidRequest(
                f"the message has {num_ids} token ids; "
                f"at most {self._limits.max_token_ids} are taken at once"
            )
