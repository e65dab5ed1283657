"""What an attempt's stages consisted of: chunks of the prompt, chunks of KV, decode steps."""

from __future__ import annotations

from collections.abc import Sequence

from baton.core.output import TokenBatch
from baton.core.placement import Placement
from baton.core.timeline import Slice, Slices
from baton.scheduler.live import LiveRequest
from baton.scheduler.messages import FirstToken, PrefillStarted

PREFILL_TRACK = "prefill_chunk"
KV_TRACK = "kv_chunk"
DECODE_TRACK = "decode_step"


class Trail:
    """Puts what one attempt's workers report on the request's own time line.

    A worker's times are relative to a message that the scheduler saw too: no clocks are compared.
    """

    def __init__(self, live: LiveRequest, placement: Placement) -> None:
        self._live = live
        self._decode_id = placement.decode.worker_id
        self._prefill_id = placement.prefill.worker_id if placement.prefill else ""
        self._reserved_at_s = 0.0
        self._step_at_s: float | None = None

    def reserved(self) -> None:
        """Reserve was answered; a prefill is asked for at once."""
        self._reserved_at_s = self._now_s()

    def prefilled(self, started: PrefillStarted, first: FirstToken) -> None:
        """The prompt is computed."""
        origin_s = self._reserved_at_s + started.queue_s
        self._extend(PREFILL_TRACK, self._prefill_id, first.chunks, origin_s)

    def stepped(self, batch: TokenBatch) -> None:
        """Tokens came from the decode worker."""
        now_s = self._now_s()
        if timings := batch.timings:
            self._extend(KV_TRACK, self._decode_id, timings.kv_chunks, self._reserved_at_s)
            if self._prefill_id:
                self._step_at_s = max(0.0, now_s - timings.first_step_s)
        # A local prefill's first step is the prompt's computation: a stage of its own.
        if self._step_at_s is not None and batch.token_ids:
            step = Slice(
                self._step_at_s,
                now_s,
                num_tokens=len(batch.token_ids),
                draft_tokens=batch.draft_tokens,
                accepted_tokens=batch.accepted_tokens,
            )
            self._extend(DECODE_TRACK, self._decode_id, (step,), 0.0)
        self._step_at_s = now_s

    def _extend(self, name: str, worker_id: str, parts: Sequence[Slice], origin_s: float) -> None:
        if parts:
            slices = self._live.tracks.setdefault((name, worker_id), Slices())
            for part in parts:
                slices.add(part.shifted(origin_s))

    def _now_s(self) -> float:
        return self._live.stages.since_arrival(self._live.clock())
