"""Between protobuf messages and core's values: the only place (besides servicers) that knows both.

`*_from_pb` and `*_from_bytes` take nothing on trust: they check ranges, apply the defaults that the
.proto documents, and raise InvalidRequest with the field's name and the accepted range.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError

from baton.core.cluster import Announcement, ServiceState, ServiceStatus, WorkerRates
from baton.core.errors import ErrorReason, InvalidRequest
from baton.core.hashing import HASH_BYTES
from baton.core.sampling import (
    MAX_LOGIT_BIAS,
    DraftSource,
    FinishReason,
    SamplingParams,
    TokenLogprob,
)
from baton.rpc.convert_guide import guide_from_pb, guide_to_pb
from baton.rpc.convert_layout import fingerprint_from_pb, fingerprint_to_pb, in_range
from baton.v1 import common_pb2, control_pb2, inference_pb2

MAX_STOP_TOKEN_IDS = 1024
MAX_NAME_CHARS = 256
MAX_LEASE_S = 300.0
MAX_DURATION_S = 365 * 24 * 3600.0


@dataclass(frozen=True, slots=True)
class KvEvent:
    """A change of a worker's prefix cache. Mirrors baton.v1.KvEvent."""

    worker_id: str
    sequence: int
    """Counts from 1 without gaps, per boot."""
    stored: tuple[bytes, ...]
    removed: tuple[bytes, ...]


def reason_to_pb(reason: ErrorReason) -> common_pb2.ErrorReason:
    """The wire's enum value."""
    return cast("common_pb2.ErrorReason", reason.value)


def reason_from_pb(value: int) -> ErrorReason:
    """The reason; INTERNAL for one that is not set or comes from a newer peer."""
    try:
        return ErrorReason(value)
    except ValueError:
        return ErrorReason.INTERNAL


def finish_to_pb(reason: FinishReason | None) -> common_pb2.FinishReason:
    """The wire's enum value; None means not finished."""
    return cast("common_pb2.FinishReason", reason.value if reason else 0)


def finish_from_pb(value: int) -> FinishReason | None:
    """Why a sequence ended, None when it has not.

    Raises:
        InvalidRequest: the value is not known.
    """
    if value == 0:
        return None
    try:
        return FinishReason(value)
    except ValueError as error:
        raise InvalidRequest(f"finish_reason must be 0 to 4, got {value}") from error


