"""The state that an engine's lock guards: sequences, blocks, queues and undelivered events."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from itertools import islice

from baton.core.blocks import BlockPool, BlockState
from baton.core.errors import BatonError, InvalidRequest, QueueFull, RequestNotFound
from baton.core.hashing import block_hashes, root_hash
from baton.core.sequence import Sequence, SequenceSpec, SequenceStatus
from baton.engine.config import EngineConfig
from baton.engine.events import EngineEvent, Failed

_RETRY_AFTER_S = 0.5


class EngineState:
    """Every method is called with `lock` held, but for those that say otherwise."""

    def __init__(
        self,
        config: EngineConfig,
        pool: BlockPool,
        digest: bytes,
        *,
        vocab_size: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        self.config = config
        self.pool = pool
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self.is_changed = False
        """Something happened since the last step began: there may be work or events."""
        self.failure: BatonError | None = None
        """Why the engine has stopped computing."""
        self.sequences: dict[str, Sequence] = {}
        self.running: dict[str, Sequence] = {}
        self.waiting: dict[str, Sequence] = {}
        """To be computed, or ready for a place in the batch."""
        self.outbox: list[EngineEvent] = []
        self.deliver: Callable[[], None] = lambda: None
        """Delivers the outbox while a step computes. Called without `lock`."""
        self.counters: Counter[str] = Counter()
        self._digest = digest
        self._quarantined: dict[str, list[int]] = {}
        self._num_arrived = 0

    def touch(self) -> None:
        """Wakes the engine thread."""
        self.is_changed = True
        self.changed.notify_all()

    def add(self, spec: SequenceSpec, status: SequenceStatus) -> Sequence:
        """A new sequence.

        Raises:
            QueueFull: too many wait already.
            InvalidRequest: there is one with this id.
        """
        if self.failure is not None:
            raise self.failure
        if spec.seq_id in self.sequences or spec.seq_id in self._quarantined:
            raise InvalidRequest(f"sequence {spec.seq_id} exists already; use a new attempt number")
        if len(self.sequences) - len(self.running) >= self.config.max_num_waiting:
            raise QueueFull(
                f"{self.config.max_num_waiting} sequences wait here already",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._num_arrived += 1
        sequence = Sequence(spec, self._num_arrived, time.monotonic(), status)
        sequence.block_hashes.extend(self.prompt_hashes(spec))
        self.sequences[spec.seq_id] = sequence
        return sequence

    def get(self, seq_id: str) -> Sequence:
        """A sequence.

        Raises:
            RequestNotFound: it was never here, or has ended.
        """
        sequence = self.sequences.get(seq_id)
        if sequence is None:
            raise RequestNotFound(f"sequence {seq_id} is not known here")
        return sequence

    def prompt_hashes(self, spec: SequenceSpec) -> tuple[bytes, ...]:
        """Hashes of a prompt's full blocks. Needs no lock; the first call for a spec takes long."""
        return spec.block_hashes(self._digest, self.pool.block_size)

    def hashes(self, sequence: Sequence) -> list[bytes]:
        """Hashes of all full blocks of a sequence. Only those of new output are computed."""
        known, size = sequence.block_hashes, self.pool.block_size
        if len(known) < sequence.num_tokens // size:
            root = root_hash(self._digest, sequence.spec.cache_salt)
            known.extend(block_hashes(root, sequence.token_ids, size, known))
        return known

    def match(self, sequence: Sequence) -> list[int]:
        """Cached blocks of the longest prefix, which leaves at least one token to compute.

        Empty if cached KV lacks what was asked for.
        """
        if sequence.is_computed_whole:
            return []
        if sequence.matched_at != self.pool.num_evictions:
            sequence.matched_at = self.pool.num_evictions
            sequence.matched_blocks.clear()
        found = sequence.matched_blocks
        num_blocks = (sequence.num_tokens - 1) // self.pool.block_size
        # Waiting prompts are matched in every step: only what the last match lacked is looked up.
        found += self.pool.match(islice(self.hashes(sequence), len(found), num_blocks))
        return list(found)

    def fork(self, sequence: Sequence, origin_seq_id: str) -> bool:
        """Gives a new sequence the KV of another one with the same prompt, all but the last token.

        False if that one has ended, has not computed the prompt yet, or belongs to another tenant.
        """
        origin = self.sequences.get(origin_seq_id)
        num_tokens = sequence.num_tokens - 1
        if (
            origin is None
            or origin.status is SequenceStatus.RESERVED
            or origin.copy_source is not None
            or origin.num_computed_tokens < num_tokens
            or origin.spec.cache_salt != sequence.spec.cache_salt
            or origin.token_ids[: sequence.num_tokens] != sequence.token_ids
            or sequence.wants_prompt_logprobs
        ):
            return False
        fork = self.pool.fork(origin.block_table, num_tokens)
        sequence.block_table, sequence.copy_source = fork.shared, fork.source
        sequence.num_computed_tokens = num_tokens
        sequence.num_draft_computed_tokens = min(origin.num_draft_computed_tokens, num_tokens)
        self.counters["forks"] += 1
        return True

    def drop_copy_source(self, sequence: Sequence) -> bool:
        """Releases the block that a fork was copied from; False if there is none."""
        if sequence.copy_source is None:
            return False
        self.pool.release([sequence.copy_source])
        sequence.copy_source = None
        return True

    def share_cached(self, sequence: Sequence, matched: list[int]) -> None:
        """Gives a sequence without blocks the cached ones of a prefix, as `match` found them."""
        self.pool.share(matched)
        sequence.block_table = matched
        sequence.num_computed_tokens = len(matched) * self.pool.block_size
        sequence.num_published_blocks = len(matched)

    def publish(self, sequence: Sequence) -> None:
        """Offers the blocks that are full and computed to the prefix cache."""
        num_full = sequence.num_computed_tokens // self.pool.block_size
        if num_full <= sequence.num_published_blocks:
            return
        hashes = self.hashes(sequence)
        for index in range(sequence.num_published_blocks, num_full):
            self.pool.publish(sequence.block_table[index], hashes[index])
        sequence.num_published_blocks = num_full

    def preempt(self, sequence: Sequence) -> None:
        """Takes a running sequence's blocks; it waits to be computed again."""
        del self.running[sequence.seq_id]
        sequence.transition(SequenceStatus.WAITING)
        self.waiting[sequence.seq_id] = sequence
        self.pool.release(sequence.forget_kv())
        self.counters["preemptions"] += 1

    def end(self, sequence: Sequence, *, quarantine: bool = False) -> int:
        """Ends a sequence; its blocks are freed once no step and no transfer uses them.

        Returns:
            Blocks let go, or about to be.
        """
        seq_id = sequence.seq_id
        del self.sequences[seq_id]
        self.running.pop(seq_id, None)
        self.waiting.pop(seq_id, None)
        num_blocks = len(sequence.block_table)
        sequence.is_released = True
        sequence.is_quarantined = quarantine
        if quarantine:
            self._quarantined[seq_id] = []
        self._let_go(sequence)
        return num_blocks

    def fail(self, sequence: Sequence, error: BatonError) -> None:
        """Ends a sequence with an error, which is its last event."""
        self.outbox.append(Failed(sequence.seq_id, error))
        self.end(sequence)

    def unpin(self, sequence: Sequence) -> None:
        """A step or transfer is done with the sequence's blocks."""
        sequence.num_pins -= 1
        self._let_go(sequence)

    def end_quarantine(self, seq_id: str) -> None:
        """Frees a sequence's quarantined blocks: all writers are done. Idempotent."""
        blocks = self._quarantined.pop(seq_id, None)
        if blocks:
            self.pool.end_quarantine(blocks)
            self.touch()

    def _let_go(self, sequence: Sequence) -> None:
        if not sequence.is_released or sequence.num_pins:
            return
        is_held = sequence.status is SequenceStatus.HELD
        if sequence.status is not SequenceStatus.ENDED:
            sequence.transition(SequenceStatus.ENDED)
        blocks = sequence.forget_kv()
        if is_held:
            self.pool.release_hold(blocks)
        elif sequence.is_quarantined and sequence.seq_id in self._quarantined:
            self._quarantined[sequence.seq_id] = self.pool.quarantine(blocks)
        else:
            self.pool.release(blocks)
        self.touch()

    def make_ready(self, sequence: Sequence) -> None:
        """The KV of a reserved sequence is complete."""
        sequence.transition(SequenceStatus.READY)
        self.pool.set_stage(sequence.block_table, BlockState.READY)
        self.waiting[sequence.seq_id] = sequence
        self.publish(sequence)
