"""What one process says about itself, and what an observer knows about all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from types import MappingProxyType

from baton.core.hashing import Fingerprint

_NO_COUNTS: Mapping[str, int] = MappingProxyType({})
_NO_STATS: Mapping[str, float] = MappingProxyType({})


class ServiceState(Enum):
    """A process's state as seen by others; the value is the wire's text."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class WorkerRates:
    """Measured speeds of a worker; 0 means not known yet."""

    prefill_tokens_per_s: float = 0.0
    decode_step_s: float = 0.0
    """Per decode step at the present batch."""
    queued_prefill_tokens: int = 0
    """Prompt tokens waiting or being computed."""
    push_bytes_per_s: float = 0.0
    max_num_seqs: int = 0


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """State and load of one process. Mirrors baton.v1.ServiceStatus."""

    worker_id: str
    """Unique per boot: a process that restarts at the same address gets another one."""
    role: str
    address: str
    """gRPC, host:port."""
    state: ServiceState = ServiceState.STARTING
    model: str = ""
    """The model that a worker computes; of a tokenizer, all of `models` in one text."""
    models: tuple[str, ...] = ()
    """All models that a tokenizer knows."""
    max_model_len_tokens: int = 0
    """Most tokens of prompt and output together; 0 for a process without a model."""
    fingerprint: Fingerprint | None = None
    kv_blocks: Mapping[str, int] = field(default_factory=lambda: _NO_COUNTS)
    """Blocks by lower-case state name."""
    num_requests_running: int = 0
    num_requests_waiting: int = 0
    uptime_s: float = 0.0
    pid: int = 0
    metrics_address: str = ""
    stats: Mapping[str, float] = field(default_factory=lambda: _NO_STATS)
    version: str = ""
    cores: tuple[int, ...] = ()
    store_id: str = ""
    """Names what a cache replica keeps on disk: the same after a restart."""


@dataclass(frozen=True, slots=True)
class Announcement:
    """A lease on being a member."""

    status: ServiceStatus
    lease_s: float
    rates: WorkerRates = field(default=WorkerRates())
    leaving: bool = False


@dataclass(frozen=True, slots=True)
class Member:
    """A process as an observer knows it."""

    status: ServiceStatus
    rates: WorkerRates
    lease_ends_at_s: float
    """On the observer's monotonic clock."""
    suspect_until_s: float = 0.0
    """Until then nothing new is placed here (a call to it failed)."""

    @property
    def worker_id(self) -> str:
        """Id of the process."""
        return self.status.worker_id

    def is_usable(self, now: float) -> bool:
        """Ready, not suspected. Lease expiry is the owner's decision."""
        return self.status.state is ServiceState.READY and now >= self.suspect_until_s


@dataclass(frozen=True, slots=True)
class ClusterView:
    """An immutable snapshot of the members; every change makes a new one."""

    members: Mapping[str, Member] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members.values())

    def get(self, worker_id: str) -> Member | None:
        """The member with that id."""
        return self.members.get(worker_id)

    def usable(self, role: str, now: float, *, model: str = "") -> list[Member]:
        """Usable members of a role (and model, if named), in a stable order."""
        found = [
            member
            for member in self
            if member.status.role == role
            and member.is_usable(now)
            and (not model or member.status.model == model)
        ]
        return sorted(found, key=lambda member: member.worker_id)

    def announced(self, announcement: Announcement, now: float) -> ClusterView:
        """The view after an announcement was received."""
        status = announcement.status
        if announcement.leaving:
            return self.without(status.worker_id)
        old = self.get(status.worker_id)
        suspect_until_s = old.suspect_until_s if old else 0.0
        lease_ends_at_s = now + announcement.lease_s
        member = Member(status, announcement.rates, lease_ends_at_s, suspect_until_s)
        return ClusterView({**self.members, status.worker_id: member})

    def suspected(self, worker_id: str, until_s: float) -> ClusterView:
        """The view after a call to a member failed."""
        member = self.members.get(worker_id)
        if member is None:
            return self
        return ClusterView({**self.members, worker_id: replace(member, suspect_until_s=until_s)})

    def without(self, worker_id: str) -> ClusterView:
        """The view without a member."""
        return ClusterView({key: value for key, value in self.members.items() if key != worker_id})