def duration_to_pb(seconds: float) -> Duration:
    """A duration on the wire, to the nanosecond; below 0 (a clock's noise) becomes 0."""
    nanos = round(max(0.0, seconds) * 1e9)
    return Duration(seconds=nanos // 1_000_000_000, nanos=nanos % 1_000_000_000)


def duration_from_pb(
    pb: Duration, field: str = "duration", *, max_s: float = MAX_DURATION_S
) -> float:
    """Seconds.

    Raises:
        InvalidRequest: it is negative or longer than `max_s`, a year if not said otherwise.
    """
    seconds = pb.seconds + pb.nanos / 1e9
    if not 0.0 <= seconds <= max_s:
        raise InvalidRequest(f"{field} must be in [0, {max_s:.0f}] s, got {seconds:g} s")
    return seconds


def sampling_to_pb(params: SamplingParams) -> common_pb2.SamplingParams:
    """The wire's form; an unset `max_tokens`, `seed` or `speculation` stays absent."""
    return common_pb2.SamplingParams(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        logit_bias=params.logit_bias,
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        seed=params.seed,
        logprobs=params.logprobs,
        top_logprobs=params.top_logprobs,
        prompt_logprobs=params.prompt_logprobs,
        **({} if params.speculation is None else {"speculation": params.speculation}),
        draft_source=cast("Any", params.draft_source.value if params.draft_source else 0),
        guide=guide_to_pb(params.guide) if params.guide else None,
    )


def sampling_from_pb(pb: common_pb2.SamplingParams) -> SamplingParams:
    """Checked sampling settings, with defaults where an optional field is absent.

    Raises:
        InvalidRequest: a value is out of range or not a number.
    """
    _at_most("stop_token_ids", len(pb.stop_token_ids), MAX_STOP_TOKEN_IDS)
    _at_most("logit_bias", len(pb.logit_bias), MAX_LOGIT_BIAS)
    default = SamplingParams()
    return SamplingParams(
        temperature=pb.temperature if pb.HasField("temperature") else default.temperature,
        top_k=pb.top_k,
        top_p=pb.top_p if pb.HasField("top_p") else default.top_p,
        min_p=pb.min_p,
        repetition_penalty=(
            pb.repetition_penalty
            if pb.HasField("repetition_penalty")
            else default.repetition_penalty
        ),
        frequency_penalty=pb.frequency_penalty,
        presence_penalty=pb.presence_penalty,
        logit_bias=MappingProxyType(dict(pb.logit_bias)),
        max_tokens=pb.max_tokens if pb.HasField("max_tokens") else None,
        min_tokens=pb.min_tokens,
        stop=tuple(pb.stop),
        stop_token_ids=tuple(pb.stop_token_ids),
        ignore_eos=pb.ignore_eos,
        seed=pb.seed if pb.HasField("seed") else None,
        logprobs=pb.logprobs,
        top_logprobs=pb.top_logprobs,
        prompt_logprobs=pb.prompt_logprobs if pb.HasField("prompt_logprobs") else None,
        speculation=pb.speculation if pb.HasField("speculation") else None,
        # A hint: the output is the same, so a newer peer's source is as good as none.
        draft_source=DraftSource(pb.draft_source) if pb.draft_source in {1, 2} else None,
        guide=guide_from_pb(pb.guide) if pb.HasField("guide") else None,
    ).check()


def logprob_to_pb(logprob: TokenLogprob) -> common_pb2.TokenLogprob:
    """The wire's form."""
    return common_pb2.TokenLogprob(
        logprob=logprob.logprob,
        top_token_ids=logprob.top_token_ids,
        top_logprobs=logprob.top_logprobs,
    )


def logprob_from_pb(pb: common_pb2.TokenLogprob) -> TokenLogprob:
    """Log-probabilities at one position.

    Raises:
        InvalidRequest: one is NaN, or ids and log-probabilities differ in number.
    """
    if len(pb.top_token_ids) != len(pb.top_logprobs):
        raise InvalidRequest(
            "top_token_ids and top_logprobs must be equally long, got "
            f"{len(pb.top_token_ids)} and {len(pb.top_logprobs)}"
        )
    if math.isnan(pb.logprob) or any(math.isnan(value) for value in pb.top_logprobs):
        raise InvalidRequest("logprob must be a number, got NaN")
    return TokenLogprob(pb.logprob, tuple(pb.top_token_ids), tuple(pb.top_logprobs))


def rates_to_pb(rates: WorkerRates) -> control_pb2.WorkerRates:
    """The wire's form."""
    return control_pb2.WorkerRates(
        prefill_tokens_per_s=rates.prefill_tokens_per_s,
        decode_step_s=rates.decode_step_s,
        queued_prefill_tokens=rates.queued_prefill_tokens,
        push_bytes_per_s=rates.push_bytes_per_s,
        max_num_seqs=rates.max_num_seqs,
    )


def rates_from_pb(pb: control_pb2.WorkerRates) -> WorkerRates:
    """Measured speeds.

    Raises:
        InvalidRequest: one is negative or not a finite number.
    """
    return WorkerRates(
        prefill_tokens_per_s=_rate("prefill_tokens_per_s", pb.prefill_tokens_per_s),
        decode_step_s=_rate("decode_step_s", pb.decode_step_s),
        queued_prefill_tokens=pb.queued_prefill_tokens,
        push_bytes_per_s=_rate("push_bytes_per_s", pb.push_bytes_per_s),
        max_num_seqs=pb.max_num_seqs,
    )


def status_to_pb(status: ServiceStatus) -> inference_pb2.ServiceStatus:
    """The wire's form."""
    return inference_pb2.ServiceStatus(
        worker_id=status.worker_id,
        role=status.role,
        address=status.address,
        state=status.state.value,
        model=status.model,
        kv_blocks=status.kv_blocks,
        num_requests_running=status.num_requests_running,
        num_requests_waiting=status.num_requests_waiting,
        uptime=duration_to_pb(status.uptime_s),
        pid=status.pid,
        metrics_address=status.metrics_address,
        stats=status.stats,
        version=status.version,
        fingerprint=fingerprint_to_pb(status.fingerprint) if status.fingerprint else None,
        cores=status.cores,
        store_id=status.store_id,
    )


def status_from_pb(pb: inference_pb2.ServiceStatus) -> ServiceStatus:
    """A process's state and load.

    Raises:
        InvalidRequest: it has no id, role or address, or its state is not known.
    """
    for name, text in (("worker_id", pb.worker_id), ("role", pb.role), ("address", pb.address)):
        if not 0 < len(text) <= MAX_NAME_CHARS:
            raise InvalidRequest(f"status.{name} must have 1 to {MAX_NAME_CHARS} characters")
    try:
        state = ServiceState(pb.state)
    except ValueError as error:
        names = ", ".join(state.value for state in ServiceState)
        raise InvalidRequest(f"status.state must be one of {names}") from error
    return ServiceStatus(
        worker_id=pb.worker_id,
        role=pb.role,
        address=pb.address,
        state=state,
        model=pb.model,
        fingerprint=fingerprint_from_pb(pb.fingerprint) if pb.HasField("fingerprint") else None,
        kv_blocks=MappingProxyType(dict(pb.kv_blocks)),
        num_requests_running=pb.num_requests_running,
        num_requests_waiting=pb.num_requests_waiting,
        uptime_s=duration_from_pb(pb.uptime, "status.uptime"),
        pid=pb.pid,
        metrics_address=pb.metrics_address,
        stats=MappingProxyType(dict(pb.stats)),
        version=pb.version,
        cores=tuple(pb.cores),
        store_id=pb.store_id[:MAX_NAME_CHARS],
    )


def announcement_to_bytes(announcement: Announcement) -> bytes:
    """A serialized baton.v1.Announcement."""
    return control_pb2.Announcement(
        status=status_to_pb(announcement.status),
        lease=duration_to_pb(announcement.lease_s),
        leaving=announcement.leaving,
        rates=rates_to_pb(announcement.rates),
    ).SerializeToString()


def announcement_from_bytes(data: bytes) -> Announcement:
    """The announcement.

    Raises:
        InvalidRequest: not an announcement, or a value in it is out of range.
    """
    pb = control_pb2.Announcement()
    try:
        pb.ParseFromString(data)
    except DecodeError as error:
        raise InvalidRequest("announcement must be a baton.v1.Announcement") from error
    return Announcement(
        status=status_from_pb(pb.status),
        lease_s=duration_from_pb(pb.lease, "lease", max_s=MAX_LEASE_S),
        rates=rates_from_pb(pb.rates),
        leaving=pb.leaving,
    )


def kv_event_to_bytes(event: KvEvent) -> bytes:
    """A serialized baton.v1.KvEvent."""
    return control_pb2.KvEvent(
        worker_id=event.worker_id,
        sequence=event.sequence,
        stored=event.stored,
        removed=event.removed,
    ).SerializeToString()


def kv_event_from_bytes(data: bytes) -> KvEvent:
    """The event.

    Raises:
        InvalidRequest: not an event, no worker id, a sequence below 1, or a hash of a wrong size.
    """
    pb = control_pb2.KvEvent()
    try:
        pb.ParseFromString(data)
    except DecodeError as error:
        raise InvalidRequest("event must be a baton.v1.KvEvent") from error
    in_range("worker_id's length", len(pb.worker_id), 1, MAX_NAME_CHARS)
    in_range("sequence", pb.sequence, 1, 1 << 63)
    return KvEvent(
        worker_id=pb.worker_id,
        sequence=pb.sequence,
        stored=hashes_from_pb("stored", pb.stored),
        removed=hashes_from_pb("removed", pb.removed),
    )


def hashes_from_pb(field: str, hashes: Iterable[bytes]) -> tuple[bytes, ...]:
    """Block hashes.

    Raises:
        InvalidRequest: one has a wrong size.
    """
    checked = tuple(hashes)
    if any(len(value) != HASH_BYTES for value in checked):
        raise InvalidRequest(f"{field} must hold hashes of {HASH_BYTES} bytes each")
    return checked


def _at_most(field: str, count: int, limit: int) -> None:
    if count > limit:
        raise InvalidRequest(f"{field} must have at most {limit} entries, got {count}")


def _rate(field: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0.0):
        raise InvalidRequest(f"rates.{field} must be a finite number >= 0, got {value:g}")
    return value
