"""Drafts for speculative decoding: which sequences get them, how many, and from where.

They come from a draft model or from a sequence's own earlier tokens. Either way, a draft is
accepted iff it is the target's own sample. A draft model samples with the noise that the target
will use, so the output is the one without speculation, at any temperature.
Source: Daliri, Musco, Suresh, "Coupling without Communication and Drafter-Invariant Speculative
Decoding", 2024.

The draft model's KV lies in separate tensors under the same block ids. It is neither handed over
nor cached: for a new sequence the draft model computes the known tokens first. Costs and acceptance
are measured; `baton.core.draft_policy` decides what follows from them.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import torch
from torch.nn.functional import pad

from baton.core.draft_policy import Acceptance, DraftCandidate, DraftPolicy, TypicalAcceptance
from baton.core.prompt_lookup import NgramIndex
from baton.core.sampling import DraftSource
from baton.core.sequence import Sequence as TokenSequence
from baton.engine.config import EngineConfig
from baton.engine.inputs import Row
from baton.engine.runner import ModelRunner
from baton.engine.sampler import Sampled, Sampler, SampleRow
from baton.engine.state import EngineState

_MAX_TAKEN_ALONG = 2
"""Known tokens that the first proposing forward computes besides."""
_NO_TOKENS: tuple[int, ...] = ()


def sample_row(
    sequence: TokenSequence, drafts: Sequence[int], eos_token_ids: Collection[int]
) -> SampleRow:
    """What decides the token after the sequence's known tokens and some drafts."""
    sampling = sequence.spec.sampling
    prompt: Sequence[int] = _NO_TOKENS
    output: Sequence[int] = _NO_TOKENS
    constraint = sequence.constraint
    if sampling.has_penalty:
        if not sequence.prompt_vocabulary:
            prompt = sequence.token_ids[: sequence.num_prompt_tokens]
            sequence.prompt_vocabulary = tuple(dict.fromkeys(prompt))
        prompt = sequence.prompt_vocabulary
        output = [*sequence.token_ids[sequence.num_prompt_tokens :], *drafts]
    return SampleRow(
        sampling=sampling,
        seed=sampling.seed or 0,
        position=sequence.num_output_tokens + len(drafts),
        prompt_token_ids=prompt,
        output_token_ids=output,
        eos_token_ids=eos_token_ids,
        mask=constraint.mask(sequence.token_ids, drafts) if constraint else None,
    )


def count_accepted(drafts: Sequence[int], sampled: Sequence[Sampled]) -> int:
    """Leading drafts that are the target's own samples."""
    pairs = zip(drafts, sampled, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1].token_id, pairs))


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """Asks for drafts after a sequence's known tokens."""

    sequence: TokenSequence
    num_draft_tokens: int


