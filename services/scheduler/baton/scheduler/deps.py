"""What requests need to run, made once per process."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from baton.core.clock import Clock
from baton.scheduler.answers import Answers
from baton.scheduler.encoder import Encoder
from baton.scheduler.leases import Leases
from baton.scheduler.peers import Peers
from baton.scheduler.releases import Releases
from baton.scheduler.scheduler_metrics import SchedulerMetrics
from baton.scheduler.settings import SchedulerSettings
from baton.scheduler.stage_spans import StageSpans
from baton.scheduler.text import TextRelay
from baton.scheduler.view import ClusterWatch


@dataclass(frozen=True, slots=True)
class SchedulerDeps:
    """Collaborators of the orchestrator and of every attempt."""

    settings: SchedulerSettings
    cluster: ClusterWatch
    peers: Peers
    encoder: Encoder
    text: TextRelay
    answers: Answers
    releases: Releases
    leases: Leases
    spans: StageSpans
    metrics: SchedulerMetrics
    clock: Clock
    rng: Random
