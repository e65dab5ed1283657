"""Settings that every test needs, made before anything heavy is imported."""

from __future__ import annotations

import os
import signal

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
