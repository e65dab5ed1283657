"""Every request from its arrival to its outcome: accept, tokenize, look up, run, record."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from baton.core.admission import Admission, Ticket
from baton.core.errors import BatonError, InvalidRequest, WorkerDraining
from baton.core.placement import SHARED_PROMPT, Placement
from baton.core.request import RequestStatus
from baton.core.stages import StageName
from baton.rpc.telemetry import trace_id_hex
from baton.scheduler.attempt import Attempt, SchedulerDeps
from baton.scheduler.gate import AdmissionGate
from baton.scheduler.live import (
    AcceptedRequest,
    LiveRequest,
    RecentRequests,
    RequestKey,
    worker_request_id,
)
from baton.scheduler.placer import AttemptFailed, Failover, Placer, Verdict
from baton.scheduler.relay import OutputRelay, replay
from baton.scheduler.request_timeline import placement_attributes
from baton.wire.clock import ended_within
from baton.wire.inference.requests import GenerateRequest
from baton.wire.inference.serving import Emit
from baton.wire.tokenizer import OpenText

if TYPE_CHECKING:
    from opentelemetry.trace import Span

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
                    # Before the gate: in the queue, it could block the origin that it waits for.
                    await self._origin.prompt_kv.settled.wait()
                ticket = await self._gate.enter(
                    live.asked.worker_request_id,
                    live.asked.model,
                    priority=priority,
                    deadline_s=live.asked.deadline_s,
                )
                placement = await self._place(span, self._origin)
            live.timeline.mark(StageName.ADMIT)
            while (failure := await self._attempt(placement)) is not None:
                await self._recover(failure, ticket)
                with self._deps.spans.stage(StageName.ADMIT, {"baton.retry": True}) as span:
                    placement = await self._place(span)
                live.timeline.mark(StageName.RETRY)
        finally:
            self._text.close()
            if ticket is not None:
                self._gate.leave(ticket)

    async def _place(self, span: Span, origin: LiveRequest | None = None) -> Placement:
        placement = await self._placer.place(self._live, self._failover, origin)
        self._enter(RequestStatus.ADMITTED)
        self._live.output.begin(placement.decode.status.fingerprint)
        self._deps.metrics.decisions.labels(placement.decision, placement.reason).inc()
        span.set_attributes(placement_attributes(placement))
        return placement

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


_LAST_CANCELS_S = 1.0


class Orchestrator:
    """Runs requests. One per process."""

    def __init__(self, deps: SchedulerDeps) -> None:
        self._deps = deps
        self._clock = deps.clock
        self._placer = Placer(deps.cluster, deps.settings, deps.clock)
        self._admission = Admission(deps.settings.max_waiting_requests)
        self._gate = AdmissionGate(self._admission, deps.cluster.num_places, deps.clock)
        self._live: dict[RequestKey, LiveRequest] = {}
        self.recent = RecentRequests(deps.settings.recent_requests, deps.clock)
        self._is_cut_off = False

    @property
    def num_running(self) -> int:
        """Requests with workers, or about to get them."""
        return self._admission.num_running()

    @property
    def num_waiting(self) -> int:
        """Requests that wait for admission."""
        return self._admission.num_waiting()

    def requests_by_state(self) -> Mapping[str, int]:
        """Requests now here, by state name."""
        return Counter(live.state.status.value for live in self._live.values())

    def cluster_changed(self) -> None:
        """Lets waiting requests in where workers have come."""
        for model in {live.asked.model for live in self._live.values()}:
            self._gate.advance(model)

    async def generate(self, job: GenerateRequest, timeout_s: float, emit: Emit) -> None:
        """Runs a request to its end; returns after the last chunk was sent.

        Raises:
            BatonError: the request was refused, or ended otherwise.
        """
        with self._deps.entrance.entered(job.priority):
            live = self._accept(job, timeout_s)
            try:
                await self._run_to_an_end(live, emit)
            finally:
                del self._live[live.asked.key]
                live.prompt_kv.settled.set()

    async def drain(self, grace_s: float) -> None:
        """Refuses new requests, waits for the running ones, and cuts off those that stay."""
        self._deps.entrance.close()
        if not await ended_within(self._clock, self._tasks(), grace_s):
            self._is_cut_off = True
            late = self._tasks()
            for task in late:
                task.cancel()
            await ended_within(self._clock, late, _LAST_CANCELS_S)

    async def close(self) -> None:
        """Stops timers."""
        await self._gate.close()

    def _tasks(self) -> list[asyncio.Task[Any]]:
        return [live.task for live in self._live.values() if live.task is not None]

    def _accept(self, job: GenerateRequest, timeout_s: float) -> LiveRequest:
        model = self._deps.cluster.resolve_model(job.model)
        asked = AcceptedRequest(
            job=job,
            worker_request_id=worker_request_id(job.request_id, self._deps.rng),
            model=model,
            timeout_s=timeout_s,
            deadline_s=self._clock.now() + timeout_s,
            sampling=job.sampling,
        )
        if asked.key in self._live:
            raise InvalidRequest(f"request_id {job.request_id!r} is in use by a running request")
        live = LiveRequest(asked, self._clock)
        self._live[asked.key] = live
        self.recent.started(live)
        return live

    def _origin(self, live: LiveRequest) -> LiveRequest | None:
        """The earlier request whose prompt this one shares, if it says so and that one is here."""
        asked = live.asked
        origin = self._live.get((asked.key[0], asked.job.fork_of))
        if (
            origin is None
            or origin is live
            or origin.asked.model != asked.model
            or origin.asked.job.cache_salt != asked.job.cache_salt
            or asked.job.sampling.prompt_logprobs is not None
        ):
            return None
        return origin

    async def _run_to_an_end(self, live: LiveRequest, emit: Emit) -> None:
        status = "internal"
        try:
            async with self._clock.timeout(live.remaining_s()):
                await self._run(live, emit)
            status = "ok"
        except TimeoutError as error:
            if not live.state.is_over:
                status = "deadline"
                raise live.late() from error
        except asyncio.CancelledError as error:
            if self._is_cut_off:
                status = "worker_draining"
                raise WorkerDraining("this scheduler stops, and its grace is over") from error
            status = "deadline" if live.is_late() else "cancelled"
            raise
        except BatonError as error:
            status = error.reason.name.lower()
            raise
        finally:
            self._record_end(live, status)

    def _record_end(self, live: LiveRequest, status: str) -> None:
        if live.state.is_over:
            status = "ok"
        else:
            is_callers = status in {"cancelled", "deadline"}
            end = RequestStatus.ABORTED if is_callers else RequestStatus.FAILED
            live.state.end(end, self._clock.now())
        finish = live.output.finish_reason
        self.recent.ended(live, finish if finish and status == "ok" else status)
        self._deps.metrics.requests.labels(status).inc()
        self._deps.metrics.e2e_s.observe(live.timeline.now_s())

    async def _run(self, live: LiveRequest, emit: Emit) -> None:
        origin = self._origin(live)
        await self._tokenize(live)
        answers = self._deps.answers
        key = answers.key(live)
        if key is not None:
            kept = await answers.find(key)
            if kept is not None:
                live.output.digest = answers.digest(live)
                await replay(live, kept, emit, self._deps.metrics)
                return
            live.timeline.mark(StageName.ANSWER_LOOKUP)
            emit = answers.recorded(key, live, emit)
        await RequestRun(live, origin, emit, self._gate, self._placer, self._deps).run()

    async def _tokenize(self, live: LiveRequest) -> None:
        attributes = {"baton.model": live.asked.model}
        with self._deps.spans.stage(StageName.TOKENIZE, attributes) as span:
            live.trace_id = trace_id_hex(span)
            prompt = live.asked.job.prompt
            if not isinstance(prompt, tuple):
                model, left_s = live.asked.model, live.remaining_s()
                prompt = await self._deps.encoder.encode(model, prompt, left_s)
            num_tokens = len(prompt)
            if not num_tokens:
                raise InvalidRequest("the prompt is empty; it must have at least one token")
            live.asked = replace(live.asked, prompt_ids=prompt)
            span.set_attribute("baton.prompt_tokens", num_tokens)
        self._deps.metrics.took_in(num_tokens)
        limit = self._deps.cluster.max_model_len_tokens(live.asked.model)
        live.asked = live.asked.completed(limit, self._deps.rng)
        live.timeline.mark(StageName.TOKENIZE, num_tokens=num_tokens)
        live.state.transition(RequestStatus.TOKENIZED, self._clock.now())
