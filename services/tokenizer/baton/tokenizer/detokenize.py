"""Token ids to text while they come: whole characters only, nothing that may become a stop string.

Three small machines in a row: tokens → characters (`Characters`), characters → text that is certain
(`StopMatcher`), and `Detokenizer`, which runs both for one output. Pure; knows no transport.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.core.errors import InvalidRequest
from baton.core.sampling import MAX_STOP_STRINGS
from baton.tokenizer.vocabulary import Vocabulary

MAX_STOP_CHARS = 1024
_MAX_HELD_TOKENS = 8
"""A character has at most 4 bytes, and few tokens are empty: after more it cannot be completed."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that became certain, and where the output ended if it did."""

    text: str
    num_tokens: int
    """How many of the given tokens belong to the output."""
    stop: str = ""
    """Stop string that ended it; the text ends before it."""


class Characters(Protocol):
    """Turns tokens into whole characters."""

    def add(self, token_id: int) -> str:
        """The characters that this token completes."""

    def end(self) -> str:
        """What was held back, incomplete UTF-8 replaced."""


class ByteCharacters:
    """For byte-level vocabularies: exact and O(1), since a token's bytes need no neighbours."""

    def __init__(self, vocabulary: Vocabulary, skipped_ids: frozenset[int]) -> None:
        self._vocabulary = vocabulary
        self._skipped_ids = skipped_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        """See Characters."""
        if token_id in self._skipped_ids:
            return ""
        return self._decoder.decode(self._vocabulary.token_bytes(token_id))

    def end(self) -> str:
        """See Characters."""
        return self._decoder.decode(b"", final=True)


class WindowCharacters:
    """For other vocabularies, where spaces and bytes depend on neighbours.

    Decodes the last piece's tokens with and without the new ones, and takes the difference.
    Source: text-generation-inference, `decode_token` (prefix and read offsets).
    """

    def __init__(self, vocabulary: Vocabulary, skipped_ids: frozenset[int]) -> None:
        self._vocabulary = vocabulary
        self._skipped_ids = skipped_ids
        self._before: list[int] = []
        self._held: list[int] = []

    def add(self, token_id: int) -> str:
        """See Characters."""
        if token_id in self._skipped_ids:
            return ""
        self._held.append(token_id)
        text = self._new_text()
        is_open = not text or text.endswith("\ufffd")
        if is_open and len(self._held) < _MAX_HELD_TOKENS:
            return ""
        self._before, self._held = self._held, []
        return text

    def end(self) -> str:
        """See Characters."""
        text = self._new_text()
        self._before, self._held = self._held, []
        return text

    def _new_text(self) -> str:
        start = self._vocabulary.text_of(self._before)
        whole = self._vocabulary.text_of(self._before + self._held)
        return whole[len(start) :]


class StopMatcher:
    """Finds the stop string that completes first; of two that end together, the longer.

    A Knuth-Morris-Pratt automaton per stop string: constant work per character, and the same result
    however the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self._held = ""

    def add(self, text: str) -> tuple[str, str]:
        """Text that is certain, and the stop string found ("" if none): the text ends before it."""
        if not self._stops:
            return text, ""
        pending = self._held + text
        for index in range(len(self._held), len(pending)):
            stop = self._advance(pending[index])
            if stop:
                return pending[: index + 1 - len(stop)], stop
        certain = len(pending) - max(self._matched)
        self._held = pending[certain:]
        return pending[:certain], ""

    def end(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str:
        for index, stop in enumerate(self._stops):
            matched = self._matched[index]
            while matched and stop[matched] != character:
                matched = self._borders[index][matched - 1]
            if stop[matched] == character:
                matched += 1
            self._matched[index] = matched
            if matched == len(stop):
                return stop
        return ""


class Detokenizer:
    """One output's text."""

    def __init__(
        self, vocabulary: Vocabulary, stops: Sequence[str], *, keep_special_tokens: bool
    ) -> None:
        """Opens an output.

        Raises:
            InvalidRequest: too many stop strings, or one is empty or too long.
        """
        if len(stops) > MAX_STOP_STRINGS or not all(
            0 < len(stop) <= MAX_STOP_CHARS for stop in stops
        ):
            raise InvalidRequest(
                f"stop must be at most {MAX_STOP_STRINGS} texts of 1 to {MAX_STOP_CHARS} characters"
            )
        skipped_ids = frozenset() if keep_special_tokens else vocabulary.special_ids
        kind = ByteCharacters if vocabulary.is_byte_level else WindowCharacters
        self._characters: Characters = kind(vocabulary, skipped_ids)
        self._matcher = StopMatcher(stops)

    def add(self, token_ids: Sequence[int], *, is_last: bool = False) -> Piece:
        """Appends tokens; with `is_last`, also returns what was held back."""
        texts: list[str] = []
        for index, token_id in enumerate(token_ids):
            text, stop = self._matcher.add(self._characters.add(token_id))
            texts.append(text)
            if stop:
                return Piece("".join(texts), index + 1, stop)
        if is_last:
            text, stop = self._matcher.add(self._characters.end())
            texts.append(text)
            if stop:
                return Piece("".join(texts), len(token_ids), stop)
            texts.append(self._matcher.end())
        return Piece("".join(texts), len(token_ids))


def _borders(text: str) -> list[int]:
    """Per prefix of the text, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(text)
    matched = 0
    for index in range(1, len(text)):
        while matched and text[index] != text[matched]:
            matched = borders[matched - 1]
        matched += text[index] == text[matched]
        borders[index] = matched
    return borders
