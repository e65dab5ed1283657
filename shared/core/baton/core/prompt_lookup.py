"""Drafts without a draft model: what followed the last occurrence of the same few tokens.

Outputs repeat their prompt in code edits, summaries and answers with quotations.
Source: Saxena, "Prompt Lookup Decoding", 2023.
"""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST = 3
_SHORTEST = 2
_MAX_TOKENS = 8192
"""Indexed of a sequence; each takes about 400 bytes."""
_MAX_NEW_TOKENS = 512
"""Indexed in one call: a long prompt would hold the step up."""


class NgramIndex:
    """Where each n-gram of one sequence last ended, of its last tokens if it is long."""

    def __init__(self) -> None:
        self._num_indexed = 0
        self._ends: dict[tuple[int, ...], int] = {}

    def drafts(self, token_ids: Sequence[int], max_drafts: int) -> list[int]:
        """What followed the latest earlier place with the same last tokens; often nothing.

        `token_ids` are the sequence's known tokens; those of the last call lead them.
        """
        num_tokens = len(token_ids)
        start = max(self._num_indexed, _SHORTEST, num_tokens - _MAX_TOKENS)
        # The n-grams that end at the last token are what is looked for.
        self._num_indexed = min(num_tokens, start + _MAX_NEW_TOKENS)
        if len(self._ends) > 4 * _MAX_TOKENS:
            self._ends.clear()
        for end in range(start, self._num_indexed):
            for size in range(_SHORTEST, min(_LONGEST, end) + 1):
                self._ends[tuple(token_ids[end - size : end])] = end
        for size in range(min(_LONGEST, num_tokens), _SHORTEST - 1, -1):
            found = self._ends.get(tuple(token_ids[num_tokens - size :]))
            if found is not None:
                return self._continued(token_ids, found, max_drafts)
        return []

    def _continued(self, token_ids: Sequence[int], start: int, max_drafts: int) -> list[int]:
        """Tokens from `start`; a repetition that reaches the end goes round."""
        period = len(token_ids) - start
        return [token_ids[start + index % period] for index in range(max_drafts)]
