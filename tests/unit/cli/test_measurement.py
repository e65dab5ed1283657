from __future__ import annotations

import pytest

from baton.cli.measurement import LatencyTarget, Sample, Tally, percentile, summary

TARGET = LatencyTarget(ttft_s=0.5, tpot_s=0.02)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.5, 5), (0.9, 9), (0.95, 10), (0.99, 10), (0.01, 1)]
)
def test_percentiles_are_values_that_occurred(share: float, expected: int) -> None:
    assert percentile([10, 9, 8, 7, 6, 5, 4, 3, 2, 1], share) == expected


def test_percentile_of_one_value_is_that_value() -> None:
    assert [percentile([4.0], share) for share in (0.5, 0.99)] == [4.0, 4.0]


def test_good_is_what_meets_both_targets() -> None:
    tally = Tally(
        samples=[
            Sample(ttft_s=0.4, elapsed_s=0.5, num_prompt_tokens=30, num_tokens=11),
            Sample(ttft_s=0.6, elapsed_s=0.7, num_prompt_tokens=30, num_tokens=11),
            Sample(ttft_s=0.1, elapsed_s=0.9, num_prompt_tokens=30, num_tokens=11),
        ],
        num_skipped=1,
    )
    tally.failures["queue_full"] += 1
    document = summary(tally, 2.0, TARGET)
    assert document["goodput"]["requests_per_s"] == 0.5
    assert document["goodput"]["share"] == 0.2, "failed and unsent ones were not good"
    assert document["requests"] == {"ok": 3, "failed": {"queue_full": 1}, "skipped": 1}
    assert document["output_tokens_per_s"] == 16.5
    assert document["prompt_tokens_per_s"] == 45.0
    assert document["ttft_ms"]["p50"] == 400.0
    assert document["tpot_ms"]["max"] == pytest.approx(80.0)
    assert document["e2e_ms"]["mean"] == pytest.approx(700.0)


def test_one_token_has_no_time_per_token() -> None:
    assert Sample(0.5, 0.5, 3, 1).tpot_s == 0.0


def test_nothing_measured_is_still_a_document() -> None:
    document = summary(Tally(), 1.0, TARGET)
    assert document["requests"]["ok"] == 0
    assert "ttft_ms" not in document
