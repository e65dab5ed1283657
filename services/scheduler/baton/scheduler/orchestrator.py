"""A request's way through the services: tokenize, admit, then attempts until one ends it."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from random import Random

from baton.core.admission import Admission, Ticket
from baton.core.errors import (
    BatonError,
    InvalidRequest,
    KvLayoutMismatch,
    NoWorker,
    PromptTooLong,
    WorkerDraining,
)
from baton.core.placement import DECODE_ROLE, Placement, PlacementJob, place, place_beside
from baton.core.request import RequestStatus
from baton.rpc.telemetry import trace_id_hex
from baton.scheduler.answers import LOOKUP_STAGE, Answers, replay
from baton.scheduler.attempt import Attempt, AttemptTools
from baton.scheduler.encoder import Encoder
from baton.scheduler.failover import AttemptFailed, Failover, Verdict
from baton.scheduler.gate import Gate
from baton.scheduler.live import LiveRequest, SchedulerMetrics, placement_attributes
from baton.scheduler.messages import GenerateJob
from baton.scheduler.recent import RecentRequests
from baton.scheduler.relay import Emit, OutputRelay
from baton.scheduler.text import TextRelay
from baton.scheduler.view import ClusterWatch
from baton.wire.tokenizer import OpenText

logger = logging.getLogger(__name__)

_POLL_S = 0.05
_SEED_BITS = 63


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the orchestrator works with."""

    cluster: ClusterWatch
    encoder: Encoder
    text: TextRelay
    tools: AttemptTools
    metrics: SchedulerMetrics
    answers: Answers
    clock: Callable[[], float]
    rng: Random


