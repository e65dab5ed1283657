"""What either worker refuses of the scheduler's requests, and what it makes of the others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from baton.core.embedding import Pooling
from baton.core.errors import BatonError, InvalidRequest, KvLayoutMismatch, PromptTooLong
from baton.core.hashing import Fingerprint, KvLayout
from baton.core.sequence import SequenceSpec
from baton.v1 import common_pb2, decode_pb2, prefill_pb2
from baton.wire.layout import fingerprint_to_pb
from baton.wire.orders import (
    MAX_SALT_CHARS,
    EmbedOrder,
    attempt_from_pb,
    check_origin,
    seq_id_of,
)
from baton.worker.specs import spec_of

OURS = Fingerprint("demo", "a", "b", "c", KvLayout.one_group(16, "float32", (2,), (8,)))
OTHER = Fingerprint("demo", "a", "x", "c", KvLayout.one_group(16, "float32", (2,), (8,)))
REQUESTS = (decode_pb2.ReserveRequest, prefill_pb2.PrefillRequest)


def _check_tokens(spec: SequenceSpec) -> None:
    if max(spec.token_ids) > 99:
        raise InvalidRequest("not in the vocabulary")


def _resolve_max_tokens(num_prompt_tokens: int, sampling: Any) -> int:
    if num_prompt_tokens > 50:
        raise PromptTooLong("too long")
    return int(sampling.max_tokens)


ENGINE: Any = SimpleNamespace(
    fingerprint=OURS,
    sequences=SimpleNamespace(check_tokens=_check_tokens, resolve_max_tokens=_resolve_max_tokens),
)


def _request(cls: Any, **changes: Any) -> Any:
    sampling = common_pb2.SamplingParams(seed=7, max_tokens=4)
    fields = {"request_id": "a", "attempt": 2, "token_ids": [5, 6, 7], "sampling": sampling}
    return cls(**{**fields, **changes})


@pytest.mark.parametrize("cls", REQUESTS)
def test_a_request_becomes_what_the_engine_is_to_compute(cls: Any) -> None:
    request = _request(
        cls,
        fingerprint=fingerprint_to_pb(OURS),
        num_output_tokens=1,
        priority=3,
        cache_salt="s" * MAX_SALT_CHARS,
    )
    order = attempt_from_pb(request)
    spec = spec_of(ENGINE, order)
    assert (spec.seq_id, spec.token_ids, spec.max_tokens) == ("a/2", (5, 6, 7), 4)
    assert (spec.num_output_tokens, spec.priority, spec.sampling.seed) == (1, 3, 7)
    assert spec.cache_salt == "s" * MAX_SALT_CHARS
    assert not spec.prefill_only
    assert spec_of(ENGINE, order, prefill_only=True).prefill_only


@pytest.mark.parametrize("cls", REQUESTS)
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"request_id": ""}, InvalidRequest, "request_id"),
        ({"request_id": "two words"}, InvalidRequest, "request_id"),
        ({"attempt": 0}, InvalidRequest, "attempt"),
        ({"cache_salt": "s" * (MAX_SALT_CHARS + 1)}, InvalidRequest, "cache_salt"),
        ({"token_ids": []}, InvalidRequest, "token_ids"),
        ({"num_output_tokens": 3}, InvalidRequest, "token_ids"),
        ({"token_ids": [5, 100]}, InvalidRequest, "vocabulary"),
        ({"token_ids": [5] * 51}, PromptTooLong, "too long"),
        ({"sampling": common_pb2.SamplingParams(max_tokens=4)}, InvalidRequest, "seed"),
        ({"fingerprint": fingerprint_to_pb(OTHER)}, KvLayoutMismatch, "weights"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else None,
)
def test_what_can_never_be_computed_is_refused(
    cls: Any, changes: dict[str, Any], error: type[BatonError], words: str
) -> None:
    with pytest.raises(error, match=words):
        spec_of(ENGINE, attempt_from_pb(_request(cls, **changes)))


def test_the_caller_of_an_embedding_is_checked_too() -> None:
    request = prefill_pb2.EmbedPromptRequest(request_id="e", attempt=1)
    check_origin(request)
    order = EmbedOrder(request.request_id, request.attempt, (), Pooling.LAST)
    assert seq_id_of(order) == "e/1"
    with pytest.raises(InvalidRequest, match="attempt"):
        check_origin(prefill_pb2.EmbedPromptRequest(request_id="e"))
