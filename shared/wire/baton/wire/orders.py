"""What the scheduler asks of workers: attempts at requests, and prompts to embed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from baton.core.embedding import Pooling
from baton.core.errors import InvalidRequest
from baton.core.hashing import Fingerprint
from baton.core.ids import check_request_id
from baton.core.sampling import SamplingParams
from baton.wire.fields import MessageT, as_message, as_value
from baton.wire.layout import fingerprint_from_pb, fingerprint_to_pb
from baton.wire.sampling import sampling_from_pb, sampling_to_pb

if TYPE_CHECKING:
    from baton.v1 import decode_pb2, prefill_pb2

MAX_SALT_CHARS = 256


@dataclass(frozen=True, slots=True)
class AttemptOrder:
    """One attempt at a request, as both of its workers get it."""

    request_id: str
    """Names the request at every worker: unique among all schedulers and tenants."""
    attempt: int
    """From 1; a higher attempt replaces a lower one."""
    token_ids: tuple[int, ...]
    """The prompt, then the output so far."""
    num_output_tokens: int
    """How many of `token_ids` are output."""
    sampling: SamplingParams
    fingerprint: Fingerprint | None = None
    """The model as its decode worker announced it; a worker with another one refuses."""
    priority: int = 0
    cache_salt: str = ""
    fork_of: str = ""
    """Request at the decode worker with the same prompt, whose KV may be shared; "" for none."""


@dataclass(frozen=True, slots=True)
class EmbedOrder:
    """A prompt to turn into a vector."""

    request_id: str
    attempt: int
    token_ids: tuple[int, ...]
    pooling: Pooling
    priority: int = 0
    cache_salt: str = ""


def seq_id_of(order: AttemptOrder | EmbedOrder) -> str:
    """The engine's name for an attempt."""
    return f"{order.request_id}/{order.attempt}"


def attempt_to_pb(kind: type[MessageT], order: AttemptOrder, **given: Any) -> MessageT:
    """A ReserveRequest or PrefillRequest; `given` are the fields that the other has not."""
    fingerprint = fingerprint_to_pb(order.fingerprint) if order.fingerprint else None
    return as_message(
        kind, order, sampling=sampling_to_pb(order.sampling), fingerprint=fingerprint, **given
    )


def attempt_from_pb(
    pb: decode_pb2.ReserveRequest | prefill_pb2.PrefillRequest, fork_of: str = ""
) -> AttemptOrder:
    """A checked attempt.

    Raises:
        InvalidRequest: a field is missing or out of range.
    """
    check_origin(pb)
    if len(pb.token_ids) <= pb.num_output_tokens:
        raise InvalidRequest("token_ids must hold at least one prompt token")
    sampling = sampling_from_pb(pb.sampling)
    if sampling.seed is None:
        raise InvalidRequest("sampling.seed must be set")
    fingerprint = fingerprint_from_pb(pb.fingerprint) if pb.HasField("fingerprint") else None
    return as_value(AttemptOrder, pb, sampling=sampling, fingerprint=fingerprint, fork_of=fork_of)


def check_origin(
    pb: decode_pb2.ReserveRequest | prefill_pb2.PrefillRequest | prefill_pb2.EmbedPromptRequest,
) -> None:
    """Checks the fields that say whose attempt this is.

    Raises:
        InvalidRequest: one of them is missing or too long.
    """
    check_request_id(pb.request_id)
    if pb.attempt < 1:
        raise InvalidRequest("attempt must be at least 1")
    if len(pb.cache_salt) > MAX_SALT_CHARS:
        raise InvalidRequest(f"cache_salt must have at most {MAX_SALT_CHARS} characters")
