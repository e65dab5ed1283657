"""Where a request runs: the decode worker first, then a prefill worker or the decode worker itself.

Pure functions over a ClusterView. A cost is a predicted time in seconds, as far as the workers'
measured speeds are known; unknown speeds take cautious defaults that are equal for all workers, so
that the order of candidates still follows their load.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from baton.core.cluster import ClusterView, Member, ServiceState
from baton.core.errors import NoWorker
from baton.core.roles import Role

NO_WORKER_RETRY_AFTER_S = 1.0
SHARED_PROMPT = "shared_prompt"
"""Reason of a placement beside another request with the same prompt."""
_DEFAULT_PREFILL_TOKENS_PER_S = 2000.0
_DEFAULT_PUSH_BYTES_PER_S = 500e6
_DEFAULT_DECODE_STEP_S = 0.03
_DEFAULT_MAX_NUM_SEQS = 64
_NO_BLOCKS: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Load:
    """What this scheduler itself has placed on a worker and not yet seen end."""

    num_requests: int = 0
    prefill_tokens: int = 0
    """Prompt tokens on their way to being computed."""


_NO_LOADS: Mapping[str, Load] = MappingProxyType({})
_IDLE = Load()


@dataclass(frozen=True, slots=True)
class PlacementJob:
    """What placement needs to know about a request."""

    model: str
    num_tokens: int
    """Prompt tokens, and after a fail-over also those produced so far."""
    ordinal: int
    """Counts placements; turns round robin and breaks ties."""
    cached_blocks: Mapping[str, int] = field(default_factory=lambda: _NO_BLOCKS)
    """Leading blocks of the prompt per worker id."""
    loads: Mapping[str, Load] = field(default_factory=lambda: _NO_LOADS)
    """Per worker id; announcements are up to a second old, these are not."""
    excluded: frozenset[str] = frozenset()
    """Workers that failed this request; placed on only when no other worker is left."""
    digest: bytes = b""
    """Fingerprint of what computed the output so far: others would go on with another text. Empty
    before there is any output."""


@dataclass(frozen=True, slots=True)
class PlacementRules:
    """Settings of placement."""

    policy: str = "slo"
    """One of POLICIES."""
    local_prefill_max_tokens: int = 32
    """An uncached suffix shorter than this is computed by the decode worker."""
    force_disaggregation: bool = False
    """Never compute a prompt at the decode worker while there is any prefill worker."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The decision, and why."""

    decode: Member
    prefill: Member | None
    """None when the decode worker computes the prompt itself."""
    reason: str
    """shared_prompt, short_suffix, no_prefill_worker, local_predicted_faster, forced, or the
    policy's reason."""
    num_candidates: int
    decode_cached_tokens: int
    prefill_cached_tokens: int
    predicted_ttft_s: float

    @property
    def is_local(self) -> bool:
        """True when the decode worker computes the prompt."""
        return self.prefill is None

    @property
    def decision(self) -> str:
        """Name for metrics and spans: local or disaggregated."""
        return "local" if self.is_local else "disaggregated"


Score = Callable[[Member, PlacementJob], float]
"""Lower is better."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How candidates are compared."""

    decode_score: Score
    prefill_score: Score
    reason: str
    """Short name of why a pair won."""
    is_rotating: bool = False
    """Ignore the scores and take turns."""


def place(view: ClusterView, job: PlacementJob, rules: PlacementRules, now: float) -> Placement:
    """Chooses the workers of one attempt.

    Raises:
        NoWorker: no decode worker of the model is up.
    """
    policy = POLICIES[rules.policy]
    decodes = candidates(view, Role.DECODE, job, now)
    if not decodes:
        raise NoWorker(
            f"no decode worker for model {job.model!r} is ready; start one or retry",
            retry_after_s=NO_WORKER_RETRY_AFTER_S,
        )
    decode = _best(decodes, job, policy.decode_score, is_rotating=policy.is_rotating)
    prefills = _prefill_candidates(view, decode, job, rules, now)
    num_candidates = len(decodes) + len(prefills)
    decode_cached = _cached_tokens(decode, job)
    local_s = predicted_local_s(decode, job)
    local = Placement(
        decode, None, "no_prefill_worker", num_candidates, decode_cached, decode_cached, local_s
    )
    if not prefills:
        return local
    prefill = _best(prefills, job, policy.prefill_score, is_rotating=policy.is_rotating)
    remote_s = predicted_prefill_s(prefill, job) + predicted_transfer_s(prefill, decode, job)
    reason = _reason_for_local(decode, job, rules, local_s, remote_s)
    if reason is not None:
        return replace(local, reason=reason)
    return Placement(
        decode,
        prefill,
        "forced" if rules.force_disaggregation else policy.reason,
        num_candidates,
        decode_cached,
        _cached_tokens(prefill, job),
        remote_s,
    )