class DraftModel:
    """Proposes tokens with a draft model. Only the engine thread calls it."""

    def __init__(self, runner: ModelRunner, sampler: Sampler, state: EngineState) -> None:
        self.runner = runner
        self._max_token_id = runner.model.vocab_size - 1
        self._sampler = sampler
        self._vocab_size = state.vocab_size
        self._eos_token_ids = state.eos_token_ids
        self._max_num_batched_tokens = state.config.max_num_batched_tokens

    def room(self, sequence: TokenSequence) -> int:
        """Drafts that fit the draft's context."""
        return max(0, self.runner.model.max_len_tokens - sequence.num_tokens + 1)

    def has_caught_up(self, sequence: TokenSequence) -> bool:
        """Whether only the last few tokens are left to compute before it can propose."""
        return sequence.num_tokens - sequence.num_draft_computed_tokens <= _MAX_TAKEN_ALONG

    def propose(self, requests: Sequence[DraftRequest]) -> dict[str, list[int]]:
        """Drafts by sequence id. One that the draft has not caught up with yet gets none."""
        active = self._catch_up(requests)
        drafts: dict[str, list[int]] = {}
        while active:
            rows = [self._row(request, drafts) for request in active]
            for request, token_id in zip(active, self._sample(active, rows, drafts), strict=True):
                drafts.setdefault(request.sequence.seq_id, []).append(token_id)
            active = [
                request
                for request in active
                if len(drafts[request.sequence.seq_id]) < request.num_draft_tokens
            ]
        for request in requests:
            sequence = request.sequence
            if proposed := drafts.get(sequence.seq_id):
                sequence.num_draft_computed_tokens = sequence.num_tokens + len(proposed) - 1
        return drafts

    def _catch_up(self, requests: Sequence[DraftRequest]) -> list[DraftRequest]:
        """Computes tokens that the draft has missed, within one step's token budget.

        Returns:
            The requests whose known tokens are computed, but for the last few, which the first
            proposing forward takes along.
        """
        budget = self._max_num_batched_tokens
        active, rows = [], []
        for request in requests:
            sequence = request.sequence
            start = sequence.num_draft_computed_tokens
            if self.has_caught_up(sequence):
                active.append(request)
                continue
            end = min(sequence.num_tokens - 1, start + budget)
            if end > start:
                tokens = self._known(sequence.token_ids[start:end])
                rows.append(Row(tokens, start, sequence.block_table, 0))
                sequence.num_draft_computed_tokens = end
                budget -= end - start
            if end == sequence.num_tokens - 1:
                active.append(request)
        if rows:
            self.runner.forward(rows)
        return active

    def _row(self, request: DraftRequest, drafts: dict[str, list[int]]) -> Row:
        sequence = request.sequence
        proposed = drafts.get(sequence.seq_id)
        if proposed:
            start = sequence.num_tokens + len(proposed) - 1
            return Row(self._known(proposed[-1:]), start, sequence.block_table, 1)
        start = sequence.num_draft_computed_tokens
        return Row(self._known(sequence.token_ids[start:]), start, sequence.block_table, 1)

    def _known(self, token_ids: list[int]) -> list[int]:
        """Tokens that the draft has an embedding for: its vocabulary may be padded less."""
        if self._max_token_id + 1 >= self._vocab_size:
            return token_ids
        return [min(token_id, self._max_token_id) for token_id in token_ids]

    def _sample(
        self, active: Sequence[DraftRequest], rows: Sequence[Row], drafts: dict[str, list[int]]
    ) -> list[int]:
        logits = _fit(self.runner.forward(rows), self._vocab_size)
        sample_rows = []
        for request in active:
            sequence = request.sequence
            row = sample_row(sequence, drafts.get(sequence.seq_id, _NO_TOKENS), self._eos_token_ids)
            plain = replace(row.sampling, logprobs=False, top_logprobs=0)
            sample_rows.append(replace(row, sampling=plain))
        # The target rejects what comes of NaN; only the index must be valid.
        return [max(0, sampled.token_id) for sampled in self._sampler.sample(logits, sample_rows)]


def _fit(logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The draft's logits over the target's vocabulary: some models pad theirs differently."""
    missing = vocab_size - logits.shape[-1]
    if missing > 0:
        return pad(logits, (0, missing), value=-torch.inf)
    return logits[:, :vocab_size].contiguous()


class Drafts:
    """All drafts of an engine. Only the engine thread calls it."""

    def __init__(self, config: EngineConfig, drafter: DraftModel | None) -> None:
        self._config = config
        self._drafter = drafter
        self._policy = DraftPolicy()
        self._typical = {source: TypicalAcceptance() for source in DraftSource}
        self._drafted_s = 0.0
        """Time that the draft model took in the step under way."""

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
        """Records how many of a sequence's drafts were accepted."""
        self._acceptance(sequence).observe(num_proposed, num_accepted)

    def observe_step(self, num_tokens: int, seconds: float) -> None:
        """Records the time of a whole step over decoding sequences and their drafts."""
        self._policy.observe_target(num_tokens, seconds - self._drafted_s)

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies the draft's KV along with the target's."""
        if self._drafter is not None:
            self._drafter.runner.kv.copy(sources, targets)

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
