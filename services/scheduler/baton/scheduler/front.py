"""The scheduler as its callers see it: requests are named, kept apart by tenant, and answered."""

from __future__ import annotations

import hmac
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import replace

from baton.core.clock import Clock
from baton.core.errors import BatonError, Forbidden, InvalidRequest, NoWorker
from baton.core.hashing import block_hashes, root_hash
from baton.core.ids import check_request_id, make_id
from baton.core.roles import Role
from baton.rpc.cache_access import CacheAccess
from baton.rpc.interceptors import DRAIN
from baton.rpc.logs import bind_request_id
from baton.rpc.tenants import Tenants
from baton.scheduler.attempt import SchedulerDeps
from baton.scheduler.embeddings import Embedder
from baton.scheduler.orchestrator import Orchestrator
from baton.wire.inference.overview import ClusterStatus, Model
from baton.wire.inference.pins import PinnedPrefix, PinRequest
from baton.wire.inference.records import RecordQuery, RequestList
from baton.wire.inference.requests import GenerateRequest, Tokenized, TokenizeRequest
from baton.wire.inference.serving import Emit
from baton.wire.inference.vectors import Embedding, EmbedRequest

_GUARDED = ("baton.v1.InferenceService/", "inference.GRPCInferenceService/", DRAIN)
_OPEN = frozenset({
    "inference.GRPCInferenceService/ServerLive",
    "inference.GRPCInferenceService/ServerReady",
})
"""Probes carry no keys."""
_tenant: ContextVar[str] = ContextVar("tenant", default="")
"""Tenant of the call that the current task serves; tasks that it starts inherit it."""


class Callers:
    """Admits tenants and the gateway by their keys; without tenants, every caller."""

    def __init__(self, tenants: Tenants, gateway_key: str, clock: Clock) -> None:
        self._tenants = tenants
        self._gateway = f"Bearer {gateway_key}".encode() if gateway_key else b""
        self._clock = clock

    def refusal(self, method: str, metadata: Mapping[str, str]) -> BatonError | None:
        """The error that refuses a call, or None. Also sets the tenant of an admitted call."""
        if not method.startswith(_GUARDED) or method in _OPEN:
            return None
        given = metadata.get("authorization", "")
        if self._gateway and hmac.compare_digest(given.encode(), self._gateway):
            return None  # it has authenticated the tenant, and counted the request
        try:
            tenant = self._tenants.admit(given, self._clock.now())
        except BatonError as error:
            return error
        if tenant and method == DRAIN:
            return Forbidden("a tenant cannot stop the scheduler")
        _tenant.set(tenant)
        return None


def mark(default: str = "") -> str:
    """Prefix of the calling tenant's salts. `default` names the tenant if the call has none."""
    tenant = _tenant.get() or default
    return f"{tenant}:" if tenant else ""


def salted(cache_salt: str) -> str:
    """Prefixes a salt with the calling tenant: KV is shared within a tenant only."""
    return mark() + cache_salt


def unsalted(text: str) -> str | None:
    """Undoes `salted`; None for the salt of another tenant."""
    return text.removeprefix(mark()) if text.startswith(mark()) else None


PIN_TTL_S = 24 * 3600.0
"""Lifetime of a pin whose caller sets none."""


class SchedulerFront:
    """Implements `baton.wire.inference.serving.InferenceServer`."""

    def __init__(
        self,
        orchestrator: Orchestrator,
        embedder: Embedder,
        cache: CacheAccess,
        is_bus_connected: Callable[[], bool],
        deps: SchedulerDeps,
    ) -> None:
        self._orchestrator = orchestrator
        self._embedder = embedder
        self._cache = cache
        self._is_bus_connected = is_bus_connected
        self._deps = deps

    async def generate(self, request: GenerateRequest, timeout_s: float | None, emit: Emit) -> None:
        """See InferenceServer."""
        request_id, salt = self._named("req", request.request_id), salted(request.cache_salt)
        named = replace(request, request_id=request_id, cache_salt=salt)
        await self._orchestrator.generate(named, self._limit_s(timeout_s), emit)

    async def embed(
        self, request: EmbedRequest, timeout_s: float | None
    ) -> AsyncGenerator[Embedding, None]:
        """See InferenceServer."""
        request_id, salt = self._named("emb", request.request_id), salted(request.cache_salt)
        named = replace(request, request_id=request_id, cache_salt=salt)
        vectors = self._embedder.embed(named, self._limit_s(timeout_s))
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
        cluster, prompt = self._deps.cluster, request.prompt
        model = cluster.resolve_model(request.model)
        if not isinstance(prompt, tuple):
            prompt = await self._deps.encoder.encode(model, prompt, self._limit_s(timeout_s))
        fingerprint = cluster.fingerprint(model)
        if fingerprint is None:
            raise NoWorker(f"no worker of model {model!r} is ready, or they differ")
        layout = fingerprint.layout
        root = root_hash(fingerprint.digest(), salted(request.cache_salt))
        hashes = list(block_hashes(root, prompt, layout.block_size))
        if not hashes:
            raise InvalidRequest(
                f"the prefix has {len(prompt)} tokens; it must have at least the"
                f" {layout.block_size} of a block"
            )
        peer = self._cache.replica(hashes[0])
        if peer is None:
            raise NoWorker("no cache service is ready", retry_after_s=1.0)
        ttl_s = PIN_TTL_S if request.ttl_s is None else request.ttl_s
        # The label says whose pin it is: no tenant sees, or ends, another one's.
        pin = await peer.pin(hashes, layout.block_bytes, ttl_s, salted(request.label))
        return replace(pin, label=request.label)

    async def unpin(self, pin_id: str) -> bool:
        """See InferenceServer."""
        is_own = any(pin.pin_id == pin_id for pin in await self.pins())
        return is_own and any([await peer.unpin(pin_id) for peer in self._cache.all()])

    async def pins(self) -> Sequence[PinnedPrefix]:
        """See InferenceServer."""
        pins = [pin for peer in self._cache.all() for pin in await peer.pins()]
        labelled = [(pin, unsalted(pin.label)) for pin in pins]
        return [replace(pin, label=label) for pin, label in labelled if label is not None]

    async def status(self) -> ClusterStatus:
        """See InferenceServer."""
        services = sorted(
            self._deps.cluster.statuses(), key=lambda status: (status.role, status.worker_id)
        )
        return ClusterStatus(
            services=tuple(services),
            bus_connected=self._is_bus_connected(),
            requests_by_state=self._orchestrator.requests_by_state(),
        )

    async def requests(self, query: RecordQuery) -> RequestList:
        """See InferenceServer."""
        recent, metrics = self._orchestrator.recent, self._deps.metrics
        own = mark(query.tenant)
        if query.request_id:
            found = [recent.get(check_request_id(query.request_id), own)]
        else:
            found = recent.latest(query.limit, own)
        return RequestList(tuple(found), metrics.num_prompt_tokens, metrics.num_output_tokens)

    def _named(self, prefix: str, given: str) -> str:
        """The caller's id or a new one; this call's log lines carry it."""
        request_id = check_request_id(given) if given else make_id(prefix, self._deps.rng)
        bind_request_id(request_id)
        return request_id

    def _limit_s(self, timeout_s: float | None) -> float:
        return self._deps.settings.request_timeout_s if timeout_s is None else timeout_s
