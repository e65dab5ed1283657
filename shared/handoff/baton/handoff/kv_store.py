"""What the hand-off needs of an engine."""

from __future__ import annotations

from typing import Protocol

from baton.core.handoff.frames import KvEncoding, Span
from baton.core.hashing import Fingerprint


class KvStore(Protocol):
    """KV of sequences by block. `read` and `write` are called on transfer threads."""

    @property
    def fingerprint(self) -> Fingerprint:
        """What computes the KV, and its layout."""
        ...

    def read(self, seq_id: str, span: Span, encoding: KvEncoding, out: memoryview) -> None:
        """Puts a span of a sequence's KV into `out`, in the encoding.

        Raises:
            RequestNotFound, InvalidRequest: the sequence has no such blocks.
        """
        ...

    def write(self, seq_id: str, span: Span, encoding: KvEncoding, payload: memoryview) -> None:
        """Writes what `read` made into blocks that are being filled.

        Raises:
            RequestNotFound, InvalidRequest: the sequence has no such blocks, or not any longer.
        """
        ...