def place_beside(
    view: ClusterView, worker_id: str, job: PlacementJob, now: float
) -> Placement | None:
    """At the decode worker that has the prompt's KV, of another request; None if it is not usable.

    Only the prompt's last token is left to compute.
    """
    decode = view.get(worker_id)
    if decode is None or worker_id in job.excluded or not decode.is_usable(now):
        return None
    if not _computes(decode, job.digest):
        return None
    num_cached = job.num_tokens - 1
    predicted_s = decode.rates.decode_step_s or _DEFAULT_DECODE_STEP_S
    return Placement(decode, None, SHARED_PROMPT, 1, num_cached, num_cached, predicted_s)


def candidates(view: ClusterView, role: str, job: PlacementJob, now: float) -> list[Member]:
    """Members that may take the job, best group first.

    The groups: healthy and not excluded; suspected and not excluded; ready at all. So a lone
    worker is tried again rather than the request failed.
    """
    ready = [
        member
        for member in sorted(view, key=lambda member: member.worker_id)
        if member.status.role == role
        and member.status.model == job.model
        and member.status.state is ServiceState.READY
        and _computes(member, job.digest)
    ]
    fresh = [member for member in ready if member.worker_id not in job.excluded]
    healthy = [member for member in fresh if member.is_usable(now)]
    return healthy or fresh or ready


def _computes(member: Member, digest: bytes) -> bool:
    """False when a worker computes something else than what is asked for."""
    fingerprint = member.status.fingerprint
    return not digest or fingerprint is None or fingerprint.digest() == digest


def _prefill_candidates(
    view: ClusterView, decode: Member, job: PlacementJob, rules: PlacementRules, now: float
) -> list[Member]:
    """Prefill workers whose KV the decode worker can use; those that failed are left out."""
    found = [
        member
        for member in candidates(view, Role.PREFILL, job, now)
        if can_exchange_kv(member, decode)
    ]
    if rules.force_disaggregation:
        return found
    return [
        member for member in found if member.is_usable(now) and member.worker_id not in job.excluded
    ]


def can_exchange_kv(prefill: Member, decode: Member) -> bool:
    """False when both say what they compute with and it differs."""
    theirs, ours = prefill.status.fingerprint, decode.status.fingerprint
    return theirs is None or ours is None or not theirs.differences(ours)


def _reason_for_local(
    decode: Member, job: PlacementJob, rules: PlacementRules, local_s: float, remote_s: float
) -> str | None:
    if rules.force_disaggregation:
        return None
    if _uncached_tokens(decode, job) < rules.local_prefill_max_tokens:
        return "short_suffix"
    if decode.rates.prefill_tokens_per_s > 0 and local_s < remote_s:
        return "local_predicted_faster"
    return None


def _best(
    members: Sequence[Member], job: PlacementJob, score: Score, *, is_rotating: bool
) -> Member:
    first = job.ordinal % len(members)
    in_turn = [*members[first:], *members[:first]]
    # min() keeps the first of equals, so equals take turns.
    return in_turn[0] if is_rotating else min(in_turn, key=lambda member: score(member, job))


def num_requests(member: Member, job: PlacementJob) -> int:
    """Requests at a worker: announced, or known to be on their way, whichever is more."""
    status = member.status
    own = job.loads.get(member.worker_id, _IDLE).num_requests
    return max(own, status.num_requests_running + status.num_requests_waiting)


