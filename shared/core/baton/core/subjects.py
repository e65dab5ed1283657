"""NATS subjects: who publishes what where."""

from __future__ import annotations

MEMBERS = "baton.member"
MEMBER_QUERY = "baton.member-query"
KV_EVENTS = "baton.kv"


def kv_events_of(worker_id: str) -> str:
    """The subject on which a worker publishes changes of its prefix cache."""
    return f"{KV_EVENTS}.{worker_id}"


ALL_KV_EVENTS = f"{KV_EVENTS}.*"
"""Every worker's changes."""
