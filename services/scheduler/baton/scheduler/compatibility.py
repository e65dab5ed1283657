"""Which workers may serve a model together: those that compute the same.

Two models under one name would show in the middle of a text, when a request fails over.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping

from baton.core.cluster import ClusterView, Member, ServiceState
from baton.core.hashing import Fingerprint
from baton.core.roles import Role

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
