"""A job's stages as spans, and its push as figures."""

from __future__ import annotations

from collections.abc import Callable

from baton.handoff.sender import PushReport
from baton.rpc.telemetry import Attributes, Telemetry
from baton.wire.orders import AttemptOrder
from baton.wire.prefill import PrefillStarted


class Recorder:
    """Records one job's stages, in Clock seconds, as children of the call that asked for it."""

    def __init__(
        self,
        telemetry: Telemetry,
        order: AttemptOrder,
        target_id: str,
        on_push: Callable[[PushReport], None],
    ) -> None:
        """`on_push` gets the report of a committed push."""
        self._telemetry = telemetry
        self._num_tokens = len(order.token_ids)
        self._target_id = target_id
        self._on_push = on_push
        self._parent = telemetry.current_context()
        self._attributes: Attributes = {
            "baton.request.id": order.request_id,
            "baton.attempt": order.attempt,
        }

    def queued(self, since_s: float, until_s: float, started: PrefillStarted) -> None:
        """The prompt left the queue."""
        fetched = {"baton.fetched_tokens": started.fetched_tokens}
        self._record("prefill.queue", since_s, until_s, fetched)
        self._attributes = {**self._attributes, "baton.cached_tokens": started.cached_tokens}

    def computed(self, since_s: float, until_s: float) -> None:
        """The whole prompt is computed."""
        tokens = {"baton.prompt_tokens": self._num_tokens}
        self._record("prefill.compute", since_s, until_s, tokens)

    def pushed(self, report: PushReport) -> None:
        """The KV is committed at the target."""
        self._record(
            "kv.transfer",
            report.began_at_s,
            report.ended_at_s,
            {
                "baton.kv.transport": report.transport,
                "baton.kv.bytes": report.num_bytes,
                "baton.kv.blocks": report.num_blocks,
                "baton.kv.chunks": report.num_chunks,
                "baton.kv.bytes_per_s": report.num_bytes / max(report.active_s, 1e-9),
                "baton.kv.exposed_s": report.exposed_s,
                "baton.kv.idle_s": report.idle_s,
                "baton.kv.starved_s": report.starved_s,
                "baton.target.worker_id": self._target_id,
            },
        )
        self._on_push(report)

    def _record(self, name: str, start_s: float, end_s: float, attributes: Attributes) -> None:
        self._telemetry.record_span(
            name, start_s, end_s, self._parent, {**self._attributes, **attributes}
        )
