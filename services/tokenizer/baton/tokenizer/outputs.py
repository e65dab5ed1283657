"""The outputs that one StreamText call keeps open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import Counter, Gauge

from baton.core.errors import BatonError, InvalidRequest, QueueFull
from baton.tokenizer.detokenize import Detokenizer
from baton.tokenizer.vocabulary import Vocabularies, Vocabulary
from baton.wire.tokenizer import OpenText, TextPiece, TextReply


@dataclass(frozen=True, slots=True)
class TokenizerMetrics:
    """Counts of what went through."""

    encoded_tokens: Counter
    decoded_tokens: Counter
    open_outputs: Gauge


@dataclass(frozen=True, slots=True)
class _OpenOutput:
    vocabulary: Vocabulary
    detokenizer: Detokenizer


class OpenOutputs:
    """Implements wire.tokenizer.TextSession, for a bounded number of outputs. Not thread-safe."""

    def __init__(
        self,
        vocabularies: Vocabularies,
        max_outputs: int,
        check_size: Callable[[int], None],
        metrics: TokenizerMetrics,
    ) -> None:
        """`check_size` raises InvalidRequest for a piece of too many tokens."""
        self._vocabularies = vocabularies
        self._max_outputs = max_outputs
        self._check_size = check_size
        self._metrics = metrics
        self._by_id: dict[int, _OpenOutput] = {}

    def answer(self, piece: TextPiece) -> TextReply:
        """Answers a piece. An error closes its output and leaves the others alone."""
        stream_id = piece.stream_id
        try:
            self._check_size(len(piece.token_ids) + len(piece.describe_token_ids))
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
        if len(self._by_id) >= self._max_outputs:
            raise QueueFull(f"{self._max_outputs} outputs are open in this call", retry_after_s=1.0)
        vocabulary = self._vocabularies.get(how.model)
        detokenizer = Detokenizer(vocabulary, how.stop, keep_special_tokens=how.keep_special_tokens)
        self._by_id[stream_id] = _OpenOutput(vocabulary, detokenizer)
        self._metrics.open_outputs.inc()

    def _close(self, stream_id: int) -> None:
        if self._by_id.pop(stream_id, None) is not None:
            self._metrics.open_outputs.dec()
