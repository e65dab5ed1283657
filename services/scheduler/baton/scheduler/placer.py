"""Chooses the workers of an attempt, and waits a while where there are none."""

from __future__ import annotations

from baton.core.clock import Clock
from baton.core.errors import BatonError, KvLayoutMismatch, NoWorker
from baton.core.placement import Placement, PlacementJob, place, place_beside
from baton.core.roles import Role
from baton.scheduler.failover import Failover
from baton.scheduler.live import LiveRequest
from baton.scheduler.settings import SchedulerSettings
from baton.scheduler.view import ClusterWatch

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
