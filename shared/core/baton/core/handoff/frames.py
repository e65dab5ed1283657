"""The frames of a push and the receiver's answers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from baton.core.hashing import Fingerprint, KvLayout
from baton.core.sampling import TokenLogprob

SLOTS_START_BYTES = 4096
"""Where the first slot begins in shared memory; the token lies before it."""


class KvEncoding(Enum):
    """How KV is written in chunks. Values are those of baton.v1.KvEncoding."""

    NATIVE = 0
    """As it is computed."""
    INT8 = 1
    """Rounded for the transfer to int8, with a scale per token and head."""

    def layout(self, computed: KvLayout) -> KvLayout:
        """Layout of chunks, for KV that is computed as `computed`."""
        return replace(computed, dtype="int8") if self is KvEncoding.INT8 else computed


@dataclass(frozen=True, slots=True)
class Staged:
    """A sender's memory for chunks, which a receiver reads over NIXL."""

    agent: bytes
    """NIXL's metadata of the sender's agent."""
    address: int
    num_slots: int
    slot_bytes: int
    token: bytes
    """What the memory begins with until the first chunk."""


@dataclass(frozen=True, slots=True)
class Opening:
    """First frame of a push."""

    reservation_id: str
    request_id: str
    attempt: int
    epoch: int
    fingerprint: Fingerprint
    worker_id: str
    transports: tuple[str, ...] = ()
    """What the sender can use for the bytes of chunks beside the stream, best first."""
    staged: Staged | None = None
    encoding: KvEncoding = KvEncoding.NATIVE


@dataclass(frozen=True, slots=True)
class Span:
    """A range of layers of a range of a request's blocks."""

    layer_start: int
    layer_end: int
    block_start: int
    num_blocks: int

    def num_bytes(self, layout: KvLayout) -> int:
        """Bytes of its KV."""
        return layout.layers_block_bytes(self.layer_start, self.layer_end) * self.num_blocks


@dataclass(frozen=True, slots=True)
class KvChunk:
    """What a frame with KV says about it."""

    epoch: int
    sequence: int
    span: Span
    checksum: int


@dataclass(frozen=True, slots=True)
class ChunkFrame:
    """A chunk and its KV."""

    chunk: KvChunk
    payload: memoryview
    slot_bytes: int = 0
    """Payload bytes that lie in the chunk's slot instead."""


@dataclass(frozen=True, slots=True)
class SignOfLife:
    """The sender is still computing."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """Last frame of a push."""

    epoch: int
    num_chunks: int
    num_bytes: int
    block_start: int
    num_blocks: int
    num_tokens: int
    tokens_hash: bytes
    checksum: int
    """Digest over the chunks' checksums, in order, each as 8 bytes little-endian."""
    first_token_id: int
    first_logprob: TokenLogprob | None = None


PushFrame = Opening | ChunkFrame | SignOfLife | Manifest


@dataclass(frozen=True, slots=True)
class SlotOffer:
    """The sender may write chunks into slots of the receiver's shared memory."""

    num_slots: int
    slot_bytes: int
    token: bytes
    """What the memory begins with."""
    pid: int
    fd: int
    """Descriptor of the memory in process `pid`."""

    @property
    def num_bytes(self) -> int:
        """Size of the memory."""
        return SLOTS_START_BYTES + self.num_slots * self.slot_bytes


@dataclass(frozen=True, slots=True)
class PullOffer:
    """The receiver reads chunks from the memory that the sender staged."""

    num_slots: int
    slot_bytes: int


Offer = SlotOffer | PullOffer


@dataclass(frozen=True, slots=True)
class Credit:
    """Chunks that may be sent on top of those allowed so far."""

    num_chunks: int


@dataclass(frozen=True, slots=True)
class Committed:
    """The receiver has verified everything: the hand-off is complete."""

    num_bytes: int
    num_chunks: int


PushAnswer = SlotOffer | PullOffer | Credit | Committed
