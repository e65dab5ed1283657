"""The scheduler as its callers see it: requests are named, kept apart by tenant, and answered."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from random import Random

from baton.core.ids import check_request_id, make_id
from baton.core.roles import Role
from baton.rpc.logs import bind_request_id
from baton.scheduler.callers import mark, salted, unsalted
from baton.scheduler.embeddings import Embedder
from baton.scheduler.encoder import Encoder
from baton.scheduler.orchestrator import Orchestrator
from baton.scheduler.pins import PinTarget, PrefixPins
from baton.scheduler.scheduler_metrics import SchedulerMetrics
from baton.scheduler.view import ClusterWatch
from baton.wire.inference.overview import ClusterStatus, Model
from baton.wire.inference.pins import PinnedPrefix, PinRequest
from baton.wire.inference.records import RecordQuery, RequestList
from baton.wire.inference.requests import GenerateRequest, Tokenized, TokenizeRequest
from baton.wire.inference.serving import Emit
from baton.wire.inference.vectors import Embedding, EmbedRequest

PIN_TTL_S = 24 * 3600.0
"""Of pins whose caller names no time."""


@dataclass(frozen=True, slots=True)
class FrontDeps:
    """What the scheduler answers its callers from."""

    orchestrator: Orchestrator
    embedder: Embedder
    encoder: Encoder
    cluster: ClusterWatch
    metrics: SchedulerMetrics
    pins: PrefixPins
    is_bus_connected: Callable[[], bool]
    request_timeout_s: float
    """Of requests without a deadline."""
    rng: Random


class SchedulerFront:
    """Implements `baton.wire.inference.serving.InferenceServer`."""

    def __init__(self, deps: FrontDeps) -> None:
        self._deps = deps

    async def generate(self, request: GenerateRequest, timeout_s: float | None, emit: Emit) -> None:
        """See InferenceServer."""
        named = replace(
            request,
            request_id=self._request_id("req", request.request_id),
            cache_salt=salted(request.cache_salt),
        )
        bind_request_id(named.request_id)
        await self._deps.orchestrator.generate(named, self._limit_s(timeout_s), emit)

    async def embed(
        self, request: EmbedRequest, timeout_s: float | None
    ) -> AsyncGenerator[Embedding, None]:
        """See InferenceServer."""
        named = replace(
            request,
            request_id=self._request_id("emb", request.request_id),
            cache_salt=salted(request.cache_salt),
        )
        bind_request_id(named.request_id)
        vectors = self._deps.embedder.embed(named, self._limit_s(timeout_s))
        async with aclosing(vectors):
            async for vector in vectors:
                self._deps.metrics.took_in(vector.num_tokens)
                yield vector

    async def models(self) -> Sequence[Model]:
        """See InferenceServer."""
        cluster = self._deps.cluster
        return [
            Model(
                name=model,
                max_model_len_tokens=cluster.max_model_len_tokens(model),
                num_prefill_workers=cluster.num_workers(Role.PREFILL, model),
                num_decode_workers=cluster.num_workers(Role.DECODE, model),
            )
            for model in cluster.models()
        ]

    async def tokenize(self, request: TokenizeRequest, timeout_s: float | None) -> Tokenized:
        """See InferenceServer."""
        cluster, encoder = self._deps.cluster, self._deps.encoder
        model = cluster.resolve_model(request.model)
        token_ids = await encoder.encode(model, request.prompt, self._limit_s(timeout_s))
        return Tokenized(token_ids, cluster.max_model_len_tokens(model))

    async def detokenize(
        self, model: str, token_ids: Sequence[int], timeout_s: float | None
    ) -> str:
        """See InferenceServer."""
        model = self._deps.cluster.resolve_model(model)
        return await self._deps.encoder.decode(model, token_ids, self._limit_s(timeout_s))

    async def pin(self, request: PinRequest, timeout_s: float | None) -> PinnedPrefix:
        """See InferenceServer."""
        model, prompt = self._deps.cluster.resolve_model(request.model), request.prompt
        if not isinstance(prompt, tuple):
            prompt = await self._deps.encoder.encode(model, prompt, self._limit_s(timeout_s))
        target = PinTarget(model, prompt, salted(request.cache_salt))
        ttl_s = PIN_TTL_S if request.ttl_s is None else request.ttl_s
        # The label says whose pin it is: no tenant sees, or ends, another one's.
        pin = await self._deps.pins.pin(target, ttl_s, salted(request.label))
        return replace(pin, label=request.label)

    async def unpin(self, pin_id: str) -> bool:
        """See InferenceServer."""
        is_own = any(pin.pin_id == pin_id for pin in await self.pins())
        return is_own and await self._deps.pins.unpin(pin_id)

    async def pins(self) -> Sequence[PinnedPrefix]:
        """See InferenceServer."""
        labelled = [(pin, unsalted(pin.label)) for pin in await self._deps.pins.current()]
        return [replace(pin, label=label) for pin, label in labelled if label is not None]

    async def status(self) -> ClusterStatus:
        """See InferenceServer."""
        services = sorted(
            self._deps.cluster.statuses(), key=lambda status: (status.role, status.worker_id)
        )
        return ClusterStatus(
            services=tuple(services),
            bus_connected=self._deps.is_bus_connected(),
            requests_by_state=self._deps.orchestrator.requests_by_state(),
        )

    async def requests(self, query: RecordQuery) -> RequestList:
        """See InferenceServer."""
        recent, metrics = self._deps.orchestrator.recent, self._deps.metrics
        own = mark(query.tenant)
        if query.request_id:
            found = [recent.get(check_request_id(query.request_id), own)]
        else:
            found = recent.latest(query.limit, own)
        return RequestList(tuple(found), metrics.num_prompt_tokens, metrics.num_output_tokens)

    def _request_id(self, prefix: str, given: str) -> str:
        return check_request_id(given) if given else make_id(prefix, self._deps.rng)

    def _limit_s(self, timeout_s: float | None) -> float:
        return self._deps.request_timeout_s if timeout_s is None else timeout_s
