"""Which sequences get drafts, how many and from where: a draft model, or their own earlier tokens.

Costs and acceptance are measured as it runs; what follows from them is `baton.core.draft_policy`'s.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from baton.core.draft_policy import Acceptance, DraftCandidate, DraftPolicy, TypicalAcceptance
from baton.core.prompt_lookup import NgramIndex
from baton.core.sampling import DraftSource
from baton.core.sequence import Sequence as TokenSequence
from baton.engine.config import EngineConfig
from baton.engine.draft_model import DraftModel, DraftRequest


class Drafts:
    """All drafts of an engine. Only the engine thread calls it."""

    def __init__(self, config: EngineConfig, drafter: DraftModel | None) -> None:
        self._config = config
        self._drafter = drafter
        self._policy = DraftPolicy()
        self._typical = {source: TypicalAcceptance() for source in DraftSource}
        self._drafted_s = 0.0
        """What the draft model took in the step under way."""

    def lengths(self, decoding: Sequence[TokenSequence]) -> dict[str, int]:
        """Most drafts to propose next for sequences that decode together, by id."""
        self._drafted_s = 0.0
        most = {sequence.seq_id: self._most(sequence) for sequence in decoding}
        if not self._config.adaptive_drafts:
            return most
        wanting = [sequence for sequence in decoding if most[sequence.seq_id]]
        candidates = [
            DraftCandidate(
                self._acceptance(sequence),
                most[sequence.seq_id],
                is_free=self._source(sequence) is DraftSource.NGRAM,
            )
            for sequence in wanting
        ]
        lengths = self._policy.lengths(len(decoding), candidates) if wanting else []
        return {sequence.seq_id: length for sequence, length in zip(wanting, lengths, strict=True)}

    def _most(self, sequence: TokenSequence) -> int:
        """Drafts that the settings, the output's limit and the draft's context allow."""
        spec = sequence.spec
        wanted = spec.sampling.speculation
        if spec.prefill_only or not (self._config.speculation if wanted is None else wanted):
            return 0
        # The target's own sample comes on top of the drafts.
        most = min(self._config.num_draft_tokens, spec.max_tokens - sequence.num_output_tokens - 1)
        if self._source(sequence) is DraftSource.MODEL and self._drafter is not None:
            most = min(most, self._drafter.room(sequence))
        return max(0, most)

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
            self._typical[DraftSource.NGRAM].observe_found(is_found=bool(found))
            if found:
                drafts[sequence.seq_id] = found
        if modelled and self._drafter is not None:
            drafts |= self._timed(self._drafter, modelled)
        return drafts

    def observe(self, sequence: TokenSequence, num_proposed: int, num_accepted: int) -> None:
        """Says what became of a sequence's drafts."""
        self._acceptance(sequence).observe(num_proposed, num_accepted)

    def observe_step(self, num_tokens: int, seconds: float) -> None:
        """Says what a step over decoding sequences and their drafts took as a whole."""
        self._policy.observe_target(num_tokens, seconds - self._drafted_s)

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
            sequence.acceptance = Acceptance(self._typical[self._source(sequence)])
        return sequence.acceptance

    def _timed(self, drafter: DraftModel, requests: Sequence[DraftRequest]) -> dict[str, list[int]]:
        is_caught_up = all(drafter.has_caught_up(request.sequence) for request in requests)
        started_at_s = time.monotonic()
        drafts = drafter.propose(requests)
        self._drafted_s = time.monotonic() - started_at_s
        num_rounds = max(map(len, drafts.values()), default=0)
        if is_caught_up and num_rounds:
            num_rows = sum(map(len, drafts.values())) / num_rounds
            self._policy.observe_draft(num_rows, self._drafted_s / num_rounds)
        return drafts
