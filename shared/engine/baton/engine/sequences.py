"""Submits, reserves, commits and releases sequences. Callable on any thread; no call takes long."""

from __future__ import annotations

import time

from baton.core.blocks import BlockState
from baton.core.errors import BatonError, InvalidRequest, KvCacheFull, PromptTooLong
from baton.core.sampling import FinishReason, SamplingParams
from baton.core.sequence import Sequence, SequenceSpec, SequenceStatus
from baton.engine.events import Grant, Tokens
from baton.engine.grammar import GrammarConstraint, Grammars
from baton.engine.state import EngineState

_RETRY_AFTER_S = 0.5
MAX_PROMPT_LOGPROBS = 1 << 16
"""Of one prompt, alternatives included: they travel in one message."""


class Sequences:
    """Takes the engine's lock for each call."""

    def __init__(
        self, state: EngineState, grammars: Grammars, *, max_model_len_tokens: int
    ) -> None:
        self._state = state
        self._grammars = grammars
        self._max_len = max_model_len_tokens

    def check_tokens(self, spec: SequenceSpec) -> None:
        """Checks a prompt's tokens.

        Raises:
            InvalidRequest: there are none, or one is not in the vocabulary.
        """
        if not spec.token_ids:
            raise InvalidRequest("the prompt is empty; give at least one token")
        self._check_range("token ids", *spec.token_range())

    def resolve_max_tokens(self, num_prompt_tokens: int, sampling: SamplingParams) -> int:
        """Most output tokens of a request.

        Raises:
            PromptTooLong: they and the prompt do not fit the context.
        """
        room = self._max_len - num_prompt_tokens
        if room < 1:
            raise PromptTooLong(
                f"the prompt has {num_prompt_tokens} tokens and the context holds "
                f"{self._max_len}, output included; shorten the prompt"
            )
        if sampling.max_tokens is None:
            return room
        if sampling.max_tokens > room:
            raise PromptTooLong(
                f"the prompt's {num_prompt_tokens} tokens and max_tokens "
                f"{sampling.max_tokens} exceed the context of {self._max_len}; "
                f"ask for at most {room}"
            )
        return sampling.max_tokens

    def submit(self, spec: SequenceSpec) -> None:
        """Queues a sequence to be computed here.

        Raises:
            InvalidRequest, PromptTooLong: it can never run.
            QueueFull: too many wait.
        """
        constraint = self._prepared(spec)
        with self._state.lock:
            sequence = self._state.add(spec, SequenceStatus.WAITING)
            sequence.constraint = constraint
            self._state.waiting[spec.seq_id] = sequence
            self._state.touch()

    def reserve(self, spec: SequenceSpec, fork_of: str = "") -> Grant:
        """Takes blocks for a prompt and some output, all or nothing.

        Leading full blocks that are in the prefix cache are shared, but never the whole prompt.
        With `fork_of`, the id of a sequence with the same prompt, all of that prompt's KV is.

        Raises:
            InvalidRequest, PromptTooLong: it can never run.
            KvCacheFull, QueueFull: no room now.
        """
        constraint = self._prepared(spec)
        state = self._state
        num_output = max(1, spec.max_tokens - spec.num_output_tokens)
        headroom = min(state.config.headroom_tokens, num_output)
        num_tokens = min(self._max_len, len(spec.token_ids) + headroom)
        num_blocks = -(-num_tokens // state.pool.block_size)
        with state.lock:
            sequence = state.add(spec, SequenceStatus.RESERVED)
            sequence.constraint = constraint
            if not (fork_of and state.fork(sequence, fork_of)):
                state.share_cached(sequence, state.match(sequence))
            num_cached = len(sequence.block_table)
            try:
                fresh = state.pool.allocate(num_blocks - num_cached, BlockState.RESERVED)
            except KvCacheFull as error:
                state.pool.release(sequence.forget_kv())
                del state.sequences[spec.seq_id]
                state.counters["refused_reservations"] += 1
                raise KvCacheFull(error.message, retry_after_s=_RETRY_AFTER_S) from error
            sequence.block_table += fresh
            sequence.num_published_blocks = num_cached
            sequence.num_cached_tokens = sequence.num_computed_tokens
            return Grant(num_blocks, num_cached)

    def begin_fill(self, seq_id: str) -> None:
        """Marks a reservation's blocks as being filled with KV.

        Raises:
            RequestNotFound: it is not known.
            InvalidRequest: it is not waiting for KV.
        """
        with self._state.lock:
            sequence = self._reserved(seq_id)
            self._state.pool.set_stage(sequence.block_table, BlockState.FILLING)

    def commit(self, seq_id: str, first_token_id: int) -> None:
        """Puts a reservation whose KV is complete into the running batch.

        The first token is not emitted again. If it ends the output, an event without tokens and
        with the finish reason follows at once.

        Raises:
            RequestNotFound: it is not known.
            InvalidRequest: it is not waiting for KV, or the token is not in the vocabulary.
        """
        self._check_range("first_token_id", first_token_id, first_token_id)
        state = self._state
        with state.lock:
            sequence = self._reserved(seq_id)
            state.drop_copy_source(sequence)
            sequence.num_computed_tokens = sequence.num_tokens
            sequence.token_ids.append(first_token_id)
            state.make_ready(sequence)
            reason, stop_token_id = finish_reason(sequence, self._state.eos_token_ids)
            if reason is not None:
                index, now = sequence.num_output_tokens, time.monotonic()
                # No tokens: the sender of the KV has reported the first one.
                state.outbox.append(Tokens(seq_id, index, (), (), reason, stop_token_id, 0, 0, now))
                state.end(sequence)
            state.touch()

    def start_local(self, seq_id: str) -> None:
        """Computes a reservation's prompt here.

        Raises:
            RequestNotFound: it is not known.
            InvalidRequest: its KV is here already.
        """
        with self._state.lock:
            sequence = self._reserved(seq_id)
            sequence.transition(SequenceStatus.WAITING)
            self._state.waiting[seq_id] = sequence
            self._state.touch()

    def release(self, seq_id: str, *, quarantine: bool = False) -> int:
        """Ends a sequence in any state. Idempotent; no event of it follows.

        Args:
            seq_id: which one.
            quarantine: a writer may still be at its blocks: keep them until `end_quarantine`.

        Returns:
            Blocks let go; 0 when there was nothing.
        """
        with self._state.lock:
            sequence = self._state.sequences.get(seq_id)
            if sequence is None:
                return 0
            self._state.outbox = [e for e in self._state.outbox if e.seq_id != seq_id]
            return self._state.end(sequence, quarantine=quarantine)

    def fail(self, seq_id: str, error: BatonError) -> None:
        """Ends a sequence with an error, which is its last event. Idempotent."""
        with self._state.lock:
            sequence = self._state.sequences.get(seq_id)
            if sequence is not None:
                self._state.outbox = [e for e in self._state.outbox if e.seq_id != seq_id]
                self._state.fail(sequence, error)

    def end_quarantine(self, seq_id: str) -> None:
        """Frees the quarantined blocks of a released sequence. Idempotent."""
        with self._state.lock:
            self._state.end_quarantine(seq_id)

    def _reserved(self, seq_id: str) -> Sequence:
        sequence = self._state.get(seq_id)
        if sequence.status is not SequenceStatus.RESERVED:
            raise InvalidRequest(f"{seq_id} is {sequence.status.value}, not waiting for KV")
        return sequence

    def _prepared(self, spec: SequenceSpec) -> GrammarConstraint | None:
        """Checks a spec and hashes its prompt, before the lock is taken."""
        self._check(spec)
        self._state.prompt_hashes(spec)
        guide = spec.sampling.guide
        if guide is None:
            return None
        return self._grammars.constraint(guide, len(spec.token_ids) - spec.num_output_tokens)

    def _check_range(self, field: str, low: int, high: int) -> None:
        vocab_size = self._state.vocab_size
        if low < 0 or high >= vocab_size:
            raise InvalidRequest(f"{field} must be in [0, {vocab_size}), got {low} to {high}")

    def _check(self, spec: SequenceSpec) -> None:
        self.check_tokens(spec)
        for field, token_ids in (
            ("logit_bias", spec.sampling.logit_bias),
            ("stop_token_ids", spec.sampling.stop_token_ids),
        ):
            if token_ids:
                self._check_range(field, min(token_ids), max(token_ids))
        if spec.sampling.seed is None and not spec.sampling.is_greedy:
            raise InvalidRequest(f"{spec.seq_id}: sampling.seed must be set")
        if not 0 <= spec.num_output_tokens < len(spec.token_ids):
            raise InvalidRequest(
                f"num_output_tokens must be in [0, {len(spec.token_ids)}), "
                f"got {spec.num_output_tokens}"
            )
        if spec.max_tokens <= spec.num_output_tokens:
            raise InvalidRequest(
                f"max_tokens ({spec.max_tokens}) must exceed the {spec.num_output_tokens} output "
                f"tokens given"
            )
        num_prompt_tokens = len(spec.token_ids) - spec.num_output_tokens
        num_top = spec.sampling.prompt_logprobs
        num_values = 0 if num_top is None else num_prompt_tokens * (1 + num_top)
        if num_values > MAX_PROMPT_LOGPROBS:
            raise InvalidRequest(
                f"prompt_logprobs of {num_prompt_tokens} tokens with {num_top} alternatives each "
                f"are {num_values} values; at most {MAX_PROMPT_LOGPROBS} are reported"
            )
        num_output_tokens = 0 if spec.pooling else spec.max_tokens
        if num_prompt_tokens + num_output_tokens > self._max_len:
            raise PromptTooLong(
                f"{num_prompt_tokens} prompt tokens and {num_output_tokens} output tokens exceed "
                f"the context of {self._max_len}"
            )


def finish_reason(
    sequence: Sequence, eos_token_ids: frozenset[int]
) -> tuple[FinishReason | None, int | None]:
    """Whether the last token ends the output: the reason, and the stop token if it is one."""
    sampling = sequence.spec.sampling
    last = sequence.token_ids[-1]
    is_eos = last in eos_token_ids and not sampling.ignore_eos
    if is_eos or last in sampling.stop_token_ids:
        return FinishReason.STOP, last
    if sequence.num_output_tokens >= sequence.spec.max_tokens:
        return FinishReason.LENGTH, None
    return None, None
