"""The scheduler's part of a request: reserve, prefill, decode, release, each timed from here."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration

from baton.v1 import common_pb2, decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from baton.wire.channel import ChannelPool

_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Transfer:
    """What a hand-off says of itself."""

    num_bytes: int
    num_chunks: int
    active_s: float
    """From its first chunk to its commit, without the time in which it waited for computation."""
    exposed_s: float
    """Part of it after the first token was chosen."""

    @property
    def hidden_fraction(self) -> float:
        """Part of the transfer that ran while the prompt was computed."""
        return max(0.0, 1.0 - self.exposed_s / self.active_s)


@dataclass(frozen=True, slots=True)
class Timed:
    """One request, in seconds since its start."""

    first_token_s: float
    second_token_s: float | None
    """Made by the decode worker; None where there was none."""
    fetched_tokens: int
    transfer: Transfer | None


class Caller:
    """Calls one prefill worker, and a decode worker if there is one."""

    def __init__(self, channels: ChannelPool, prefill: str, decode: str = "") -> None:
        self._prefill = prefill_pb2_grpc.PrefillServiceStub(channels.get(prefill))
        self._decode = decode_pb2_grpc.DecodeServiceStub(channels.get(decode)) if decode else None
        self._num_requests = 0

    async def run(self, token_ids: Sequence[int]) -> Timed:
        """One request; with a decode worker up to the second token."""
        self._num_requests += 1
        request_id = f"bench-{self._num_requests}"
        sampling = common_pb2.SamplingParams(temperature=0.0, seed=1, ignore_eos=True, max_tokens=2)
        started_s = time.perf_counter()
        grant = None
        if self._decode is not None:
            grant = await self._decode.Reserve(
                decode_pb2.ReserveRequest(
                    request_id=request_id, attempt=1, token_ids=token_ids, sampling=sampling
                ),
                timeout=_TIMEOUT_S,
            )
        first_token_s, fetched_tokens, transfer = 0.0, 0, None
        call = self._prefill.Prefill(
            prefill_pb2.PrefillRequest(
                request_id=request_id,
                attempt=1,
                token_ids=token_ids,
                sampling=sampling,
                target=_target(grant) if grant is not None else None,
            ),
            timeout=_TIMEOUT_S,
        )
        async for event in call:
            if event.HasField("started"):
                fetched_tokens = event.started.fetched_tokens
            elif event.HasField("first_token"):
                first_token_s = time.perf_counter() - started_s
            elif event.HasField("done") and event.done.bytes:
                transfer = _transfer(event.done)
        second_token_s = None
        if self._decode is not None and grant is not None:
            answer = self._decode.Decode(
                decode_pb2.DecodeRequest(reservation_id=grant.reservation_id, epoch=grant.epoch),
                timeout=_TIMEOUT_S,
            )
            async for batch in answer:
                if batch.token_ids and second_token_s is None:
                    second_token_s = time.perf_counter() - started_s
        await self._prefill.ReleasePrefill(
            prefill_pb2.ReleasePrefillRequest(request_id=request_id), timeout=_TIMEOUT_S
        )
        return Timed(first_token_s, second_token_s, fetched_tokens, transfer)


def make_prompt(rng: random.Random, num_tokens: int) -> list[int]:
    """Tokens that no cache has seen."""
    return [rng.randrange(4096) for _ in range(num_tokens)]


def _target(grant: decode_pb2.ReserveResponse) -> prefill_pb2.PushTarget:
    return prefill_pb2.PushTarget(
        worker_id="decode",
        address=grant.push_address,
        reservation_id=grant.reservation_id,
        epoch=grant.epoch,
        num_cached_blocks=grant.num_cached_blocks,
    )


def _transfer(done: prefill_pb2.PrefillDone) -> Transfer:
    return Transfer(
        num_bytes=done.bytes,
        num_chunks=done.chunks,
        active_s=max(1e-9, _seconds(done.transfer) - _seconds(done.idle)),
        exposed_s=_seconds(done.exposed),
    )


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9