class Orchestrator:
    """Runs requests. One per process."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._cluster = around.cluster
        self._settings = around.tools.settings
        self._clock = around.clock
        self._admission = Admission(self._settings.max_waiting_requests)
        self._gate = Gate(self._admission, around.cluster.num_places, around.clock)
        self._live: dict[str, LiveRequest] = {}
        self._tasks: set[asyncio.Task[object]] = set()
        self.recent = RecentRequests(self._settings.recent_requests, around.clock)
        self._ordinal = 0
        self._is_draining = False
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
        for model in {live.model for live in self._live.values()}:
            self._gate.advance(model)

    async def generate(
        self, job: GenerateJob, timeout_s: float, emit: Callable[[LiveRequest], Emit]
    ) -> None:
        """Runs a request to its end; returns after the last message was sent.

        `emit` makes the sender of the accepted request's messages.

        Raises:
            BatonError: the request ended otherwise.
        """
        if self._is_draining:
            raise WorkerDraining("this scheduler is about to stop", retry_after_s=1.0)
        if job.request_id in self._live:
            raise InvalidRequest(f"request_id {job.request_id!r} is in use by a running request")
        model = self._cluster.resolve_model(job.model)
        live = LiveRequest(job, self._clock, timeout_s, model)
        live.origin = self._origin(live)
        self._live[job.request_id] = live
        self.recent.started(live)
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            await self._run_to_an_end(live, emit(live))
        finally:
            del self._live[job.request_id]
            live.has_prompt.set()
            if task is not None:
                self._tasks.discard(task)

    async def drain(self, grace_s: float) -> None:
        """Refuses new requests, waits for the running ones, and cuts off those that stay."""
        self._is_draining = True
        if self._tasks:
            _, late = await asyncio.wait(set(self._tasks), timeout=grace_s)
            self._is_cut_off = bool(late)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=1.0)

    def close(self) -> None:
        """Stops timers."""
        self._gate.close()

    def _origin(self, live: LiveRequest) -> LiveRequest | None:
        """The earlier request whose prompt this one shares, if it says so and that one is here."""
        origin = self._live.get(live.job.fork_of)
        if (
            origin is None
            or origin.model != live.model
            or origin.job.cache_salt != live.job.cache_salt
            or live.sampling.prompt_logprobs is not None
        ):
            return None
        return origin

    async def _run_to_an_end(self, live: LiveRequest, emit: Emit) -> None:
        status = "internal"
        try:
            async with asyncio.timeout(live.remaining_s()):
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
            status = "deadline" if self._clock() >= live.deadline_s else "cancelled"
            raise
        except BatonError as error:
            status = error.reason.name.lower()
            raise
        finally:
            self._close(live, status)

    def _close(self, live: LiveRequest, status: str) -> None:
        now = self._clock()
        if live.state.is_over:
            status = "ok"
        else:
            is_callers = status in {"cancelled", "deadline"}
            live.state.end(RequestStatus.ABORTED if is_callers else RequestStatus.FAILED, now)
        finish = live.finish_reason
        self.recent.ended(live, finish.name.lower() if finish and status == "ok" else status)
        metrics = self._around.metrics
        metrics.requests.labels(status).inc()
        metrics.e2e_s.observe(now - live.stages.arrived_at_s)

    async def _run(self, live: LiveRequest, emit: Emit) -> None:
        await self._tokenize(live)
        answers = self._around.answers
        key = answers.key(live)
        if key is not None:
            kept = await answers.find(key)
            if kept is not None:
                await replay(live, kept, emit, self._around.metrics)
                return
            live.stages.mark(LOOKUP_STAGE, self._clock())
            emit = answers.recorded(key, live, emit)
        await self._compute(live, emit)

    async def _compute(self, live: LiveRequest, emit: Emit) -> None:
        """Has workers answer."""
        job = live.job
        ticket: Ticket | None = None
        text = self._around.text.open(
            OpenText(live.model, live.sampling.stop, job.keep_special_tokens),
            self._settings.tokenizer_timeout_s,
        )
        text.resume(job.output_ids, job.num_output_chars)
        relay = OutputRelay(live, text, emit, self._around.metrics)
        failover = Failover(self._settings.max_attempts, self._around.rng)
        try:
            with self._around.tools.spans.stage("admit", {"baton.priority": job.priority}) as span:
                if live.origin is not None:
                    # Outside the gate, so that it is not in that one's way.
                    await live.origin.has_prompt.wait()
                ticket = await self._gate.enter(
                    job.request_id, live.model, priority=job.priority, deadline_s=live.deadline_s
                )
                placement = await self._place(live, failover)
                span.set_attributes(placement_attributes(placement))
            live.stages.mark("admit", self._clock())
            while not await self._attempt(live, placement, relay, failover, ticket):
                with self._around.tools.spans.stage("admit", {"baton.retry": True}) as span:
                    placement = await self._place(live, failover)
                    span.set_attributes(placement_attributes(placement))
                live.stages.mark("retry", self._clock())
        finally:
            text.close()
            if ticket is not None:
                self._gate.leave(ticket)

    async def _tokenize(self, live: LiveRequest) -> None:
        job, model = live.job, live.model
        with self._around.tools.spans.stage("tokenize", {"baton.model": model}) as span:
            live.trace_id = trace_id_hex(span)
            if isinstance(job.prompt, tuple):
                live.prompt_ids = job.prompt
            else:
                live.prompt_ids = await self._around.encoder.encode(
                    model, job.prompt, live.remaining_s()
                )
            span.set_attribute("baton.prompt_tokens", len(live.prompt_ids))
        if not live.prompt_ids:
            raise InvalidRequest("the prompt is empty; it must have at least one token")
        self._around.metrics.took_in(len(live.prompt_ids))
        seed = job.sampling.seed
        live.sampling = replace(
            job.sampling,
            max_tokens=self._max_tokens(live),
            seed=self._around.rng.getrandbits(_SEED_BITS) if seed is None else seed,
        )
        if live.is_complete:
            raise InvalidRequest("resume has max_tokens tokens: nothing is left to produce")
        now = self._clock()
        live.stages.mark("tokenize", now, num_tokens=len(live.prompt_ids))
        live.state.transition(RequestStatus.TOKENIZED, now)

    def _max_tokens(self, live: LiveRequest) -> int | None:
        """Most tokens to produce, None when no worker says how many it takes.

        Raises:
            PromptTooLong: prompt and output do not fit the model's context.
        """
        limit = self._cluster.max_model_len_tokens(live.model)
        wanted = live.job.sampling.max_tokens
        num_prompt = len(live.prompt_ids)
        if not limit:
            return wanted
        room = limit - num_prompt
        if room < 1:
            raise PromptTooLong(
                f"the prompt has {num_prompt} tokens and model {live.model!r} takes {limit},"
                f" output included; shorten the prompt by at least {1 - room} tokens"
            )
        if wanted is not None and wanted > room:
            raise PromptTooLong(
                f"the prompt's {num_prompt} tokens and max_tokens {wanted} exceed the {limit}"
                f" that model {live.model!r} takes; lower max_tokens to at most {room}"
            )
        return room if wanted is None else wanted

    async def _place(self, live: LiveRequest, failover: Failover) -> Placement:
        """Chooses workers for the next attempt; waits a while for one to appear."""
        give_up_s = self._clock() + self._settings.worker_wait_s
        token_ids = (*live.prompt_ids, *live.output_ids)
        cached = self._cluster.cached_blocks(live.model, token_ids, live.job.cache_salt)
        self._ordinal += 1
        job = PlacementJob(
            model=live.model,
            num_tokens=len(token_ids),
            ordinal=self._ordinal,
            cached_blocks=cached,
            loads=self._cluster.loads(),
            excluded=failover.excluded,
            digest=live.pinned_digest,
        )
        origin, live.origin = live.origin, None
        while True:
            now = self._clock()
            view = self._cluster.view()
            beside = None
            if origin is not None and origin.prompt_ids == live.prompt_ids:
                beside = place_beside(view, origin.home, job, now)
            try:
                placement = beside or place(view, job, self._settings.placement_rules, now)
            except NoWorker as error:
                if now >= give_up_s:
                    raise self._unplaceable(live, error) from error
                await asyncio.sleep(_POLL_S)
                continue
            live.state.transition(RequestStatus.ADMITTED, now)
            live.attempts = failover.num_failures + 1
            metrics = self._around.metrics
            metrics.decisions.labels(placement.decision, placement.reason).inc()
            return placement

    def _unplaceable(self, live: LiveRequest, error: NoWorker) -> BatonError:
        """Why there is no worker: perhaps those that are there would go on with another text."""
        if live.pinned_digest and self._cluster.num_workers(DECODE_ROLE, live.model):
            return KvLayoutMismatch(
                f"the workers that began this answer are gone, and those of model {live.model!r}"
                " that are ready compute something else; send the request anew, without `resume`"
            )
        return error

    async def _attempt(
        self,
        live: LiveRequest,
        placement: Placement,
        relay: OutputRelay,
        failover: Failover,
        ticket: Ticket,
    ) -> bool:
        """Runs one attempt; False when another one is due."""
        num_tokens = len(live.prompt_ids) + len(live.output_ids)
        try:
            with self._cluster.placed(placement, num_tokens) as prefilled:
                await Attempt(live, placement, relay, self._around.tools, prefilled).run()
        except AttemptFailed as failure:
            if live.is_complete:
                await relay.finish_at_limit()
                return True
            await self._recover(live, failover, ticket, failure)
            return False
        return True

    async def _recover(
        self, live: LiveRequest, failover: Failover, ticket: Ticket, failure: AttemptFailed
    ) -> None:
        """Gets ready for another attempt, or raises why there is none."""
        verdict = failover.judge(failure)
        logger.info(
            "attempt failed",
            extra={
                "request_id": live.request_id,
                "stage": failure.stage,
                "worker": failure.worker_id,
                "reason": failure.error.reason.name,
                "verdict": verdict.value,
                "num_output_tokens": len(live.output_ids),
            },
        )
        if failure.is_unreachable:
            self._cluster.suspect(failure.worker_id)
        if verdict is Verdict.GIVE_UP:
            raise failure.error
        self._around.metrics.retries.labels(failure.stage).inc()
        if verdict is Verdict.TRY_NEXT:
            await self._find_room(live, failover, ticket)
            return
        live.state.transition(RequestStatus.RELEASING, self._clock())
        await asyncio.sleep(min(failover.backoff_s(), live.remaining_s()))
        if failure.is_unreachable:
            await self._wait_for_worker(live, failover)

    async def _find_room(self, live: LiveRequest, failover: Failover, ticket: Ticket) -> None:
        """Goes on to the next worker, or back into the queue when all of them are full."""
        is_reserved = live.state.status is not RequestStatus.ADMITTED
        if is_reserved or self._cluster.has_healthy_decode(live.model, failover.excluded):
            live.state.transition(RequestStatus.RELEASING, self._clock())
            return
        live.state.transition(RequestStatus.TOKENIZED, self._clock())
        limit_s = failover.room_wait_s(self._settings.kv_wait_s, self._clock())
        await self._gate.wait_again(ticket, limit_s)

    async def _wait_for_worker(self, live: LiveRequest, failover: Failover) -> None:
        """Until a worker that is not in doubt is there, for a bounded time."""
        give_up_s = self._clock() + min(self._settings.worker_wait_s, live.remaining_s())
        while self._clock() < give_up_s:
            if self._cluster.has_healthy_decode(live.model, failover.unreachable):
                return
            await asyncio.sleep(_POLL_S)
