"""One request from admission to its end: attempts, until one of them ends it.

The request's state machine, but for the states within an attempt (see `attempt`):

    TOKENIZED -> (gate) -> ADMITTED -> attempt -> FINISHED
    ADMITTED -> TOKENIZED               every worker is full: back into the queue
    any state -> RELEASING -> ADMITTED  the attempt failed: the next one
"""

from __future__ import annotations

import logging

from baton.core.admission import Ticket
from baton.core.placement import SHARED_PROMPT, Placement
from baton.core.request import RequestStatus
from baton.core.stages import StageName
from baton.scheduler.attempt import Attempt
from baton.scheduler.deps import SchedulerDeps
from baton.scheduler.failover import AttemptFailed, Failover, Verdict
from baton.scheduler.gate import AdmissionGate
from baton.scheduler.live import LiveRequest
from baton.scheduler.placer import Placer
from baton.scheduler.relay import OutputRelay
from baton.scheduler.stage_spans import placement_attributes
from baton.wire.inference.serving import Emit
from baton.wire.tokenizer import OpenText

logger = logging.getLogger(__name__)


class RequestRun:
    """Has workers answer one tokenized request."""

    def __init__(
        self,
        live: LiveRequest,
        origin: LiveRequest | None,
        emit: Emit,
        gate: AdmissionGate,
        placer: Placer,
        deps: SchedulerDeps,
    ) -> None:
        """`origin` is the running request whose prompt's KV this one shares."""
        self._live = live
        self._origin = origin
        self._gate = gate
        self._placer = placer
        self._deps = deps
        self._failover = Failover(deps.settings.max_attempts, deps.rng)
        job = live.asked.job
        self._text = deps.text.open(
            OpenText(live.asked.model, live.asked.sampling.stop, job.keep_special_tokens),
            deps.settings.tokenizer_timeout_s,
        )
        if job.resume is not None:
            self._text.resume(job.resume.token_ids, job.resume.num_chars)
        self._relay = OutputRelay(live, self._text, emit, deps.metrics)

    async def run(self) -> None:
        """Returns when the output has ended.

        Raises:
            BatonError: the request failed.
        """
        live = self._live
        ticket: Ticket | None = None
        try:
            priority = live.asked.job.priority
            with self._deps.spans.stage(StageName.ADMIT, {"baton.priority": priority}) as span:
                if self._origin is not None:
                    # Before the gate: in the queue, it could be in the way of its own origin.
                    await self._origin.prompt_kv.settled.wait()
                ticket = await self._gate.enter(
                    live.asked.worker_request_id,
                    live.asked.model,
                    priority=priority,
                    deadline_s=live.asked.deadline_s,
                )
                placement = await self._placer.place(live, self._failover, self._origin)
                self._admitted(placement)
                span.set_attributes(placement_attributes(placement))
            live.timeline.mark(StageName.ADMIT)
            while (failure := await self._attempt(placement)) is not None:
                await self._recover(failure, ticket)
                with self._deps.spans.stage(StageName.ADMIT, {"baton.retry": True}) as span:
                    placement = await self._placer.place(live, self._failover)
                    self._admitted(placement)
                    span.set_attributes(placement_attributes(placement))
                live.timeline.mark(StageName.RETRY)
        finally:
            self._text.close()
            if ticket is not None:
                self._gate.leave(ticket)

    def _admitted(self, placement: Placement) -> None:
        self._enter(RequestStatus.ADMITTED)
        self._live.output.begin(placement.decode.status.fingerprint)
        self._deps.metrics.decisions.labels(placement.decision, placement.reason).inc()

    async def _attempt(self, placement: Placement) -> AttemptFailed | None:
        """Runs one attempt; returns why another one is due, None when the output has ended."""
        live, origin = self._live, self._origin
        is_fork = origin is not None and placement.reason == SHARED_PROMPT
        fork_of = origin.asked.worker_request_id if origin is not None and is_fork else ""
        try:
            with self._deps.cluster.placed(placement, live.num_tokens) as prefilled:
                await Attempt(
                    live,
                    placement,
                    live.order(placement, fork_of=fork_of),
                    self._relay,
                    self._deps,
                    number=self._failover.num_failures + 1,
                    prefilled=prefilled,
                ).run()
        except AttemptFailed as failure:
            if not live.is_complete:
                return failure
            await self._relay.finish_at_limit()
        return None

    async def _recover(self, failure: AttemptFailed, ticket: Ticket) -> None:
        """Gets ready for another attempt, or raises why there is none."""
        live, failover = self._live, self._failover
        verdict = failover.judge(failure)
        logger.info(
            "attempt failed",
            extra={
                "request_id": live.request_id,
                "stage": failure.stage,
                "worker": failure.worker_id,
                "reason": failure.error.reason.name,
                "verdict": verdict.value,
                "num_output_tokens": len(live.output.ids),
            },
        )
        if failure.is_unreachable:
            self._deps.cluster.suspect(failure.worker_id)
        if verdict is Verdict.GIVE_UP:
            raise failure.error
        self._deps.metrics.retries.labels(failure.stage).inc()
        if verdict is Verdict.TRY_NEXT:
            await self._find_room(ticket)
            return
        self._enter(RequestStatus.RELEASING)
        await self._deps.clock.sleep(min(failover.backoff_s(), live.remaining_s()))
        if failure.is_unreachable:
            await self._placer.wait_for_worker(live, failover)

    async def _find_room(self, ticket: Ticket) -> None:
        """Goes on to the next worker, or back into the queue when all of them are full."""
        live, failover = self._live, self._failover
        had_room = live.state.status is not RequestStatus.ADMITTED
        if had_room or self._deps.cluster.has_healthy_decode(live.asked.model, failover.excluded):
            self._enter(RequestStatus.RELEASING)
            return
        self._enter(RequestStatus.TOKENIZED)
        limit_s = failover.room_wait_s(self._deps.settings.kv_wait_s, self._deps.clock.now())
        await self._gate.wait_again(ticket, limit_s)

    def _enter(self, status: RequestStatus) -> None:
        self._live.state.transition(status, self._deps.clock.now())
