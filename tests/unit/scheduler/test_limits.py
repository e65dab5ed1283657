"""The limit on calls leaves room for the queue, for running requests, and for control calls."""

from __future__ import annotations

from baton.scheduler.settings import SchedulerSettings

RUNNING = 1024
"""Places of 16 workers with 64 each."""
MARGIN = 1024
"""Calls of other processes, and refusals under way."""


def test_a_full_queue_is_reached_before_the_limit_on_calls() -> None:
    settings = SchedulerSettings()
    assert settings.max_concurrent_rpcs >= settings.max_waiting_requests + RUNNING + MARGIN
