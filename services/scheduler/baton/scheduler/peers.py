"""Calls to workers: values in, values out, every failure a BatonError."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar, cast

import grpc

from baton.core.cluster import Member
from baton.core.output import DecodeTimings, TokenBatch
from baton.core.sampling import TokenLogprob
from baton.scheduler.messages import (
    EmbedOrder,
    FirstToken,
    PrefillDone,
    PrefillEvent,
    PrefillStarted,
    PushTarget,
    Reservation,
    WorkOrder,
)
from baton.scheduler.streams import PeerStream
from baton.v1 import (
    common_pb2,
    decode_pb2,
    decode_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
)
from baton.wire.channel import ChannelPool
from baton.wire.errors import error_from_rpc
from baton.wire.layout import fingerprint_to_pb
from baton.wire.sampling import finish_from_pb, logprob_from_pb, sampling_to_pb
from baton.wire.timing import duration_from_pb, slices_from_pb
from baton.wire.tokenizer import RpcTokenizer

AnswerT = TypeVar("AnswerT")


async def _answer(call: Awaitable[AnswerT]) -> AnswerT:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error


class PrefillPeer:
    """One prefill worker."""

    def __init__(self, channel: grpc.aio.Channel, worker_id: str) -> None:
        self._stub: Any = prefill_pb2_grpc.PrefillServiceStub(channel)
        self._name = f"prefill worker {worker_id}"

    def prefill(
        self, order: WorkOrder, target: PushTarget, timeout_s: float
    ) -> PeerStream[PrefillEvent]:
        """Starts a prefill. The caller cancels the stream when it leaves it."""
        reservation = target.reservation
        request = prefill_pb2.PrefillRequest(
            request_id=order.request_id,
            attempt=order.attempt,
            token_ids=order.token_ids,
            num_output_tokens=order.num_output_tokens,
            sampling=sampling_to_pb(order.sampling),
            fingerprint=_fingerprint(order),
            target=prefill_pb2.PushTarget(
                worker_id=target.worker_id,
                address=reservation.push_address,
                reservation_id=reservation.reservation_id,
                epoch=reservation.epoch,
                num_cached_blocks=reservation.num_cached_blocks,
            ),
            priority=order.priority,
            cache_salt=order.cache_salt,
        )
        call = self._stub.Prefill(request, timeout=timeout_s)
        return PeerStream(call, _prefill_event, self._name)

    async def embed(self, order: EmbedOrder, timeout_s: float) -> tuple[tuple[float, ...], int]:
        """A prompt's vector, and how many of its tokens were cached."""
        request = prefill_pb2.EmbedPromptRequest(
            request_id=order.request_id,
            attempt=order.attempt,
            token_ids=order.token_ids,
            pooling=cast("common_pb2.Pooling", order.pooling.value),
            priority=order.priority,
            cache_salt=order.cache_salt,
        )
        response = await _answer(self._stub.EmbedPrompt(request, timeout=timeout_s))
        return tuple(response.values), int(response.cached_tokens)

    async def release(self, request_id: str, attempt: int, reason: str, timeout_s: float) -> int:
        """Lets go of kept KV; returns the number of blocks."""
        request = prefill_pb2.ReleasePrefillRequest(
            request_id=request_id, attempt=attempt, reason=reason
        )
        response = await _answer(self._stub.ReleasePrefill(request, timeout=timeout_s))
        return int(response.released_blocks)


