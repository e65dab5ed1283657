"""The gateway's routes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

import orjson
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from baton.client import AsyncClient, BatonError, InvalidRequest, ModelNotFound, QueueFull
from baton.gateway.console.routes import console_routes
from baton.gateway.edge import Edge
from baton.gateway.embeddings import EmbeddingsBody, embeddings_answer
from baton.gateway.failures import (
    HttpError,
    error_response,
    http_error_response,
    internal_error_response,
    json_response,
)
from baton.gateway.generation import Generation, Plan
from baton.gateway.message import for_sdk
from baton.gateway.openai import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, parse
from baton.gateway.openapi import document
from baton.gateway.render import ChatRenderer, CompletionRenderer, Head, Renderer, model_json
from baton.gateway.schedulers import Schedulers
from baton.gateway.settings import GatewaySettings
from baton.gateway.watch import GenerationMetrics, Watch
from baton.rpc.logs import log_failure
from baton.rpc.metrics import Metrics
from baton.rpc.telemetry import Telemetry
from baton.rpc.version import VERSION

logger = logging.getLogger(__name__)
Handler = Callable[[Request], Awaitable[ASGIApp]]
READY_TIMEOUT_S = 2.0
CALL_TIMEOUT_S = 30.0


class Gateway:
    """Handlers, and what they share."""

    def __init__(self, settings: GatewaySettings, schedulers: Schedulers, metrics: Metrics) -> None:
        self.is_draining = False
        self.num_running = 0
        self._settings = settings
        self._schedulers = schedulers
        self._metrics = metrics
        self._tenants = settings.make_tenants()
        self._created = int(time.time())
        self._generation_metrics = GenerationMetrics(metrics)

    def routes(self) -> list[Route]:
        """Paths and their handlers."""
        return [
            Route("/v1/completions", self._admitted(self.completions), methods=["POST"]),
            Route("/v1/chat/completions", self._admitted(self.chat_completions), methods=["POST"]),
            Route("/v1/embeddings", self._admitted(self.embeddings), methods=["POST"]),
            Route("/v1/models", self._admitted(self.models)),
            Route("/v1/models/{model:path}", self._admitted(self.model)),
            Route("/tokenize", self._admitted(self.tokenize), methods=["POST"]),
            Route("/detokenize", self._admitted(self.detokenize), methods=["POST"]),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/version", self.version),
            Route("/metrics", self.metrics),
            Route("/openapi.json", self.openapi),
        ]

    def console(self) -> list[Route]:
        """Paths of the console, where it is served."""
        if not self._settings.console:
            return []
        return console_routes(self._schedulers, lambda: self.is_draining, self._admitted)

    def middleware(self) -> list[Middleware]:
        """Lets pages of other origins call, where settings name any."""
        origins = self._settings.cors_origins
        told = ["x-request-id", "retry-after", "retry-after-ms"]
        cors = Middleware(
            CORSMiddleware, origins.split(","), allow_headers=["*"], expose_headers=told
        )
        return [cors] if origins else []

    async def completions(self, request: Request) -> ASGIApp:
        """POST /v1/completions."""
        body = parse(CompletionBody, await self._read_json(request))
        return await self._generation(request, body, CompletionRenderer(), "cmpl")

    async def chat_completions(self, request: Request) -> ASGIApp:
        """POST /v1/chat/completions."""
        body = parse(ChatBody, await self._read_json(request))
        renderer = ChatRenderer(body.tool_use().reader())
        return await self._generation(request, body, renderer, "chatcmpl")

    async def embeddings(self, request: Request) -> ASGIApp:
        """POST /v1/embeddings."""
        body = parse(EmbeddingsBody, await self._read_json(request))
        body.check()
        options = body.options()
        options["cache_salt"] = _salted(request, options["cache_salt"])
        options["request_id"] = request.state.generation_id
        options["timeout_s"] = self._settings.request_timeout_s
        return self._counted(embeddings_answer(await self._client(), body, options))

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        del request
        models = await (await self._client()).models(timeout_s=CALL_TIMEOUT_S)
        data = [model_json(model, self._created) for model in models]
        return json_response({"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{id}."""
        name = request.path_params["model"]
        for model in await (await self._client()).models(timeout_s=CALL_TIMEOUT_S):
            if model.name == name:
                return json_response(model_json(model, self._created))
        raise ModelNotFound("no such model is served here; see /v1/models")

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize."""
        body = parse(TokenizeBody, await self._read_json(request))
        messages = None
        if body.messages is not None:
            messages = for_sdk(body.messages)
        client = await self._client()
        tokens = await client.tokenize(
            body.prompt, messages=messages, model=body.model, timeout_s=CALL_TIMEOUT_S
        )
        return json_response({"count": len(tokens), "tokens": tokens})

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize."""
        body = parse(DetokenizeBody, await self._read_json(request))
        client = await self._client()
        text = await client.detokenize(body.tokens, model=body.model, timeout_s=CALL_TIMEOUT_S)
        return json_response({"prompt": text})

    async def health(self, request: Request) -> Response:
        """GET /health: the process answers."""
        del request
        return json_response({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """GET /ready: a generation sent now has somewhere to run."""
        del request
        try:
            models = await (await self._client()).models(timeout_s=READY_TIMEOUT_S)
        except BatonError as error:
            return json_response({"status": "not ready", "reason": error.message}, 503)
        served = [model.name for model in models if model.num_decode_workers]
        if self.is_draining or not served:
            reason = "draining" if self.is_draining else "no model has a decode worker yet"
            return json_response({"status": "not ready", "reason": reason}, 503)
        return json_response({"status": "ready", "models": served})

    async def version(self, request: Request) -> Response:
        """GET /version."""
        del request
        return json_response({"version": VERSION})

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        del request
        # In a thread, because gauges read at the scrape ask this event loop for their values.
        text = await asyncio.to_thread(generate_latest, self._metrics.registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    async def openapi(self, request: Request) -> Response:
        """GET /openapi.json."""
        del request
        return json_response(document())

    def _admitted(self, handler: Handler) -> Handler:
        """The handler, for those who have a key, as often as their tenant may call."""

        async def run(request: Request) -> ASGIApp:
            header = request.headers.get("authorization", "")
            request.state.tenant = self._tenants.admit(header, time.monotonic())
            return await handler(request)

        return run

    async def _client(self) -> AsyncClient:
        return await self._schedulers.client()

    async def _generation(
        self, request: Request, body: CompletionBody | ChatBody, renderer: Renderer, prefix: str
    ) -> ASGIApp:
        jobs = body.jobs()
        for job in jobs:
            job.options["cache_salt"] = _salted(request, job.options["cache_salt"])
        if len(jobs) > self._settings.max_choices:
            raise InvalidRequest(
                f"n times the number of prompts must be at most {self._settings.max_choices}, "
                f"got {len(jobs)}"
            )
        watch = Watch(self._generation_metrics, request.state.span, request.state.started_s)
        watch.starts(prefix, body.model, is_stream=body.is_stream)
        request_id = request.state.generation_id
        plan = Plan(
            request_id=request_id,
            jobs=jobs,
            renderer=renderer,
            head=Head(
                answer_id=f"{prefix}-{request_id}",
                created=int(time.time()),
                model=body.model,
                has_usage=body.is_stream and body.has_usage_chunk,
            ),
            is_stream=body.is_stream,
            outputs_per_prompt=body.n or 1,
            timeout_s=self._settings.request_timeout_s,
            ping_interval_s=self._settings.ping_interval_s,
        )
        return self._counted(Generation(await self._client(), plan, watch))

    def _counted(self, app: ASGIApp) -> ASGIApp:
        """Bounds how many generations run at once."""

        async def run(scope: Scope, receive: Receive, send: Send) -> None:
            limit = self._settings.max_concurrent_requests
            if self.num_running >= limit:
                error = QueueFull(f"{limit} requests are running", retry_after_s=1.0)
                await error_response(error)(scope, receive, send)
                return
            self.num_running += 1
            try:
                await app(scope, receive, send)
            finally:
                self.num_running -= 1

        return run

    async def _read_json(self, request: Request) -> Any:
        data = bytearray()
        limit = self._settings.max_body_bytes
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                async for part in request.stream():
                    data += part
                    if len(data) > limit:
                        raise HttpError(
                            413, f"the body is larger than {limit} bytes", "request_too_large"
                        )
        except TimeoutError as error:
            raise HttpError(408, "the body did not arrive in time", "request_timeout") from error
        try:
            body = orjson.loads(data)
            orjson.dumps(body)  # refuses what is nested deeper than anything else here can walk
        except orjson.JSONDecodeError as error:
            raise InvalidRequest(f"the body is not JSON: {error.msg}") from error
        except orjson.JSONEncodeError as error:
            raise InvalidRequest("the body is nested too deeply") from error
        return body


def _salted(request: Request, cache_salt: str) -> str:
    """KV is shared within a tenant only."""
    tenant = request.state.tenant
    return f"{tenant}:{cache_salt}" if tenant else cache_salt


def make_app(gateway: Gateway, telemetry: Telemetry, metrics: Metrics, rng: Random) -> ASGIApp:
    """The whole ASGI application."""
    app = Starlette(
        middleware=gateway.middleware(),
        routes=[*gateway.routes(), *gateway.console()],
        exception_handlers={
            BatonError: _on_baton_error,
            HttpError: _on_http_error,
            HTTPException: _on_starlette_error,
            ClientDisconnect: _on_disconnect,
            Exception: _on_defect,
        },
    )
    return Edge(app, telemetry, metrics, rng)


async def _on_baton_error(request: Request, error: Exception) -> Response:
    del request
    return error_response(error) if isinstance(error, BatonError) else internal_error_response()


async def _on_http_error(request: Request, error: Exception) -> Response:
    del request
    return http_error_response(error) if isinstance(error, HttpError) else internal_error_response()


async def _on_starlette_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    if status == 404:
        return http_error_response(HttpError(404, "no such path here", "not_found"))
    if status == 405:
        text = f"{request.method} is not allowed on this path"
        return http_error_response(HttpError(405, text, "method_not_allowed"))
    return http_error_response(HttpError(status, "the request cannot be served", "http_error"))


async def _on_disconnect(request: Request, error: Exception) -> Response:
    del request, error
    return Response(status_code=499)  # to nobody


async def _on_defect(request: Request, error: Exception) -> Response:
    log_failure(logger, "request failed", error, route=request.url.path)
    return internal_error_response()
