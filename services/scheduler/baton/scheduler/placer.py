"""Which workers the next attempt gets: those that failed are avoided, lost ones waited for."""

from __future__ import annotations

from enum import Enum
from random import Random

from baton.core.clock import Clock
from baton.core.errors import RETRY_ELSEWHERE, BatonError, ErrorReason, KvLayoutMismatch, NoWorker
from baton.core.placement import Placement, PlacementJob, place, place_beside
from baton.core.roles import Role
from baton.scheduler.live import LiveRequest
from baton.scheduler.settings import SchedulerSettings
from baton.scheduler.view import ClusterWatch

_FULL = frozenset({ErrorReason.KV_CACHE_FULL, ErrorReason.QUEUE_FULL})
_UNREACHABLE = frozenset({
    ErrorReason.NO_WORKER,
    ErrorReason.STALLED,
    ErrorReason.WORKER_DRAINING,
    ErrorReason.INTERNAL,
})
"""Others should not be sent there either, for a moment."""
_OTHER_PAIR = frozenset({
    ErrorReason.REQUEST_NOT_FOUND,
    ErrorReason.KV_LAYOUT_MISMATCH,
    ErrorReason.INTERNAL,
})
"""Another worker may help; a caller's retry would not, so RETRY_ELSEWHERE lacks these."""
_MAX_INTERNAL = 2
"""A request that fails this often for internal errors may cause them: no further worker gets it."""
_FIRST_BACKOFF_S = 0.05
_MAX_BACKOFF_S = 1.0


class AttemptFailed(Exception):
    """One attempt ended without ending the request."""

    def __init__(self, stage: str, worker_id: str, error: BatonError) -> None:
        super().__init__(f"{stage} at {worker_id}: {error.message}")
        self.stage = stage
        """reserve, prefill, decode or embed."""
        self.worker_id = worker_id
        """The worker blamed for the failure."""
        self.error = error

    @property
    def is_unreachable(self) -> bool:
        """True when the worker itself is in doubt, not only this request there."""
        return self.error.reason in _UNREACHABLE


class Verdict(Enum):
    """What follows a failed attempt."""

    TRY_NEXT = "try_next"
    """At once: the worker had no room, another may have."""
    RETRY = "retry"
    GIVE_UP = "give_up"


class Failover:
    """One request's failures so far."""

    def __init__(self, max_attempts: int, rng: Random) -> None:
        self._max_attempts = max_attempts
        self._rng = rng
        self._failed: set[str] = set()
        self._unreachable: set[str] = set()
        self._full: set[str] = set()
        self._num_internal = 0
        self._room_by_s: float | None = None
        self.num_failures = 0
        """Not counting refusals for lack of room: the only count of attempts that were spent."""

    @property
    def excluded(self) -> frozenset[str]:
        """Workers to avoid while there are others."""
        return frozenset(self._failed | self._full)

    @property
    def unreachable(self) -> frozenset[str]:
        """Those of them that may be down: going back there gains nothing."""
        return frozenset(self._unreachable)

    def judge(self, failure: AttemptFailed) -> Verdict:
        """Takes a failure into account."""
        reason = failure.error.reason
        if reason in _FULL and failure.worker_id not in self._full:
            self._full.add(failure.worker_id)
            return Verdict.TRY_NEXT
        self._failed.add(failure.worker_id)
        if failure.is_unreachable:
            self._unreachable.add(failure.worker_id)
        self.num_failures += 1
        self._num_internal += reason is ErrorReason.INTERNAL
        is_retryable = reason in RETRY_ELSEWHERE or reason in _OTHER_PAIR
        is_spent = self.num_failures >= self._max_attempts or self._num_internal >= _MAX_INTERNAL
        return Verdict.RETRY if is_retryable and not is_spent else Verdict.GIVE_UP

    def room_wait_s(self, limit_s: float, now: float) -> float:
        """Time left of `limit_s`, a bound on all waits together; then no worker counts as full."""
        self._full.clear()
        if self._room_by_s is None:
            self._room_by_s = now + limit_s
        return max(0.0, self._room_by_s - now)

    def backoff_s(self) -> float:
        """Time to wait before the next attempt: doubling, with jitter, bounded."""
        base_s = min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * float(2 ** (self.num_failures - 1)))
        return base_s * self._rng.uniform(0.5, 1.0)


_POLL_S = 0.05


class Placer:
    """Places attempts. Changes no request."""

    def __init__(self, cluster: ClusterWatch, settings: SchedulerSettings, clock: Clock) -> None:
        self._cluster = cluster
        self._settings = settings
        self._clock = clock
        self._ordinal = 0

    async def place(
        self, live: LiveRequest, failover: Failover, origin: LiveRequest | None = None
    ) -> Placement:
        """Workers for the next attempt: beside `origin` if that has the prompt's KV.

        Raises:
            NoWorker: none appeared within `worker_wait_s`.
            KvLayoutMismatch: all that are there would go on with another text.
        """
        give_up_s = self._clock.now() + self._settings.worker_wait_s
        job = self._job(live, failover)
        while True:
            now = self._clock.now()
            view = self._cluster.view()
            if origin is not None and origin.asked.prompt_ids == live.asked.prompt_ids:
                beside = place_beside(view, origin.prompt_kv.worker_id, job, now)
                if beside is not None:
                    return beside
            try:
                return place(view, job, self._settings.placement_rules, now)
            except NoWorker as error:
                if now >= give_up_s:
                    raise self._unplaceable(live, error) from error
            await self._clock.sleep(_POLL_S)

    async def wait_for_worker(self, live: LiveRequest, failover: Failover) -> None:
        """Returns when a worker is there that is not in doubt, or after a bounded time."""
        wait_s = min(self._settings.worker_wait_s, live.remaining_s())
        give_up_s = self._clock.now() + wait_s
        while self._clock.now() < give_up_s:
            if self._cluster.has_healthy_decode(live.asked.model, failover.unreachable):
                return
            await self._clock.sleep(_POLL_S)

    def _job(self, live: LiveRequest, failover: Failover) -> PlacementJob:
        asked = live.asked
        token_ids = (*asked.prompt_ids, *live.output.ids)
        self._ordinal += 1
        return PlacementJob(
            model=asked.model,
            num_tokens=len(token_ids),
            ordinal=self._ordinal,
            cached_blocks=self._cluster.cached_blocks(
                asked.model, token_ids, asked.job.cache_salt, live.block_hashes
            ),
            loads=self._cluster.loads(),
            excluded=failover.excluded,
            digest=live.output.pinned_digest,
        )

    def _unplaceable(self, live: LiveRequest, error: NoWorker) -> BatonError:
        """Why there is no worker: perhaps those that are there would go on with another text."""
        model = live.asked.model
        if live.output.pinned_digest and self._cluster.num_workers(Role.DECODE, model):
            return KvLayoutMismatch(
                f"the workers that began this answer are gone, and those of model {model!r}"
                " that are ready compute something else; send the request anew, without `resume`"
            )
        return error
