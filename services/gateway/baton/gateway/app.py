"""The gateway's endpoints and their handlers."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from functools import partial
from random import Random

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from baton.client import BatonError, ModelNotFound, QueueFull
from baton.gateway.answer_format import AnswerFormat, AnswerHeader, model_json
from baton.gateway.chat_completions import ChatBody, ChatFormat
from baton.gateway.chat_messages import messages_for_sdk
from baton.gateway.completions import CompletionBody, CompletionFormat
from baton.gateway.console.routes import Console
from baton.gateway.embeddings import EmbeddingsBody, embeddings_answer
from baton.gateway.endpoints import Access, Endpoint
from baton.gateway.failures import HttpError, json_response, respond_to_failure
from baton.gateway.generation import Generation, until_disconnected
from baton.gateway.generation_telemetry import GenerationMetrics, GenerationTelemetry
from baton.gateway.openapi import openapi_document
from baton.gateway.request_body import read_json
from baton.gateway.request_telemetry import RequestTelemetry
from baton.gateway.sampling_body import parse
from baton.gateway.schedulers import Schedulers
from baton.gateway.settings import GatewaySettings
from baton.gateway.token_bodies import DetokenizeBody, TokenizeBody
from baton.rpc.metrics import Metrics
from baton.rpc.telemetry import Telemetry
from baton.rpc.version import VERSION

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1", "[::1]")
READY_TIMEOUT_S = 2.0
CALL_TIMEOUT_S = 30.0


class Gateway:
    """The handlers of all endpoints, and the state they share."""

    def __init__(self, settings: GatewaySettings, schedulers: Schedulers, metrics: Metrics) -> None:
        self.is_draining = False
        self.num_running = 0
        self._settings = settings
        self._schedulers = schedulers
        self._tenants = settings.make_tenants()
        self._created = int(time.time())
        self._generation_metrics = GenerationMetrics(metrics)

    def routes(self) -> list[Route]:
        """A route per endpoint, the console's included if it is switched on."""
        routes = [self._route(row, partial(row.handler, self)) for row in ENDPOINTS]
        if self._settings.console:
            console = Console(self._schedulers, lambda: self.is_draining)
            routes += [self._route(row, row.handler) for row in console.endpoints()]
        return routes

    def middleware(self) -> list[Middleware]:
        """Checks host names; lets pages of other origins call, where the settings name any."""
        settings, found = self._settings, []
        hosts = [name for name in settings.allowed_hosts.split(",") if name]
        # A web page whose domain resolves to 127.0.0.1 shares the gateway's origin, as browsers see
        # it (DNS rebinding), but its requests still name that domain.
        if hosts or settings.http_host in LOOPBACK_HOSTS or settings.http_host[:4] == "127.":
            names = [*LOOPBACK_HOSTS, settings.http_host, *hosts]
            found.append(Middleware(TrustedHostMiddleware, names))
        if settings.cors_origins:
            found.append(
                Middleware(
                    CORSMiddleware,
                    settings.cors_origins.split(","),
                    allow_headers=["*"],
                    expose_headers=["x-request-id", "retry-after", "retry-after-ms"],
                )
            )
        return found

    async def chat_completions(self, request: Request, body: ChatBody) -> ASGIApp:
        """Answers a conversation."""
        header = _header("chatcmpl", request, body)
        answer = ChatFormat(header, body.tool_use().parser_factory())
        return await self._generation(request, body, answer, "chat")

    async def completions(self, request: Request, body: CompletionBody) -> ASGIApp:
        """Completes prompts."""
        answer = CompletionFormat(_header("cmpl", request, body))
        return await self._generation(request, body, answer, "text_completion")

    async def embeddings(self, request: Request, body: EmbeddingsBody) -> ASGIApp:
        """Embeds texts or token ids."""
        body.check()
        options = body.options()
        options["cache_salt"] = _salted(request, options["cache_salt"])
        options["request_id"] = request.state.generation_id
        options["timeout_s"] = self._settings.request_timeout_s
        return self._bounded(embeddings_answer(await self._schedulers.client(), body, options))

    async def models(self, request: Request) -> Response:
        """Lists the models."""
        del request
        models = await (await self._schedulers.client()).models(timeout_s=CALL_TIMEOUT_S)
        data = [model_json(model, self._created) for model in models]
        return json_response({"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        """Describes one model."""
        name = request.path_params["model"]
        for model in await (await self._schedulers.client()).models(timeout_s=CALL_TIMEOUT_S):
            if model.name == name:
                return json_response(model_json(model, self._created))
        raise ModelNotFound("no such model is served here; see /v1/models")

    async def tokenize(self, request: Request, body: TokenizeBody) -> Response:
        """Turns text or a conversation into token ids."""
        del request
        messages = None if body.messages is None else messages_for_sdk(body.messages)
        client = await self._schedulers.client()
        tokens = await client.tokenize(
            body.prompt, messages=messages, model=body.model, timeout_s=CALL_TIMEOUT_S
        )
        return json_response({"count": len(tokens), "tokens": tokens})

    async def detokenize(self, request: Request, body: DetokenizeBody) -> Response:
        """Turns token ids into text."""
        del request
        client = await self._schedulers.client()
        text = await client.detokenize(body.tokens, model=body.model, timeout_s=CALL_TIMEOUT_S)
        return json_response({"prompt": text})

    async def health(self, request: Request) -> Response:
        """Says that the process answers."""
        del request
        return json_response({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Says whether a generation sent now has a worker to run on."""
        del request
        try:
            models = await (await self._schedulers.client()).models(timeout_s=READY_TIMEOUT_S)
        except BatonError as error:
            return json_response({"status": "not ready", "reason": error.message}, 503)
        served = [model.name for model in models if model.num_decode_workers]
        if self.is_draining or not served:
            reason = "draining" if self.is_draining else "no model has a decode worker yet"
            return json_response({"status": "not ready", "reason": reason}, 503)
        return json_response({"status": "ready", "models": served})

    async def version(self, request: Request) -> Response:
        """Names the version of Baton."""
        del request
        return json_response({"version": VERSION})

    async def openapi(self, request: Request) -> Response:
        """Describes these endpoints."""
        del request
        return json_response(openapi_document(ENDPOINTS))

    def _route(self, endpoint: Endpoint, handler: Callable[..., Awaitable[ASGIApp]]) -> Route:
        """A route to the handler, behind the checks that its endpoint declares."""
        settings = self._settings

        async def serve(request: Request) -> ASGIApp:
            if endpoint.access is not Access.OPEN:
                tenant = self._tenants.identify(request.headers.get("authorization", ""))
                if endpoint.access is Access.RATE_LIMITED:
                    self._tenants.count(tenant, time.monotonic())
                request.state.tenant = tenant
            if endpoint.body is None:
                return await handler(request)
            value = await read_json(request, settings.max_body_bytes, settings.body_timeout_s)
            return await handler(request, parse(endpoint.body, value))

        return Route(endpoint.path, serve, methods=[endpoint.method])

    async def _generation(
        self,
        request: Request,
        body: CompletionBody | ChatBody,
        answer: AnswerFormat,
        operation: str,
    ) -> ASGIApp:
        settings, state = self._settings, request.state
        choices = body.choices(settings.max_choices)
        for choice in choices:
            choice.options["cache_salt"] = _salted(request, choice.options["cache_salt"])
        telemetry = GenerationTelemetry(self._generation_metrics, state.span, state.started_s)
        telemetry.started(operation, body.model, is_stream=bool(body.stream))
        generation = Generation(
            client=await self._schedulers.client(),
            request_id=state.generation_id,
            choices=choices,
            format=answer,
            telemetry=telemetry,
            is_stream=bool(body.stream),
            outputs_per_prompt=body.n or 1,
            timeout_s=settings.request_timeout_s,
            ping_interval_s=settings.ping_interval_s,
        )
        return self._bounded(generation)

    def _bounded(self, app: ASGIApp) -> ASGIApp:
        """Limits how many generations run at once; a disconnect of the client cancels them."""

        async def run(scope: Scope, receive: Receive, send: Send) -> None:
            limit = self._settings.max_concurrent_requests
            if self.num_running >= limit:
                raise QueueFull(f"{limit} requests are running", retry_after_s=1.0)
            self.num_running += 1
            try:
                await until_disconnected(receive, app(scope, receive, send))
            finally:
                self.num_running -= 1

        return run


def _header(prefix: str, request: Request, body: CompletionBody | ChatBody) -> AnswerHeader:
    answer_id = f"{prefix}-{request.state.generation_id}"
    return AnswerHeader(answer_id, int(time.time()), body.model, body.has_usage_chunk)


def _salted(request: Request, cache_salt: str) -> str:
    """The salt that keeps the KV of tenants apart."""
    tenant = request.state.tenant
    return f"{tenant}:{cache_salt}" if tenant else cache_salt


_LIMITED, _OPEN = Access.RATE_LIMITED, Access.OPEN
ENDPOINTS = (
    Endpoint("POST", "/v1/chat/completions", Gateway.chat_completions, _LIMITED, ChatBody),
    Endpoint("POST", "/v1/completions", Gateway.completions, _LIMITED, CompletionBody),
    Endpoint("POST", "/v1/embeddings", Gateway.embeddings, _LIMITED, EmbeddingsBody),
    Endpoint("GET", "/v1/models", Gateway.models, _LIMITED),
    Endpoint("GET", "/v1/models/{model:path}", Gateway.model, _LIMITED),
    Endpoint("POST", "/tokenize", Gateway.tokenize, _LIMITED, TokenizeBody),
    Endpoint("POST", "/detokenize", Gateway.detokenize, _LIMITED, DetokenizeBody),
    Endpoint("GET", "/health", Gateway.health, _OPEN),
    Endpoint("GET", "/ready", Gateway.ready, _OPEN),
    Endpoint("GET", "/version", Gateway.version, _OPEN),
    Endpoint("GET", "/openapi.json", Gateway.openapi, _OPEN),
)
"""All endpoints but the console's. Routes, OpenAPI document, spans and metrics derive from it."""


def make_app(gateway: Gateway, telemetry: Telemetry, metrics: Metrics, rng: Random) -> ASGIApp:
    """The whole ASGI application."""
    handled = (BatonError, HttpError, HTTPException, ClientDisconnect, Exception)
    app = Starlette(
        routes=gateway.routes(),
        middleware=gateway.middleware(),
        exception_handlers=dict.fromkeys(handled, respond_to_failure),
    )
    return RequestTelemetry(app, ENDPOINTS, telemetry, metrics, rng)
