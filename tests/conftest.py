"""Settings that every test needs, made before anything heavy is imported."""

from __future__ import annotations

import os
import signal
from collections import Counter

import pytest
from hypothesis import settings

# A slow machine is no failure.
settings.register_profile("baton", deadline=None)
settings.load_profile("baton")

# One thread per process: the fast tests run two at a time, the slow ones start many processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A test that would download fails at once instead.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# What a shell starts in the background ignores Ctrl-C, and so would all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure(config: pytest.Config) -> None:
    """The last line of `make test-long`: what ran, for a closing note to quote."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if config.option.markexpr != "long" or reporter is None or hasattr(config, "workerinput"):
        return
    counts = {kind: len(reporter.stats.get(kind, [])) for kind in ("passed", "failed", "error")}
    skipped = len(reporter.stats.get("skipped", []))
    ran = [report for kind in counts for report in reporter.stats.get(kind, [])]
    files = Counter(report.nodeid.partition("::")[0] for report in ran)
    listed = ", ".join(f"{name} ({num})" for name, num in sorted(files.items()))
    totals = ", ".join(f"{num} {kind}" for kind, num in counts.items() if num)
    reporter.write_line(f"long: {totals or 'nothing ran'}, {skipped} skipped: {listed}")
