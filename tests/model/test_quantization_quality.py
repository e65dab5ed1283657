"""What int8 does to the demo model, on text that it was not trained on."""

from __future__ import annotations

import pytest

from baton.engine import quantize_model
from baton.engine.quantize import Quantization
from benchmarks.quantization.kv import measure_kv
from benchmarks.quantization.perplexity import (
    DEMO,
    heldout_texts,
    load,
    make_windows,
    perplexity,
)

MAX_CHANGES = {"fp8": 0.02, "int8": 0.01, "int8-dynamic": 0.01, "int4": 0.05}


@pytest.fixture(scope="module")
def plain() -> float:
    return perplexity(load(DEMO), make_windows(DEMO, heldout_texts(2)))


@pytest.mark.skipif(not heldout_texts(2), reason="this Python has none of the held-out files")
def test_int8_kv_halves_memory_and_hardly_changes_perplexity() -> None:
    plain, small = measure_kv(make_windows(DEMO, heldout_texts(1)))
    assert small.token_bytes < 0.55 * plain.token_bytes
    assert small.num_tokens > 1.8 * plain.num_tokens
    assert 1 < plain.perplexity < 100
    assert 0 < abs(small.perplexity / plain.perplexity - 1) < 0.01


@pytest.mark.skipif(not heldout_texts(2), reason="this Python has none of the held-out files")
@pytest.mark.parametrize("scheme", sorted(MAX_CHANGES))
def test_perplexity_stays_close(scheme: str, plain: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # Workers refuse fp8 on CPU, where torch has the operator, too, but slowly.
    monkeypatch.setattr(quantize_model, "check_device", lambda *_: None)
    windows = make_windows(DEMO, heldout_texts(2))
    changed = perplexity(load(DEMO, Quantization(scheme, has_lm_head=True)), windows)
    assert 1 < plain < 100, "a model that predicts something"
    assert abs(changed / plain - 1) < MAX_CHANGES[scheme]
    assert changed != plain
