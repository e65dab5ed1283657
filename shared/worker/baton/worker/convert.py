"""Requests of the scheduler to either worker: from messages to what the engine is to compute."""

from __future__ import annotations

from baton.core.errors import InvalidRequest, KvLayoutMismatch
from baton.core.ids import check_request_id
from baton.core.sequence import SequenceSpec
from baton.engine.engine import Engine
from baton.v1 import decode_pb2, prefill_pb2
from baton.wire.layout import fingerprint_from_pb
from baton.wire.sampling import sampling_from_pb

MAX_SALT_CHARS = 256
_Attempt = decode_pb2.ReserveRequest | prefill_pb2.PrefillRequest


def seq_id_from_pb(request: _Attempt | prefill_pb2.EmbedPromptRequest) -> str:
    """The engine's name for an attempt, whose caller is checked with it.

    Raises:
        InvalidRequest: the request does not say whose it is.
    """
    check_request_id(request.request_id)
    if request.attempt < 1:
        raise InvalidRequest("attempt must be at least 1")
    if len(request.cache_salt) > MAX_SALT_CHARS:
        raise InvalidRequest(f"cache_salt must have at most {MAX_SALT_CHARS} characters")
    return f"{request.request_id}/{request.attempt}"


def spec_from_pb(engine: Engine, request: _Attempt, *, prefill_only: bool = False) -> SequenceSpec:
    """What the engine is asked to compute.

    Raises:
        InvalidRequest, PromptTooLong, KvLayoutMismatch: it never can.
    """
    seq_id = seq_id_from_pb(request)
    if request.HasField("fingerprint"):
        differences = engine.fingerprint.differences(fingerprint_from_pb(request.fingerprint))
        if differences:
            raise KvLayoutMismatch("served here != asked for: " + "; ".join(differences))
    token_ids = tuple(request.token_ids)
    num_prompt_tokens = len(token_ids) - request.num_output_tokens
    if num_prompt_tokens < 1:
        raise InvalidRequest("token_ids must hold at least one prompt token")
    sampling = sampling_from_pb(request.sampling)
    if sampling.seed is None:
        raise InvalidRequest("sampling.seed must be set")
    spec = SequenceSpec(
        seq_id=seq_id,
        token_ids=token_ids,
        sampling=sampling,
        max_tokens=engine.sequences.resolve_max_tokens(num_prompt_tokens, sampling),
        num_output_tokens=request.num_output_tokens,
        priority=request.priority,
        cache_salt=request.cache_salt,
        prefill_only=prefill_only,
    )
    engine.sequences.check_tokens(spec)
    return spec
