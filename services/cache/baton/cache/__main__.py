"""Runs the cache service: `python -m baton.cache`."""

from __future__ import annotations

import sys

from baton.cache.service import CacheService
from baton.cache.settings import CacheSettings
from baton.rpc.process import main

if __name__ == "__main__":
    sys.exit(main(CacheSettings, CacheService))
