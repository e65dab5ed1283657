"""What makes a push complete and correct: the checks of each frame and of the whole.

The decode worker has one `Receiver` per push; the prefill worker counts its chunks in a `Ledger`.
Nothing here moves a byte. Not thread-safe, except `Receiver.verify`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from baton.core.errors import KvChecksum, KvLayoutMismatch, StaleEpoch
from baton.core.handoff.frames import KvChunk, KvEncoding, Manifest, Opening, Span
from baton.core.handoff.reservation import Reservation, ReservationState
from baton.core.hashing import Fingerprint

Digest = Callable[[bytes | bytearray | memoryview], int]
"""XXH3-64, passed in because the core imports the standard library only."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What the receiver of a push knows beforehand."""

    fingerprint: Fingerprint
    block_start: int
    """Blocks before it are here already."""
    block_end: int
    num_tokens: int
    tokens_hash: bytes
    encodings: frozenset[KvEncoding] = frozenset(KvEncoding)
    """What is taken."""


class Ledger:
    """Counts what was sent or received, in order."""

    def __init__(self, digest: Digest) -> None:
        self._digest = digest
        self._checksums = bytearray()
        self.num_bytes = 0
        """Payload bytes so far."""

    @property
    def num_chunks(self) -> int:
        """Chunks so far."""
        return len(self._checksums) // 8

    @property
    def checksum(self) -> int:
        """The manifest's checksum over the chunks so far."""
        return self._digest(self._checksums)

    def add(self, num_bytes: int, checksum: int) -> None:
        """Adds the next chunk."""
        self.num_bytes += num_bytes
        self._checksums += checksum.to_bytes(8, "little")


