"""The engine's loop: plan, execute, update. The lock is not held while a model runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from baton.core.batching import Candidate, StepLimits, plan_step
from baton.core.blocks import BlockState
from baton.core.embedding import Pooling
from baton.core.errors import Internal
from baton.core.sequence import Sequence as TokenSequence
from baton.core.sequence import SequenceStatus
from baton.engine.drafts import DraftRequest, Drafts, count_accepted, sample_row
from baton.engine.events import BlocksReady, Embedded, Started, Tokens
from baton.engine.inputs import Row
from baton.engine.runner import ModelRunner
from baton.engine.sampler import Sampled, Sampler
from baton.engine.sequences import finish_reason
from baton.engine.speeds import Speeds
from baton.engine.state import EngineState
from baton.engine.step_entry import StepEntry, layer_news

_MAX_CONSIDERED = 16
"""Waiting sequences looked at per step, so that a long queue does not slow every step down."""


class StepLoop:
    """Runs steps. Only the engine thread calls it."""

    def __init__(
        self, state: EngineState, runner: ModelRunner, drafts: Drafts, sampler: Sampler
    ) -> None:
        self.speeds = Speeds()
        self._began_at_s: float | None = None
        self._state = state
        self._runner = runner
        self._drafts = drafts
        self._sampler = sampler

    @property
    def age_s(self) -> float:
        """Seconds that the step under way has lasted; 0 between steps. Any thread."""
        began_at_s = self._began_at_s
        return 0.0 if began_at_s is None else time.monotonic() - began_at_s

    def step(self) -> bool:
        """Computes one step. False if there was nothing to compute."""
        self._began_at_s = started_at_s = time.monotonic()
        try:
            return self._step(started_at_s)
        finally:
            self._began_at_s = None

    def _step(self, started_at_s: float) -> bool:
        with self._state.lock:
            work = self._plan(started_at_s)
        if not work:
            return False
        self._execute(work)
        with self._state.lock:
            self._update(work, time.monotonic())
        num_tokens = sum(entry.item.num_tokens for entry in work)
        num_prefill_tokens = sum(entry.num_known for entry in work if entry.num_known > 1)
        step_s = time.monotonic() - started_at_s
        self.speeds.observe(num_prefill_tokens, num_tokens, step_s)
        if not num_prefill_tokens:
            self._drafts.observe_step(sum(1 + len(entry.drafts) for entry in work), step_s)
        return True

    def _plan(self, now: float) -> list[StepEntry]:
        state = self._state
        state.is_changed = False
        if not state.running and not state.waiting:
            return []
        config = state.config
        waiting = self._considered()
        matched = {
            sequence.seq_id: state.match(sequence)
            for sequence in waiting
            if not sequence.block_table
        }
        limits = StepLimits(
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
            block_size=state.pool.block_size,
            num_available_blocks=state.pool.num_available,
        )
        most_new = 2 + (1 + config.num_draft_tokens) // state.pool.block_size
        is_tight = state.pool.num_available < most_new * len(state.running)
        lengths = self._drafts.lengths([
            sequence
            for sequence in state.running.values()
            if sequence.num_tokens - sequence.num_computed_tokens == 1
        ])
        plan = plan_step(
            [
                self._running(sequence, lengths.get(sequence.seq_id, 0), is_tight=is_tight)
                for sequence in state.running.values()
            ],
            [self._waiting(sequence, matched.get(sequence.seq_id)) for sequence in waiting],
            limits,
        )
        for seq_id in plan.preempted_seq_ids:
            state.preempt(state.running[seq_id])
        for item in plan.items:
            # All cached blocks first, so that no allocation evicts what a later item counts on.
            if item.is_admitted:
                self._admit(state.waiting.pop(item.seq_id), matched.get(item.seq_id), now)
        work = []
        for item in plan.items:
            sequence = state.running[item.seq_id]
            sequence.block_table.extend(state.pool.allocate(item.num_new_blocks))
            sequence.num_pins += 1
            work.append(StepEntry(sequence, item))
        return work

    def _considered(self) -> list[TokenSequence]:
        """Waiting sequences that could be admitted now: those with KV, and the most important."""
        waiting = self._state.waiting.values()
        ready = [entry for entry in waiting if entry.status is SequenceStatus.READY]
        others = [entry for entry in waiting if entry.status is not SequenceStatus.READY]
        others.sort(key=lambda entry: (-entry.spec.priority, entry.order))
        return ready + others[:_MAX_CONSIDERED]

    def _running(
        self, sequence: TokenSequence, num_draft_tokens: int, *, is_tight: bool
    ) -> Candidate:
        table, pool = sequence.block_table, self._state.pool
        return replace(
            _candidate(sequence, sequence.num_computed_tokens, table),
            num_draft_tokens=num_draft_tokens,
            num_private_blocks=sum(not pool.is_shared(block) for block in table) if is_tight else 0,
            # Its blocks may be on their way to another worker.
            is_preemptible=not sequence.spec.prefill_only and not sequence.num_pins,
        )

    def _waiting(self, sequence: TokenSequence, matched: list[int] | None) -> Candidate:
        if matched is None:
            return _candidate(sequence, sequence.num_computed_tokens, sequence.block_table)
        pool = self._state.pool
        candidate = _candidate(sequence, len(matched) * pool.block_size, matched)
        return replace(candidate, num_revived_blocks=pool.num_unreferenced(matched))

    def _admit(self, sequence: TokenSequence, matched: list[int] | None, now: float) -> None:
        state = self._state
        sequence.transition(SequenceStatus.RUNNING)
        state.running[sequence.seq_id] = sequence
        if matched is None:
            state.pool.set_stage(sequence.block_table, BlockState.IN_USE)
        else:
            state.share_cached(sequence, matched)
        if not sequence.has_started:
            sequence.has_started = True
            if matched is not None:
                sequence.num_cached_tokens = sequence.num_computed_tokens
            state.counters["cached_tokens"] += sequence.num_cached_tokens
            queued_s = now - sequence.arrived_at_s
            state.outbox.append(Started(sequence.seq_id, queued_s, sequence.num_cached_tokens, now))

    def _copy_shared(self, work: Sequence[StepEntry]) -> None:
        """Copies the partly filled blocks that forked sequences are about to write to."""
        size = self._state.pool.block_size
        copies = [
            (entry.sequence.copy_source, entry.sequence.block_table[entry.item.start // size])
            for entry in work
            if entry.sequence.copy_source is not None
        ]
        if copies:
            sources, targets = zip(*copies, strict=True)
            self._runner.kv.copy(sources, targets)
            self._drafts.copy_blocks(sources, targets)

    def _execute(self, work: Sequence[StepEntry]) -> None:
        self._copy_shared(work)
        wanted = [
            DraftRequest(entry.sequence, entry.item.num_draft_tokens)
            for entry in work
            if entry.item.num_draft_tokens
        ]
        drafts = self._drafts.propose(wanted) if wanted else {}
        for entry in work:
            entry.drafts = drafts.get(entry.sequence.seq_id, [])
        prompts = [entry for entry in work if entry.sequence.spec.prefill_only]
        news = layer_news(self._state, prompts, self._runner.kv.layout)
        rows = [entry.row for entry in work]
        logits = self._runner.forward(rows, news)
        self._pool(work)
        self._read_prompts(rows, work)
        sampling = [entry for entry in work if entry.item.is_sampled]
        sample_rows = [
            sample_row(entry.sequence, entry.drafts[:index], self._state.eos_token_ids)
            for entry in sampling
            for index in range(entry.num_logits)
        ]
        sampled = iter(self._sampler.sample(logits, sample_rows))
        for entry in sampling:
            entry.sampled = list(islice(sampled, entry.num_logits))

    def _pool(self, work: Sequence[StepEntry]) -> None:
        """Pools the hidden states of sequences that are computed for embeddings."""
        hidden = iter(self._runner.hidden)
        for entry in work:
            pooling = entry.sequence.spec.pooling
            if pooling is not None:
                states = next(hidden)
                # The prompt's last state is that of its last part.
                pooled = states.double().sum(0) if pooling is Pooling.MEAN else states[-1]
                is_pooled = pooling is Pooling.MEAN or entry.item.is_sampled
                entry.hidden_sum = pooled.tolist() if is_pooled else []

    def _read_prompts(self, rows: Sequence[Row], work: Sequence[StepEntry]) -> None:
        """Takes log-probabilities of prompts, some tokens at a time."""
        for index, entry in enumerate(work):
            if not entry.num_prompt_logits:
                continue
            after = entry.item.start + 1
            num_top = entry.sequence.spec.sampling.prompt_logprobs or 0
            for logits in self._runner.prompt_logits(rows, index):
                token_ids = entry.sequence.token_ids[after : after + len(logits)]
                entry.prompt_logprobs += self._sampler.logprobs_of(logits, token_ids, num_top)
                after += len(logits)

    def _update(self, work: Sequence[StepEntry], now: float) -> None:
        state = self._state
        state.counters["steps"] += 1
        for entry in work:
            constraint = entry.sequence.constraint
            state.counters["copied_blocks"] += state.drop_copy_source(entry.sequence)
            if entry.sequence.is_released:
                pass
            elif constraint is not None and constraint.failure is not None:
                state.fail(entry.sequence, constraint.failure)
            elif entry.has_nan:
                # Its blocks would give NaN to all requests with the same prefix.
                state.pool.forget(entry.sequence.block_table)
                state.fail(entry.sequence, Internal("the model computed NaN"))
            else:
                self._advance(entry, now)
            state.unpin(entry.sequence)

    def _advance(self, entry: StepEntry, now: float) -> None:
        sequence, state = entry.sequence, self._state
        sequence.num_computed_tokens = entry.item.start + entry.num_known
        if entry.num_known > 1:
            state.counters["prefill_tokens"] += entry.num_known
        sequence.prompt_logprobs += entry.prompt_logprobs
        if sequence.spec.pooling is not None:
            self._embed(entry, now)
            return
        tokens = self._take(entry, now) if entry.item.is_sampled else None
        # A draft's KV is right as far as the target agrees.
        sequence.num_draft_computed_tokens = min(
            sequence.num_draft_computed_tokens, sequence.num_computed_tokens
        )
        state.publish(sequence)
        if sequence.spec.prefill_only:
            num_ready = entry.num_complete_blocks(state.pool.block_size)
            state.outbox.append(BlocksReady(sequence.seq_id, num_ready, now))
        if tokens is None:
            return
        state.outbox.append(tokens)
        if sequence.spec.prefill_only:
            del state.running[sequence.seq_id]
            sequence.transition(SequenceStatus.HELD)
            state.pool.hold(sequence.block_table)
        elif tokens.finish_reason is not None:
            state.end(sequence)

    def _embed(self, entry: StepEntry, now: float) -> None:
        """Adds a step's hidden states; the last step ends the sequence."""
        sequence, state = entry.sequence, self._state
        sequence.add_hidden(entry.hidden_sum)
        state.publish(sequence)
        if entry.item.is_sampled:
            num_pooled = sequence.num_tokens if sequence.spec.pooling is Pooling.MEAN else 1
            values = tuple(value / num_pooled for value in sequence.hidden_sum)
            state.outbox.append(Embedded(sequence.seq_id, values, now))
            state.end(sequence)

    def _take(self, entry: StepEntry, now: float) -> Tokens:
        """Appends the tokens that a step gave, up to one that ends the output."""
        sequence, counters = entry.sequence, self._state.counters
        token_index = sequence.num_output_tokens
        num_accepted = count_accepted(entry.drafts, entry.sampled)
        taken: list[Sampled] = []
        reason, stop_token_id = None, None
        for sampled in entry.sampled[: num_accepted + 1]:
            sequence.token_ids.append(sampled.token_id)
            taken.append(sampled)
            reason, stop_token_id = finish_reason(sequence, self._state.eos_token_ids)
            if reason is not None:
                break
        sequence.num_computed_tokens += len(taken) - 1
        num_accepted = min(num_accepted, len(taken))
        if entry.drafts:
            self._drafts.observe(sequence, len(entry.drafts), num_accepted)
        counters["output_tokens"] += len(taken)
        counters["draft_tokens"] += len(entry.drafts)
        counters["accepted_tokens"] += num_accepted
        logprobs = tuple(one.logprob for one in taken if one.logprob is not None)
        return Tokens(
            seq_id=sequence.seq_id,
            token_index=token_index,
            token_ids=tuple(one.token_id for one in taken),
            logprobs=logprobs,
            finish_reason=reason,
            stop_token_id=stop_token_id,
            draft_tokens=len(entry.drafts),
            accepted_tokens=num_accepted,
            at_s=now,
            prompt_logprobs=() if token_index else tuple(sequence.prompt_logprobs),
        )


def _candidate(sequence: TokenSequence, num_computed: int, blocks: list[int]) -> Candidate:
    spec = sequence.spec
    return Candidate(
        spec.seq_id, sequence.num_tokens, num_computed, len(blocks), spec.priority, sequence.order
    )
