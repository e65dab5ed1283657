"""KV bytes in and out, for transfer threads. The lock is held for bookkeeping only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from baton.core.blocks import BlockState
from baton.core.errors import InvalidRequest
from baton.core.handoff.frames import Span
from baton.core.sequence import Sequence as TokenSequence
from baton.core.sequence import SequenceStatus
from baton.engine.kv_cache import KvCache
from baton.engine.state import EngineState


class Transfer:
    """Reads and writes whole blocks that the engine thread leaves alone."""

    def __init__(self, state: EngineState, kv: KvCache) -> None:
        self._state = state
        self._kv = kv

    def read_blocks(self, seq_id: str, span: Span, out: memoryview | None = None) -> memoryview:
        """KV of some layers of a range of a sequence's blocks, laid out as PushRequest.payload.

        It is put into `out`, or into new memory.

        Raises:
            RequestNotFound: the sequence is not known.
            InvalidRequest: a range is not within its table or the model.
            KvLayoutMismatch: `out` has the wrong size.
        """
        with self._pinned(seq_id) as sequence:
            block_ids = self._block_ids(sequence, span)
            return self._kv.read(block_ids, span.layer_start, span.layer_end, out)

    def write_blocks(self, seq_id: str, span: Span, payload: memoryview) -> None:
        """Writes KV into a reservation's blocks.

        Raises:
            RequestNotFound: the sequence is not known.
            InvalidRequest: a range is wrong, or the blocks are not FILLING.
            KvLayoutMismatch: the payload has the wrong size.
        """
        with self._pinned(seq_id) as sequence:
            block_ids = self._block_ids(sequence, span)
            if sequence.status is not SequenceStatus.RESERVED or any(
                self._state.pool.state(block_id) is not BlockState.FILLING for block_id in block_ids
            ):
                raise InvalidRequest(
                    f"blocks {span.block_start}+{span.num_blocks} of {seq_id} are not filling"
                )
            self._kv.write(block_ids, span.layer_start, span.layer_end, payload)

    def import_blocks(
        self,
        hashes: Sequence[bytes],
        payloads: Sequence[memoryview],
        parents: Sequence[bytes] = (),
    ) -> int:
        """Puts blocks from elsewhere into the prefix cache, until it is full.

        `parents` are the blocks before them, which must be here: they are kept meanwhile.

        Returns:
            Blocks that are there now, of the leading ones of `hashes`.

        Raises:
            KvLayoutMismatch: a payload has the wrong size.
        """
        pool = self._state.pool
        pinned: list[int] = []
        fresh: dict[int, int] = {}
        """Index among `hashes` by block."""
        try:
            with self._state.lock:
                # Else the imported blocks could take the place of those that they follow.
                pinned += pool.match(parents)
                pool.share(pinned)
                num_parents = len(pinned)
                if num_parents < len(parents):
                    return 0
                for index, block_hash in enumerate(hashes):
                    found = pool.match([block_hash])
                    pool.share(found)
                    if not found and not pool.num_available:
                        break
                    if not found:
                        found = pool.allocate(1, BlockState.FILLING)
                        fresh[found[0]] = index
                    pinned.extend(found)
            self._kv.write_whole(list(fresh), [payloads[index] for index in fresh.values()])
            with self._state.lock:
                pool.set_stage(fresh, BlockState.IN_USE)
                for block_id, index in fresh.items():
                    pool.publish(block_id, hashes[index])
            return len(pinned) - num_parents
        finally:
            with self._state.lock:
                pool.release(pinned)
                self._state.touch()

    def export_blocks(self, hashes: Sequence[bytes]) -> list[tuple[bytes, memoryview]]:
        """Hash and content of those of the blocks that are still here."""
        exported = []
        for block_hash in hashes:
            with self._state.lock:
                found = self._state.pool.match([block_hash])
                self._state.pool.share(found)
            if not found:
                continue
            try:
                exported.append((block_hash, self._kv.read(found, 0, self._kv.layout.num_layers)))
            finally:
                with self._state.lock:
                    self._state.pool.release(found)
        return exported

    @contextmanager
    def _pinned(self, seq_id: str) -> Iterator[TokenSequence]:
        """Keeps a sequence's blocks from being let go meanwhile."""
        with self._state.lock:
            sequence = self._state.get(seq_id)
            sequence.num_pins += 1
        try:
            yield sequence
        finally:
            with self._state.lock:
                self._state.unpin(sequence)

    def _block_ids(self, sequence: TokenSequence, span: Span) -> list[int]:
        with self._state.lock:
            table, num_layers = sequence.block_table, self._kv.layout.num_layers
            end = span.block_start + span.num_blocks
            if not 0 <= span.block_start < end <= len(table):
                raise InvalidRequest(
                    f"{sequence.seq_id} has {len(table)} blocks, "
                    f"not {span.block_start}+{span.num_blocks}"
                )
            if not 0 <= span.layer_start < span.layer_end <= num_layers:
                raise InvalidRequest(
                    f"layers {span.layer_start} to {span.layer_end} are not in 0..{num_layers}"
                )
            return table[span.block_start : end]
