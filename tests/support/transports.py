"""Every way that KV may take, as values of the setting `kv_transports`."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

os.environ.setdefault("UCX_NET_DEVICES", "lo")  # NIXL's network: nothing leaves this machine

NIXL = pytest.param(
    "nixl,grpc",
    id="nixl",
    marks=pytest.mark.skipif(
        not any(map(find_spec, ("nixl", "nixl_cu12", "nixl_cu13"))),
        reason="NIXL is not installed: pip install nixl-cu12",
    ),
)
TRANSPORTS = [pytest.param("grpc", id="grpc"), pytest.param("shm,grpc", id="shm"), NIXL]
