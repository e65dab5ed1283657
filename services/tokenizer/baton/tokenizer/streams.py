"""The outputs that one StreamText call keeps open."""

from __future__ import annotations

from dataclasses import dataclass

from baton.core.errors import InvalidRequest, QueueFull
from baton.tokenizer.detokenize import Piece, TextStream
from baton.tokenizer.vocabulary import Vocabularies, Vocabulary

_NOTHING = Piece("", 0)


@dataclass(frozen=True, slots=True)
class OpenOutput:
    """An output being turned into text."""

    vocabulary: Vocabulary
    stream: TextStream


class OpenOutputs:
    """Outputs by the caller's number; bounded. Not thread-safe: one call owns it."""

    def __init__(self, vocabularies: Vocabularies, max_outputs: int) -> None:
        self._vocabularies = vocabularies
        self._max_outputs = max_outputs
        self._by_id: dict[int, OpenOutput] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def open(
        self, stream_id: int, model: str, stops: tuple[str, ...], *, keep_special_tokens: bool
    ) -> None:
        """Opens an output.

        Raises:
            InvalidRequest: the number is in use, or a stop string cannot be one.
            ModelNotFound: no tokenizer of that name.
            QueueFull: too many are open.
        """
        if stream_id in self._by_id:
            raise InvalidRequest(f"stream_id {stream_id} is open already")
        if len(self._by_id) >= self._max_outputs:
            raise QueueFull(f"{self._max_outputs} outputs are open in this call", retry_after_s=1.0)
        vocabulary = self._vocabularies.get(model)
        stream = TextStream(vocabulary, stops, keep_special_tokens=keep_special_tokens)
        self._by_id[stream_id] = OpenOutput(vocabulary, stream)

    def get(self, stream_id: int) -> OpenOutput | None:
        """The output, None when it is not open."""
        return self._by_id.get(stream_id)

    def add(self, stream_id: int, token_ids: tuple[int, ...], *, is_last: bool) -> Piece:
        """Appends tokens to an output, and closes it when it ends. Nothing if it is not open."""
        output = self._by_id.get(stream_id)
        if output is None:
            return _NOTHING
        piece = output.stream.add(token_ids, is_last=is_last)
        if is_last or piece.stop:
            self.close(stream_id)
        return piece

    def close(self, stream_id: int) -> None:
        """Forgets an output. Idempotent."""
        self._by_id.pop(stream_id, None)
