"""A real gateway over HTTP in front of a fake scheduler."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import httpx
import openai
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from baton.core.cluster import ClusterView
from baton.gateway.app import Gateway, make_app
from baton.gateway.schedulers import Schedulers
from baton.gateway.server import HttpServer
from baton.gateway.settings import GatewaySettings
from baton.rpc.metrics import Metrics
from baton.rpc.telemetry import Telemetry
from tests.support.fake_inference import FakeInference, serve


class NoMembers:
    def view(self) -> ClusterView:
        return ClusterView()


@dataclass
class Edge:
    fake: FakeInference
    gateway: Gateway
    http: HttpServer
    url: str
    client: openai.AsyncOpenAI
    raw: httpx.AsyncClient
    spans: InMemorySpanExporter
    metrics: Metrics


@asynccontextmanager
async def running_gateway(**fields: Any) -> AsyncIterator[Edge]:
    """`fields` are settings of the gateway."""
    fake = FakeInference()
    server, address = await serve(fake)
    defaults = {
        "max_body_bytes": 20_000,
        "max_choices": 8,
        "ping_interval_s": 0.05,
        "request_timeout_s": 20,
    }
    settings = GatewaySettings(scheduler=address, http_port=0, **{**defaults, **fields})
    spans = InMemorySpanExporter()
    telemetry = Telemetry("gateway", "g1", processors=(SimpleSpanProcessor(spans),))
    metrics = Metrics("gateway", "g1", "0")
    schedulers = Schedulers(settings.scheduler, NoMembers(), 20.0)  # type: ignore[arg-type]
    gateway = Gateway(settings, schedulers, metrics)
    app = make_app(gateway, telemetry, metrics, Random(1))
    http = HttpServer(app, "127.0.0.1", 0, settings.max_connections)
    url = f"http://{await http.start()}"
    client = openai.AsyncOpenAI(
        base_url=f"{url}/v1",
        api_key="none",
        max_retries=0,
        timeout=10,
        http_client=openai.DefaultAsyncHttpxClient(verify=False),  # reading the roots takes 0.1 s
    )
    raw = httpx.AsyncClient(base_url=url, timeout=10, verify=False)
    try:
        yield Edge(fake, gateway, http, url, client, raw, spans, metrics)
    finally:
        await raw.aclose()
        await client.close()
        await http.stop()
        await schedulers.close()
        await server.stop(0)
        telemetry.shutdown()
