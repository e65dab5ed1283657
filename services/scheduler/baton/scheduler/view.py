"""What the scheduler knows of the cluster: members, who caches what, what was placed where.

The workers of one model must compute the same: if they differed, the text of a request that fails
over would change in the middle.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import count

from baton.core.clock import Clock
from baton.core.cluster import ClusterView, Member, ServiceState, ServiceStatus
from baton.core.errors import InvalidRequest, ModelNotFound, NoWorker
from baton.core.hashing import BlockHashes, Fingerprint
from baton.core.placement import Load, Placement
from baton.core.prefix_index import PrefixIndex
from baton.core.roles import Role
from baton.rpc.membership import MembershipView

logger = logging.getLogger(__name__)


class Compatibility:
    """Refuses workers that differ from the decode worker that served their model first."""

    def __init__(self) -> None:
        self._references: dict[str, Fingerprint] = {}
        """By model; kept while a decode worker equals it."""
        self._refused: dict[str, Member] = {}
        self._seen = ClusterView()
        self._admitted = self._seen

    def admitted(self, view: ClusterView) -> ClusterView:
        """The view without refused workers. Cheap while the view is the same object."""
        if view is not self._seen:
            self._seen = view
            self._choose_references(view)
            refused = {member.worker_id: member for member in view if self._differences(member)}
            for worker_id in refused.keys() - self._refused.keys():
                self._report(refused[worker_id])
            self._refused = refused
            admitted = {m.worker_id: m for m in view if m.worker_id not in refused}
            self._admitted = ClusterView(admitted) if refused else view
        return self._admitted

    def num_refused(self) -> Mapping[str, int]:
        """Refused workers by role."""
        return Counter(member.status.role for member in self._refused.values())

    def _choose_references(self, view: ClusterView) -> None:
        serving: dict[str, list[Fingerprint]] = {}
        for member in sorted(view, key=lambda m: (-m.status.uptime_s, m.worker_id)):
            status = member.status
            is_serving = status.role == Role.DECODE and status.state is ServiceState.READY
            if is_serving and status.fingerprint is not None:
                serving.setdefault(status.model, []).append(status.fingerprint)
        self._references = {
            model: known
            if (known := self._references.get(model)) in found and known is not None
            else found[0]
            for model, found in serving.items()
        }

    def _differences(self, member: Member) -> list[str]:
        status = member.status
        reference = self._references.get(status.model)
        is_worker = status.role in {Role.DECODE, Role.PREFILL}
        if reference is None or status.fingerprint is None or not is_worker:
            return []
        return reference.differences(status.fingerprint)

    def _report(self, member: Member) -> None:
        logger.error(
            "worker refused: it does not compute what the model's other workers do",
            extra={
                "worker": member.worker_id,
                "address": member.status.address,
                "model": member.status.model,
                "differences": "; ".join(self._differences(member)),
            },
        )


_DEFAULT_PLACES = 64
_RETRY_AFTER_S = 1.0


class ClusterWatch:
    """Answers the scheduler's questions about the cluster."""

    def __init__(
        self,
        members: MembershipView,
        index: PrefixIndex,
        clock: Clock,
        *,
        own_id: str = "",
    ) -> None:
        """`own_id` is this scheduler's worker id."""
        self._members = members
        self._own_id = own_id
        self._index = index
        self._clock = clock
        self._compatibility = Compatibility()
        self._loads: dict[str, Load] = {}
        self._turns = count()
        members.on_change(lambda _: self.view())  # so that a worker is refused when it joins

    def view(self) -> ClusterView:
        """The members now, but for workers that compute something else than their model's."""
        return self._compatibility.admitted(self._members.view())

    def num_refused(self) -> Mapping[str, int]:
        """Workers that are left out of the view, by role. May be called from any thread."""
        return self._compatibility.num_refused()

    def statuses(self) -> list[ServiceStatus]:
        """Every process, those included that were lost lately; speeds are among the stats."""
        lost = [replace(m.status, state=ServiceState.LOST) for m in self._members.lost()]
        return lost + [
            replace(member.status, stats={**member.status.stats, **_speeds(member)})
            for member in self._members.view()
        ]

    def suspect(self, worker_id: str) -> None:
        """Says that a worker could not be reached."""
        self._members.suspect(worker_id)

    def suspect_address(self, address: str) -> None:
        """As `suspect`, for the worker at an address."""
        for member in self.view():
            if member.status.address == address:
                self.suspect(member.worker_id)

    def models(self) -> list[str]:
        """Models that some decode worker serves, sorted."""
        return sorted({member.status.model for member in self._ready(Role.DECODE)})

    def resolve_model(self, name: str) -> str:
        """The model meant: the only one served when none is named.

        Raises:
            NoWorker: no decode worker is ready at all.
            ModelNotFound: others are served, but not this one.
            InvalidRequest: none is named and several are served.
        """
        models = self.models()
        if not models:
            raise NoWorker(
                "no decode worker is ready; start one or retry", retry_after_s=_RETRY_AFTER_S
            )
        served = ", ".join(repr(model) for model in models)
        if name in models:
            return name
        if name:
            raise ModelNotFound(f"model {name!r} is not served here; served: {served}")
        if len(models) > 1:
            raise InvalidRequest(f"name one of the models: {served}")
        return models[0]

    def max_model_len_tokens(self, model: str) -> int:
        """Most tokens of prompt and output together, 0 when no worker says."""
        limits = [member.status.max_model_len_tokens for member in self._ready(Role.DECODE, model)]
        return min((limit for limit in limits if limit > 0), default=0)

    def num_places(self, model: str) -> int:
        """This scheduler's share of the requests that the model's decode workers run at once.

        The schedulers do not know each other's requests: each admits an equal part of what the
        workers announce. At least 1, so that a request finds out by itself that there is no worker.
        """
        places = sum(
            member.rates.max_num_seqs or _DEFAULT_PLACES
            for member in self._ready(Role.DECODE, model)
        )
        return max(1, places // self._num_schedulers())

    def has_queue(self, worker_id: str) -> bool:
        """True when a worker announces more requests than it has places."""
        member = self._members.view().get(worker_id)
        if member is None:
            return False
        status = member.status
        num_requests = status.num_requests_running + status.num_requests_waiting
        return 0 < member.rates.max_num_seqs < num_requests

    def _num_schedulers(self) -> int:
        """Live ones, this one included. One that drains still has its requests at the workers."""
        return 1 + sum(
            member.status.role == Role.SCHEDULER
            and member.status.state in {ServiceState.READY, ServiceState.DRAINING}
            and member.worker_id != self._own_id
            for member in self._members.view()
        )

    def num_workers(self, role: str, model: str) -> int:
        """Healthy workers."""
        return len(self.view().usable(role, self._clock.now(), model=model))

    def has_healthy_decode(self, model: str, excluded: frozenset[str]) -> bool:
        """True when a worker that has not failed the request could take it."""
        usable = self.view().usable(Role.DECODE, self._clock.now(), model=model)
        return any(member.worker_id not in excluded for member in usable)

    def tokenizer(self, model: str, avoid: frozenset[str] = frozenset()) -> Member:
        """A tokenizer that knows the model; healthy, and not to be avoided, if possible.

        Equals take turns.

        Raises:
            NoWorker: there is none.
        """
        ready = [
            member
            for member in self._ready(Role.TOKENIZER)
            if not model or model in member.status.models
        ]
        if not ready:
            raise NoWorker(
                "no tokenizer is ready; start one or retry", retry_after_s=_RETRY_AFTER_S
            )
        now = self._clock.now()
        fresh = [member for member in ready if member.status.address not in avoid]
        best = [member for member in fresh if member.is_usable(now)] or fresh or ready
        return best[next(self._turns) % len(best)]

    def cached_blocks(
        self,
        model: str,
        token_ids: Sequence[int],
        cache_salt: str,
        hashed: BlockHashes | None = None,
    ) -> Mapping[str, int]:
        """Leading blocks of a prompt per worker id, as far as KV events say.

        `hashed` keeps the request's hashes: a further attempt hashes only what came since.
        """
        found: dict[str, int] = {}
        hashed = hashed or BlockHashes()
        for digest, fingerprint in self._fingerprints(model).items():
            hashes = hashed.of(digest, cache_salt, token_ids, fingerprint.layout.block_size)
            for worker_id, num_blocks in self._index.match(hashes).items():
                found[worker_id] = max(num_blocks, found.get(worker_id, 0))
        return found

    def loads(self) -> Mapping[str, Load]:
        """What this scheduler has placed where."""
        return self._loads

    @contextmanager
    def placed(self, placement: Placement, num_tokens: int) -> Iterator[Callable[[], None]]:
        """Counts an attempt as its workers' load within.

        The caller calls what this yields when the prompt is computed.
        """
        prefill_id = (placement.prefill or placement.decode).worker_id
        uncached = max(0, num_tokens - placement.prefill_cached_tokens)
        num_prefills = 0 if placement.is_local else 1
        is_prefilled = False

        def prefilled() -> None:
            nonlocal is_prefilled
            if not is_prefilled:
                is_prefilled = True
                self._add_load(prefill_id, -num_prefills, -uncached)

        self._add_load(placement.decode.worker_id, 1, 0)
        self._add_load(prefill_id, num_prefills, uncached)
        try:
            yield prefilled
        finally:
            prefilled()
            self._add_load(placement.decode.worker_id, -1, 0)

    @contextmanager
    def prefilling(self, worker_id: str, num_tokens: int) -> Iterator[None]:
        """Counts a prompt that is only computed as a worker's load within."""
        self._add_load(worker_id, 1, num_tokens)
        try:
            yield
        finally:
            self._add_load(worker_id, -1, -num_tokens)

    def _add_load(self, worker_id: str, requests: int, tokens: int) -> None:
        old = self._loads.get(worker_id, Load())
        new = Load(old.num_requests + requests, old.prefill_tokens + tokens)
        if new == Load():
            self._loads.pop(worker_id, None)
        else:
            self._loads[worker_id] = new

    def _ready(self, role: str, model: str = "") -> list[Member]:
        return [
            member
            for member in self.view()
            if member.status.role == role
            and member.status.state is ServiceState.READY
            and (not model or member.status.model == model)
        ]

    def fingerprint(self, model: str) -> Fingerprint | None:
        """What the model's workers compute with; None where they differ, or none is ready."""
        found = list(self._fingerprints(model).values())
        return found[0] if len(found) == 1 else None

    def _fingerprints(self, model: str) -> Mapping[bytes, Fingerprint]:
        """By digest."""
        members = [*self._ready(Role.DECODE, model), *self._ready(Role.PREFILL, model)]
        found = [m.status.fingerprint for m in members if m.status.fingerprint is not None]
        return {fingerprint.digest(): fingerprint for fingerprint in found}


def _speeds(member: Member) -> dict[str, float]:
    return {name: float(value) for name, value in asdict(member.rates).items() if value}
