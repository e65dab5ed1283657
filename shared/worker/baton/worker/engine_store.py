"""An engine's KV as the hand-off sees it."""

from __future__ import annotations

from baton.core.handoff.frames import KvEncoding, Span
from baton.core.hashing import Fingerprint
from baton.engine.engine import Engine
from baton.engine.kv_int8 import restore_kv, round_kv


class EngineStore:
    """Implements `handoff.kv_store.KvStore`. `read` and `write` may be called on any thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def fingerprint(self) -> Fingerprint:
        """See KvStore."""
        return self._engine.fingerprint

    def read(self, seq_id: str, span: Span, encoding: KvEncoding, out: memoryview) -> None:
        """See KvStore."""
        layout = self.fingerprint.layout
        if encoding.layout(layout) == layout:
            self._engine.transfer.read_blocks(seq_id, span, out)
        else:
            content = self._engine.transfer.read_blocks(seq_id, span)
            round_kv(content, layout, span, out)

    def write(self, seq_id: str, span: Span, encoding: KvEncoding, payload: memoryview) -> None:
        """See KvStore."""
        layout = self.fingerprint.layout
        if encoding.layout(layout) != layout:
            payload = restore_kv(payload, layout, span)
        self._engine.transfer.write_blocks(seq_id, span, payload)
