"""Grammars that outputs must match, compiled by llguidance, as masks over the vocabulary.

A constraint's state is a function of the output tokens so far: it is made by replaying them, so
that nothing of it is handed over, kept through a preemption or restored after a fail-over.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from itertools import takewhile
from pathlib import Path

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from baton.core.errors import BatonError, InvalidRequest, QueueFull, Unsupported
from baton.core.guide import Guide, GuideKind

MAX_COMPILED = 64
"""Grammars kept for the next request that names them."""
_MAX_LEXER_STATES = 32_768
"""Of one grammar; about 1 KB each."""
_LEXER_FUEL = 200_000
"""Size of a grammar. Large hand-written guides take half of it; with llguidance's own 1,000,000 a
pattern like (a{1000}){1000} held the engine's thread up for two seconds."""
_MAX_RENEWALS = 2
"""In a row: the first may lead to a template that others have filled, the second one is new."""
_MAX_MESSAGE_CHARS = 300
_RETRY_AFTER_S = 0.5
_JSON_WHITESPACE = r"\x20|\n[\x20\t]{0,24}"
"""Usual indentation. Bounded, because small models otherwise emit whitespace, or blank lines,
until max_tokens."""


class GrammarConstraint:
    """The masks of one sequence. Only the engine thread calls it, once the sequence is computed.

    Implements `baton.core.sequence.Constraint`.
    """

    def __init__(
        self,
        template: LLMatcher,
        num_prompt_tokens: int,
        *,
        eos_token_ids: Collection[int],
        renew: Callable[[LLMatcher], LLMatcher],
    ) -> None:
        """Works on a copy of `template`, which has seen no token.

        `renew` gives another template for one whose lexer is full.
        """
        self._template = template
        self._renew = renew
        self._eos_token_ids = eos_token_ids
        self._num_prompt_tokens = num_prompt_tokens
        self.failure: BatonError | None = None
        self._restart()

    def mask(self, token_ids: Sequence[int], drafts: Sequence[int]) -> bytes | None:
        """See `baton.core.sequence.Constraint`."""
        if self.failure is not None:
            return None
        mask = self._mask(token_ids, drafts)
        for _ in range(_MAX_RENEWALS):
            if mask is not None or not self._matcher.is_error():
                return mask
            try:
                self._template = self._renew(self._template)
            except BatonError as error:
                self.failure = error
                return None
            self._restart()
            mask = self._mask(token_ids, drafts)
        if mask is None and self._matcher.is_error():
            why = _shortened(self._matcher.get_error())
            self.failure = InvalidRequest(f"the guide cannot be followed any further: {why}")
        return mask

    def _restart(self) -> None:
        self._matcher: LLMatcher = self._template.deep_copy()
        self._num_known = self._num_prompt_tokens
        """Leading tokens of the sequence taken account of, prompt included."""
        self._path: list[int] = []
        """Drafts that the matcher has consumed besides; they may be rolled back."""
        self._masks: dict[int, bytes] = {}
        """By number of tokens of `_path` before: draft and target ask for the same ones."""

    def _mask(self, token_ids: Sequence[int], drafts: Sequence[int]) -> bytes | None:
        """The mask; None when the matcher is in an error, or nothing can follow."""
        if len(token_ids) > self._num_known:
            self._learn(token_ids[self._num_known :])
            self._num_known = len(token_ids)
        if self._matcher.is_error() or not self._follow(drafts):
            return None
        return self._mask_after_path(len(drafts))

    def _mask_after_path(self, length: int) -> bytes | None:
        """After the first drafts of the path, all of it if that mask is not known yet."""
        known = self._masks.get(length)
        if known is not None:
            return known
        mask: bytes = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            return None
        self._masks[length] = mask
        return mask

    def _learn(self, token_ids: Sequence[int]) -> None:
        """Moves on by tokens that stay."""
        num_common = _num_common(self._path, token_ids)
        self._roll_back(num_common)
        rest = list(token_ids[num_common:])
        # Fails also when the lexer is full: `mask` finds the matcher in an error then.
        self._matcher.consume_tokens(rest)
        self._path.clear()
        self._masks.clear()

    def _follow(self, drafts: Sequence[int]) -> bool:
        """Moves to the place after some drafts. False if they cannot come."""
        num_common = _num_common(self._path, drafts)
        if num_common == len(drafts) and num_common in self._masks:
            return True
        self._roll_back(num_common)
        for token_id in drafts[num_common:]:
            mask = self._mask_after_path(len(self._path))
            is_allowed = mask is not None and mask[token_id // 8] >> token_id % 8 & 1
            if token_id in self._eos_token_ids or not is_allowed:
                return False
            # What the mask allows can fail all the same: when the lexer is full.
            if not self._matcher.consume_token(token_id):
                return False
            self._path.append(token_id)
        return True

    def _roll_back(self, num_kept: int) -> None:
        num_dropped = len(self._path) - num_kept
        if num_dropped > 0:
            self._matcher.rollback(num_dropped)
            del self._path[num_kept:]
            self._masks = {at: mask for at, mask in self._masks.items() if at <= num_kept}


class Grammars:
    """Compiles guides, and keeps what it compiled. Any thread; a large grammar takes a while."""

    def __init__(
        self,
        directory: Path,
        *,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        max_compiled: int = MAX_COMPILED,
        max_lexer_states: int = _MAX_LEXER_STATES,
    ) -> None:
        """Reads nothing yet: the tokenizer is read for the first guide."""
        self._directory = directory
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._max_compiled = max_compiled
        self._limits = LLParserLimits(
            max_lexer_states=max_lexer_states,
            initial_lexer_fuel=_LEXER_FUEL,
            verbose_errors=False,
        )
        self._tokenizer: LLTokenizer | None = None
        self._tokenizer_lock = threading.Lock()
        self._compiled: OrderedDict[Guide, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()
        self.compiles_on_demand = True
        """Whether `constraint` compiles a guide that is not kept, which takes long."""

    def __contains__(self, guide: Guide) -> bool:
        with self._lock:
            return guide in self._compiled

    def __len__(self) -> int:
        return len(self._compiled)

    def constraint(self, guide: Guide, num_prompt_tokens: int) -> GrammarConstraint:
        """A constraint for one sequence.

        Raises:
            InvalidRequest, Unsupported: see `compile`.
            QueueFull: other guides displaced the compiled grammar since; compile it again.
        """
        if not self.compiles_on_demand and guide not in self:
            raise QueueFull(
                "other guides displaced this one's compiled grammar; send the request again",
                retry_after_s=_RETRY_AFTER_S,
            )
        return GrammarConstraint(
            self.compile(guide),
            num_prompt_tokens,
            eos_token_ids=self._eos_token_ids,
            renew=lambda stale: self.compile(guide, stale),
        )

    def compile(self, guide: Guide, stale: LLMatcher | None = None) -> LLMatcher:
        """A guide's matcher, which must be copied before use; another one than `stale`.

        Copies share the states that their lexer has found so far, up to a limit. A grammar in long
        use may reach it, and then has to be compiled anew.

        Raises:
            InvalidRequest: the guide is not well-formed, too large, or nothing can match it.
            Unsupported: the model has no tokenizer that grammars can be compiled for.
        """
        with self._lock:
            known = self._compiled.get(guide)
            if known is not None and known is not stale:
                self._compiled.move_to_end(guide)
                return known
        template = self._compile(guide.check())
        with self._lock:
            self._compiled[guide] = template
            self._compiled.move_to_end(guide)
            while len(self._compiled) > self._max_compiled:
                self._compiled.popitem(last=False)
        return template

    def _compile(self, guide: Guide) -> LLMatcher:
        tokenizer = self._loaded_tokenizer()
        try:
            grammar = _grammar(guide)
        except ValueError as error:
            raise _refused(guide, str(error)) from error
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise _refused(guide, matcher.get_error())
        # Finds what is refused only when used, and warms what all copies share.
        mask = matcher.compute_bitmask()
        if matcher.is_error():
            raise _refused(guide, matcher.get_error())
        if not any(mask):
            raise _refused(guide, "no output can match it")
        return matcher

    def _loaded_tokenizer(self) -> LLTokenizer:
        if not self._eos_token_ids:
            raise Unsupported("guides need an end-of-sequence token, and the model has none")
        with self._tokenizer_lock:
            try:
                self._tokenizer = self._tokenizer or LLTokenizer(
                    (self._directory / "tokenizer.json").read_text(encoding="utf-8"),
                    n_vocab=self._vocab_size,
                    eos_token=sorted(self._eos_token_ids),
                )
            except (OSError, ValueError) as error:
                raise Unsupported(
                    f"guides need a tokenizer.json that llguidance can read: {error}"
                ) from error
            return self._tokenizer


def _grammar(guide: Guide) -> str:
    """The guide as llguidance wants it. ValueError if that is impossible."""
    match guide.kind:
        case GuideKind.JSON_SCHEMA:
            return _json_grammar(guide.text)
        case GuideKind.JSON_OBJECT:
            return _json_grammar('{"type": "object"}')
        case GuideKind.REGEX:
            return LLMatcher.grammar_from_regex(guide.text)
        case GuideKind.LARK:
            return grammar_from("grammar" if "::=" in guide.text else "lark", guide.text)
        case GuideKind.CHOICE:
            options = " | ".join(json.dumps(option) for option in guide.choices())
            # One terminal: as rules, thousands of texts would exceed the parser's limits.
            return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {options}")


def _json_grammar(schema: str) -> str:
    return LLMatcher.grammar_from_json_schema(
        schema, overrides={"whitespace_pattern": _JSON_WHITESPACE}
    )


def _refused(guide: Guide, why: str) -> InvalidRequest:
    return InvalidRequest(f"guide.{guide.kind.value} is refused: {_shortened(why)}")


def _shortened(text: str) -> str:
    """What fits a message, in one line: llguidance draws the grammar below its errors."""
    return " ".join(text.split())[:_MAX_MESSAGE_CHARS]


def _num_common(left: Sequence[int], right: Sequence[int]) -> int:
    return sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))
    )