class Receiver:
    """Verifies one push.

    Only a chunk that passed may be written. Once `manifest` has returned, every byte expected has
    arrived unchanged, once, in the reservation's epoch.
    """

    def __init__(self, reservation: Reservation, expected: Expected, digest: Digest) -> None:
        self._reservation = reservation
        self._expected = expected
        self._digest = digest
        self._written = [0] * expected.fingerprint.layout.num_layers
        """Per layer, a bit per block received."""
        self.received = Ledger(digest)
        self.encoding = KvEncoding.NATIVE
        """Of the chunks; known once the push is open."""

    def open(self, opening: Opening) -> None:
        """Checks the first frame, and marks the reservation as being filled.

        Raises:
            StaleEpoch: another epoch or attempt, or a push that is open or over already.
            KvLayoutMismatch: the two sides do not compute the same KV; says how they differ.
        """
        reservation = self._reservation
        named = (opening.request_id, opening.attempt)
        if named != (reservation.request_id, reservation.attempt):
            raise StaleEpoch(
                f"reservation {reservation.reservation_id} is not for attempt {opening.attempt} "
                f"of request {opening.request_id}"
            )
        self._check_epoch(opening.epoch)
        differences = self._expected.fingerprint.differences(opening.fingerprint)
        if differences:
            raise KvLayoutMismatch("receiver != sender: " + "; ".join(differences))
        if opening.encoding not in self._expected.encodings:
            raise KvLayoutMismatch(f"KV encoded as {opening.encoding.name} is not taken here")
        if reservation.state is not ReservationState.RESERVED:
            raise StaleEpoch(f"reservation is {reservation.state.value}: it takes no push")
        self.encoding = opening.encoding
        reservation.transition(ReservationState.FILLING)

    def chunk(self, chunk: KvChunk, payload: memoryview) -> None:
        """Checks a chunk and counts it as received: `check`, `verify` and `accept` in one.

        Raises:
            StaleEpoch, KvLayoutMismatch, KvChecksum: see `check` and `verify`.
        """
        self.check(chunk, payload.nbytes)
        self.verify(chunk, payload)
        self.accept(chunk)

    def check(self, chunk: KvChunk, num_bytes: int) -> None:
        """Checks all of a chunk but its content.

        Raises:
            StaleEpoch: the reservation was released, or has another epoch.
            KvLayoutMismatch: the range or its size does not fit the layout or the reservation.
            KvChecksum: a chunk is missing, repeated or out of order.
        """
        self._check_filling(chunk.epoch)
        if chunk.sequence != self.received.num_chunks:
            raise KvChecksum(
                f"chunk {chunk.sequence} came where {self.received.num_chunks} was expected"
            )
        span = chunk.span
        self._check_range(span)
        needed_bytes = self._num_bytes(span)
        if num_bytes != needed_bytes:
            raise KvLayoutMismatch(
                f"chunk {chunk.sequence} has {num_bytes} bytes, its range needs {needed_bytes}"
            )
        mask = _mask(span)
        if any(bits & mask for bits in self._written[span.layer_start : span.layer_end]):
            raise KvChecksum(f"chunk {chunk.sequence} repeats blocks that were sent before")

    def verify(self, chunk: KvChunk, payload: memoryview) -> None:
        """Checks a chunk's content, on any thread: only then may it be written.

        Raises:
            KvChecksum: the content changed on its way.
        """
        if self._digest(payload) != chunk.checksum:
            raise KvChecksum(f"content of chunk {chunk.sequence} does not match its checksum")

    def accept(self, chunk: KvChunk) -> None:
        """Counts a chunk that has passed `check` and `verify` as received."""
        for layer in range(chunk.span.layer_start, chunk.span.layer_end):
            self._written[layer] |= _mask(chunk.span)
        self.received.add(self._num_bytes(chunk.span), chunk.checksum)

    def manifest(self, manifest: Manifest) -> None:
        """Checks the last frame against all that was received.

        Raises:
            StaleEpoch: the reservation was released, or has another epoch.
            KvChecksum: anything is missing or differs; says what.
        """
        self._check_filling(manifest.epoch)
        expected = self._expected
        num_blocks = expected.block_end - expected.block_start
        pairs = [
            ("chunks", manifest.num_chunks, self.received.num_chunks),
            ("bytes", manifest.num_bytes, self.received.num_bytes),
            ("block_start", manifest.block_start, expected.block_start),
            ("blocks", manifest.num_blocks, num_blocks),
            ("tokens", manifest.num_tokens, expected.num_tokens),
            ("tokens_hash", manifest.tokens_hash.hex(), expected.tokens_hash.hex()),
            ("checksum", manifest.checksum, self.received.checksum),
        ]
        wrong = [f"{name}: {sent} != {mine}" for name, sent, mine in pairs if sent != mine]
        if wrong:
            raise KvChecksum("manifest does not match what arrived: " + "; ".join(wrong))
        whole = ((1 << num_blocks) - 1) << expected.block_start
        if any(bits != whole for bits in self._written):
            raise KvChecksum("the push ended before all blocks of all layers had come")

    def _num_bytes(self, span: Span) -> int:
        return span.num_bytes(self.encoding.layout(self._expected.fingerprint.layout))

    def _check_epoch(self, epoch: int) -> None:
        if epoch != self._reservation.epoch:
            raise StaleEpoch(
                f"epoch {epoch} is not current: the reservation has {self._reservation.epoch}"
            )

    def _check_filling(self, epoch: int) -> None:
        self._check_epoch(epoch)
        if self._reservation.state is not ReservationState.FILLING:
            raise StaleEpoch(
                f"reservation is {self._reservation.state.value}: the write was refused"
            )

    def _check_range(self, span: Span) -> None:
        expected = self._expected
        is_layer_range = 0 <= span.layer_start < span.layer_end <= len(self._written)
        block_end = span.block_start + span.num_blocks
        is_block_range = (
            span.num_blocks > 0 and expected.block_start <= span.block_start < block_end
        ) and block_end <= expected.block_end
        if not (is_layer_range and is_block_range):
            raise KvLayoutMismatch(
                f"layers [{span.layer_start}, {span.layer_end}), blocks [{span.block_start}, "
                f"{block_end}) are outside of layers [0, {len(self._written)}), blocks "
                f"[{expected.block_start}, {expected.block_end})"
            )


def _mask(span: Span) -> int:
    return ((1 << span.num_blocks) - 1) << span.block_start
