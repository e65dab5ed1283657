"""Calls to tokenizers and workers, and what attempts hold there: kept alive, then let go."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context
from typing import TypeVar

from baton.core.clock import Clock
from baton.core.cluster import Member
from baton.core.errors import BatonError, DeadlineExceeded, NoWorker, WorkerDraining
from baton.core.prompt import TextPrompt
from baton.rpc.tasks import Tasks
from baton.scheduler.view import ClusterWatch
from baton.wire.channel import ChannelPool
from baton.wire.decode import DecodeCaller, KvReservation, RpcDecodeCaller
from baton.wire.prefill import PrefillCaller, RpcPrefillCaller
from baton.wire.tokenizer import RpcTokenizer, TokenizerCaller

AnswerT = TypeVar("AnswerT")
logger = logging.getLogger(__name__)

RELEASE_TIMEOUT_S = 2.0
_RELEASE_TRIES = 3
_RETRY_DELAY_S = 0.1
_MAX_RELEASES = 4096
_RENEWALS_PER_LEASE = 3
_SHORTEST_LEASE_S = 0.3


class Peers:
    """Makes a caller for each use; the channels stay."""

    def __init__(self, channels: ChannelPool, clock: Clock) -> None:
        self._channels = channels
        self._clock = clock

    def tokenizer(self, address: str) -> TokenizerCaller:
        """The tokenizer at an address."""
        return RpcTokenizer(self._channels.get(address))

    def prefill(self, member: Member) -> PrefillCaller:
        """A prefill worker."""
        channel = self._channels.get(member.status.address)
        return RpcPrefillCaller(channel, f"prefill worker {member.worker_id}", self._clock)

    def decode(self, member: Member) -> DecodeCaller:
        """A decode worker."""
        channel = self._channels.get(member.status.address)
        return RpcDecodeCaller(channel, f"decode worker {member.worker_id}", self._clock)


class Encoder:
    """Asks tokenizers; when one is lost, another."""

    def __init__(self, cluster: ClusterWatch, peers: Peers, timeout_s: float) -> None:
        self._cluster = cluster
        self._peers = peers
        self._timeout_s = timeout_s
        """Bound on one answer."""

    async def encode(self, model: str, prompt: TextPrompt, timeout_s: float) -> tuple[int, ...]:
        """Token ids of a text or a conversation.

        Raises:
            NoWorker: no tokenizer answered.
            BatonError: the tokenizer refused the prompt.
        """
        bound_s = min(timeout_s, self._timeout_s)
        encoded = await self._ask(model, lambda peer: peer.encode(model, prompt, bound_s))
        return encoded.token_ids

    async def decode(self, model: str, token_ids: Sequence[int], timeout_s: float) -> str:
        """Text of token ids; raises as `encode` does."""
        bound_s = min(timeout_s, self._timeout_s)
        return await self._ask(model, lambda peer: peer.decode_text(model, token_ids, bound_s))

    async def _ask(
        self, model: str, question: Callable[[TokenizerCaller], Awaitable[AnswerT]]
    ) -> AnswerT:
        avoid: set[str] = set()
        while True:
            tokenizer = self._cluster.tokenizer(model, frozenset(avoid))
            address = tokenizer.status.address
            if address in avoid:
                raise NoWorker("no tokenizer could be reached", retry_after_s=1.0)
            try:
                return await question(self._peers.tokenizer(address))
            except (NoWorker, DeadlineExceeded, WorkerDraining):
                self._cluster.suspect(tokenizer.worker_id)
                avoid.add(address)


class WorkerHolds:
    """What attempts hold at workers: renews leases while prompts are computed, sends releases.

    Releases run on their own tasks, so that no cancelled request takes them with it. One that fails
    is retried a few times; after that, the worker's lease ends by itself.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._releases = Tasks("releases")
        self._renewals = Tasks("leases")
        self._leased: dict[str, dict[str, KvReservation]] = defaultdict(dict)
        """Per worker id, per reservation id; a task renews those of each worker."""

    def release_blocks(
        self, peer: DecodeCaller, request_id: str, reservation_id: str, reason: str
    ) -> None:
        """Ends a reservation.

        All of the request's where its id is not known; then only once, for a repetition could meet
        the next attempt's.
        """
        known = reservation_id != ""

        def release() -> Awaitable[int]:
            return peer.release(
                reservation_id=reservation_id,
                request_id="" if known else request_id,
                reason=reason,
                timeout_s=RELEASE_TIMEOUT_S,
            )

        self._start(release, request_id, _RELEASE_TRIES if known else 1)

    def release_copy(self, peer: PrefillCaller, request_id: str, attempt: int, reason: str) -> None:
        """Lets go of the copy of the KV at a prefill worker."""

        def release() -> Awaitable[int]:
            return peer.release(request_id, attempt, reason, RELEASE_TIMEOUT_S)

        self._start(release, request_id, _RELEASE_TRIES)

    @contextmanager
    def leased(
        self, worker_id: str, peer: DecodeCaller, reservation: KvReservation
    ) -> Iterator[None]:
        """Keeps a reservation's lease alive within; one call per worker and round renews all."""
        is_renewed = worker_id in self._leased
        leased = self._leased[worker_id]
        leased[reservation.reservation_id] = reservation
        if not is_renewed:
            # Many requests' leases: in no request's trace.
            renew = self._renew_while_leased(worker_id, peer)
            self._renewals.spawn(renew, "renew leases", context=Context())
        try:
            yield
        finally:
            leased.pop(reservation.reservation_id, None)

    async def finish(self, timeout_s: float) -> None:
        """Waits until all releases are sent, or given up."""
        await self._releases.finish(self._clock, timeout_s)

    async def close(self, timeout_s: float) -> None:
        """Finishes, and stops renewing."""
        await self.finish(timeout_s)
        await self._renewals.stop()

    def _start(self, release: Callable[[], Awaitable[int]], request_id: str, tries: int) -> None:
        if len(self._releases) >= _MAX_RELEASES:
            logger.warning("release skipped, its lease will end", extra={"request_id": request_id})
            return
        self._releases.spawn(self._send(release, request_id, tries), "release")

    async def _send(
        self, release: Callable[[], Awaitable[int]], request_id: str, tries: int
    ) -> None:
        for attempt in range(tries):
            try:
                await release()
            except BatonError as error:
                fields = {"request_id": request_id, "reason": error.reason.name}
                logger.debug("release failed", extra=fields)
                await self._clock.sleep(_RETRY_DELAY_S * (attempt + 1))
            else:
                return

    async def _renew_while_leased(self, worker_id: str, peer: DecodeCaller) -> None:
        leased = self._leased[worker_id]
        try:
            while leased:
                shortest_s = min(reservation.lease_s for reservation in leased.values())
                every_s = max(shortest_s, _SHORTEST_LEASE_S) / _RENEWALS_PER_LEASE
                await self._clock.sleep(every_s)
                if leased:
                    await _renew(peer, list(leased), timeout_s=every_s)
        finally:
            del self._leased[worker_id]


async def _renew(peer: DecodeCaller, reservation_ids: list[str], timeout_s: float) -> None:
    try:
        unknown = (await peer.renew_leases(reservation_ids, timeout_s)).unknown_ids
    except BatonError as error:
        logger.debug("renewing leases failed", extra={"reason": error.reason.name})
        return
    if unknown:
        # Their prefills fail by themselves: the worker refuses the push.
        logger.info("leases had ended already", extra={"num_leases": len(unknown)})