class DecodePeer:
    """One decode worker."""

    def __init__(self, channel: grpc.aio.Channel, worker_id: str) -> None:
        self._stub: Any = decode_pb2_grpc.DecodeServiceStub(channel)
        self._name = f"decode worker {worker_id}"

    async def reserve(self, order: WorkOrder, timeout_s: float) -> Reservation:
        """Reserves blocks, all or nothing."""
        request = decode_pb2.ReserveRequest(
            request_id=order.request_id,
            attempt=order.attempt,
            token_ids=order.token_ids,
            num_output_tokens=order.num_output_tokens,
            sampling=sampling_to_pb(order.sampling),
            fingerprint=_fingerprint(order),
            priority=order.priority,
            cache_salt=order.cache_salt,
            fork_of=order.fork_of,
        )
        response = await _answer(self._stub.Reserve(request, timeout=timeout_s))
        return Reservation(
            reservation_id=response.reservation_id,
            epoch=response.epoch,
            lease_s=duration_from_pb(response.lease, "lease"),
            num_blocks=response.num_blocks,
            num_cached_blocks=response.num_cached_blocks,
            push_address=response.push_address,
        )

    def decode(
        self, reservation: Reservation, *, is_local: bool, timeout_s: float
    ) -> PeerStream[TokenBatch]:
        """Starts decoding. The caller cancels the stream when it leaves it."""
        request = decode_pb2.DecodeRequest(
            reservation_id=reservation.reservation_id,
            epoch=reservation.epoch,
            local_prefill=is_local,
        )
        return PeerStream(self._stub.Decode(request, timeout=timeout_s), _token_batch, self._name)

    async def release(
        self, *, reservation_id: str, request_id: str, reason: str, timeout_s: float
    ) -> int:
        """Ends a reservation, or all of a request's; returns the number of blocks let go."""
        request = decode_pb2.ReleaseRequest(
            reservation_id=reservation_id, request_id=request_id, reason=reason
        )
        response = await _answer(self._stub.Release(request, timeout=timeout_s))
        return int(response.released_blocks)

    async def renew_leases(self, reservation_ids: Sequence[str], timeout_s: float) -> list[str]:
        """Extends leases; returns the ids that the worker does not know any more."""
        request = decode_pb2.RenewLeasesRequest(reservation_ids=reservation_ids)
        response = await _answer(self._stub.RenewLeases(request, timeout=timeout_s))
        return list(response.unknown_reservation_ids)


class Peers:
    """Peers by member, over shared channels."""

    def __init__(self, channels: ChannelPool) -> None:
        self._channels = channels

    def tokenizer(self, address: str) -> RpcTokenizer:
        """The tokenizer at an address."""
        return RpcTokenizer(self._channels.get(address))

    def prefill(self, member: Member) -> PrefillPeer:
        """A prefill worker."""
        return PrefillPeer(self._channels.get(member.status.address), member.worker_id)

    def decode(self, member: Member) -> DecodePeer:
        """A decode worker."""
        return DecodePeer(self._channels.get(member.status.address), member.worker_id)


def _fingerprint(order: WorkOrder) -> common_pb2.ModelFingerprint | None:
    return fingerprint_to_pb(order.fingerprint) if order.fingerprint else None


def _optional_logprob(message: Any) -> TokenLogprob | None:
    return logprob_from_pb(message.logprob) if message.HasField("logprob") else None


def _stop_token_id(message: Any) -> int | None:
    return int(message.stop_token_id) if message.HasField("stop_token_id") else None


def _prefill_event(message: object) -> PrefillEvent:
    response = cast("prefill_pb2.PrefillResponse", message)
    kind = response.WhichOneof("event")
    if kind == "started":
        started = response.started
        return PrefillStarted(duration_from_pb(started.queue), started.cached_tokens)
    if kind == "first_token":
        first = response.first_token
        return FirstToken(
            token_id=first.token_id,
            logprob=_optional_logprob(first),
            finish_reason=finish_from_pb(first.finish_reason),
            stop_token_id=_stop_token_id(first),
            compute_s=duration_from_pb(first.compute),
            prompt_logprobs=tuple(logprob_from_pb(entry) for entry in first.prompt_logprobs),
            chunks=slices_from_pb("chunks", first.chunks),
        )
    done = response.done
    return PrefillDone(
        num_bytes=done.bytes,
        num_blocks=done.blocks,
        transfer_s=duration_from_pb(done.transfer),
        exposed_s=duration_from_pb(done.exposed),
        idle_s=duration_from_pb(done.idle),
    )


def _token_batch(message: object) -> TokenBatch:
    response = cast("decode_pb2.DecodeResponse", message)
    return TokenBatch(
        token_index=response.token_index,
        token_ids=tuple(response.token_ids),
        logprobs=tuple(logprob_from_pb(entry) for entry in response.logprobs),
        finish_reason=finish_from_pb(response.finish_reason),
        stop_token_id=_stop_token_id(response),
        draft_tokens=response.draft_tokens,
        accepted_tokens=response.accepted_tokens,
        timings=_timings(response.timings) if response.HasField("timings") else None,
        prompt_logprobs=tuple(logprob_from_pb(entry) for entry in response.prompt_logprobs),
    )


def _timings(timings: decode_pb2.DecodeTimings) -> DecodeTimings:
    return DecodeTimings(
        wait_for_kv_s=duration_from_pb(timings.wait_for_kv),
        queue_s=duration_from_pb(timings.queue),
        first_step_s=duration_from_pb(timings.first_step),
        cached_tokens=timings.cached_tokens,
        kv_chunks=slices_from_pb("kv_chunks", timings.kv_chunks),
    )
