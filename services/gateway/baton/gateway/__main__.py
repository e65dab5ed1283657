"""Runs the gateway: `python -m baton.gateway --http-port 8000`."""

from __future__ import annotations

from baton.gateway.service import GatewayService
from baton.gateway.settings import GatewaySettings
from baton.rpc.process import main

if __name__ == "__main__":
    main(GatewaySettings, GatewayService)
