"""Runs the scheduler: `python -m baton.scheduler`."""

from __future__ import annotations

from baton.rpc.process import main
from baton.scheduler.service import SchedulerService
from baton.scheduler.settings import SchedulerSettings

if __name__ == "__main__":
    main(SchedulerSettings, SchedulerService)