def queued_tokens(member: Member, job: PlacementJob) -> int:
    """Prompt tokens waiting at a worker."""
    own = job.loads.get(member.worker_id, _IDLE).prefill_tokens
    return max(own, member.rates.queued_prefill_tokens)


def predicted_prefill_s(member: Member, job: PlacementJob) -> float:
    """Until a worker has computed the prompt: its queue, then the uncached suffix."""
    rate = member.rates.prefill_tokens_per_s or _DEFAULT_PREFILL_TOKENS_PER_S
    return (queued_tokens(member, job) + _uncached_tokens(member, job)) / rate


def predicted_local_s(decode: Member, job: PlacementJob) -> float:
    """As `predicted_prefill_s`, and what it costs each sequence that runs there meanwhile."""
    num_delayed = num_requests(decode, job)
    return predicted_prefill_s(decode, job) * (1 + num_delayed)


def predicted_transfer_s(prefill: Member, decode: Member, job: PlacementJob) -> float:
    """Until the KV that the decode worker lacks has been sent, as if nothing overlapped."""
    return _missing_bytes(decode, job) / (
        prefill.rates.push_bytes_per_s or _DEFAULT_PUSH_BYTES_PER_S
    )


def _missing_bytes(decode: Member, job: PlacementJob) -> float:
    """KV of the uncached suffix; 0 while the worker's layout is not known."""
    fingerprint = decode.status.fingerprint
    if fingerprint is None:
        return 0.0
    layout = fingerprint.layout
    return _uncached_tokens(decode, job) * layout.block_bytes / layout.block_size


def _decode_slo_score(member: Member, job: PlacementJob) -> float:
    """Seconds per token with one more sequence, a wait where there is no room, and the transfer."""
    step_s = member.rates.decode_step_s or _DEFAULT_DECODE_STEP_S
    most = member.rates.max_num_seqs or _DEFAULT_MAX_NUM_SEQS
    load = num_requests(member, job)
    transfer_s = _missing_bytes(member, job) / _DEFAULT_PUSH_BYTES_PER_S
    wait_s = 1.0 if _uncached_tokens(member, job) > _usable_tokens(member) else 0.0
    if load >= most:
        wait_s += step_s * (load - most + 1) * 32
    return step_s * (1 + load / most) + transfer_s + wait_s


def _usable_tokens(member: Member) -> float:
    """Room for a reservation; infinite if the worker does not report its blocks."""
    kv_blocks = member.status.kv_blocks
    if not kv_blocks or not _block_size(member):
        return math.inf
    return (kv_blocks.get("free", 0) + kv_blocks.get("cached", 0)) * _block_size(member)


def _prefix_first(load: Score) -> Score:
    return lambda member, job: (
        _uncached_tokens(member, job) + load(member, job) * job.num_tokens / 4
    )


def _block_size(member: Member) -> int:
    fingerprint = member.status.fingerprint
    return fingerprint.layout.block_size if fingerprint else 0


def _cached_tokens(member: Member, job: PlacementJob) -> int:
    """Leading tokens in a worker's prefix cache; the last one is always computed."""
    cached = job.cached_blocks.get(member.worker_id, 0) * _block_size(member)
    return max(0, min(cached, job.num_tokens - 1))


def _uncached_tokens(member: Member, job: PlacementJob) -> int:
    return job.num_tokens - _cached_tokens(member, job)


def _queue_first(member: Member, job: PlacementJob) -> float:
    return float(queued_tokens(member, job) + num_requests(member, job))


POLICIES: Mapping[str, Policy] = MappingProxyType({
    "round_robin": Policy(num_requests, num_requests, "next_in_turn", is_rotating=True),
    "least_loaded": Policy(num_requests, _queue_first, "least_loaded"),
    "prefix_aware": Policy(
        _prefix_first(num_requests), _prefix_first(num_requests), "longest_prefix"
    ),
    "slo": Policy(_decode_slo_score, predicted_prefill_s, "lowest_ttft"),
})
"""By the name used in settings."""
