"""Which sequences get drafts, how many and from where: a draft model, or their own earlier tokens.

Costs and acceptance are measured as it runs; what follows from them is `baton.core.drafting`'s.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from baton.core.drafting import Acceptance, DraftCosts
from baton.core.prompt_lookup import NgramIndex
from baton.core.sampling import DraftSource
from baton.core.sequence import Sequence as TokenSequence
from baton.engine.config import EngineConfig
from baton.engine.speculative import Drafter, DraftRequest


class Drafting:
    """All drafts of an engine. Only the engine thread calls it."""

    def __init__(self, config: EngineConfig, drafter: Drafter | None) -> None:
        self._config = config
        self._drafter = drafter
        self._costs = DraftCosts()
        self._typical = {source: Acceptance() for source in DraftSource}
        """Of all sequences: what a new one starts from."""

    def length(self, sequence: TokenSequence, num_seqs: int) -> int:
        """Most drafts to propose next for one of `num_seqs` sequences that decode together."""
        spec = sequence.spec
        wanted = spec.sampling.speculation
        if spec.prefill_only or not (self._config.speculation if wanted is None else wanted):
            return 0
        source = self._source(sequence)
        # The target's own sample comes on top of the drafts.
        most = min(self._config.num_draft_tokens, spec.max_tokens - sequence.num_output_tokens - 1)
        if source is DraftSource.MODEL and self._drafter is not None:
            most = min(most, self._drafter.room(sequence))
        if not self._config.adaptive_drafts or most <= 0:
            return max(0, most)
        is_free = source is DraftSource.NGRAM
        plain, per_draft = self._costs.per_sequence(num_seqs, is_draft_free=is_free)
        return self._acceptance(sequence).next_length(plain, per_draft, most)

    def propose(self, requests: Sequence[DraftRequest]) -> dict[str, list[int]]:
        """Drafts by sequence id, as many as asked for, fewer, or none."""
        drafts: dict[str, list[int]] = {}
        modelled: list[DraftRequest] = []
        for request in requests:
            if self._source(request.sequence) is DraftSource.MODEL:
                modelled.append(request)
                continue
            sequence = request.sequence
            if sequence.ngrams is None:
                sequence.ngrams = NgramIndex()
            found = sequence.ngrams.drafts(sequence.token_ids, request.num_draft_tokens)
            if found:
                drafts[sequence.seq_id] = found
        if modelled and self._drafter is not None:
            drafts |= self._timed(self._drafter, modelled)
        return drafts

    def observe(self, sequence: TokenSequence, num_proposed: int, num_accepted: int) -> None:
        """Says what became of a sequence's drafts."""
        self._acceptance(sequence).observe(num_proposed, num_accepted)
        self._typical[self._source(sequence)].observe(num_proposed, num_accepted)

    def observe_step(self, num_tokens: int, seconds: float) -> None:
        """Says what the target's forward over decoding sequences and their drafts took."""
        self._costs.target.observe(num_tokens, seconds)

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies the draft's KV along with the target's."""
        if self._drafter is not None:
            self._drafter.copy_blocks(sources, targets)

    def _source(self, sequence: TokenSequence) -> DraftSource:
        if self._drafter is None:
            return DraftSource.NGRAM
        return sequence.spec.sampling.draft_source or DraftSource.MODEL

    def _acceptance(self, sequence: TokenSequence) -> Acceptance:
        if sequence.acceptance is None:
            sequence.acceptance = Acceptance(self._typical[self._source(sequence)].share)
        return sequence.acceptance

    def _timed(self, drafter: Drafter, requests: Sequence[DraftRequest]) -> dict[str, list[int]]:
        is_caught_up = all(drafter.has_caught_up(request.sequence) for request in requests)
        started_at_s = time.monotonic()
        drafts = drafter.propose(requests)
        num_rounds = max(map(len, drafts.values()), default=0)
        if is_caught_up and num_rounds:
            num_rows = sum(map(len, drafts.values())) / num_rounds
            self._costs.draft.observe(num_rows, (time.monotonic() - started_at_s) / num_rounds)
        return drafts
