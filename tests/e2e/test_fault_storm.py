"""The fault benchmark, small: its table of faults, and a storm that must end clean."""

from __future__ import annotations

import json
from random import Random

import pytest

from benchmarks.faults.__main__ import main, table, totals
from benchmarks.faults.injection import WEIGHTS, draw, make
from benchmarks.faults.storm import Outcome
from tests.support.faults import NO_FAULTS, parse_faults
from tests.support.tiers import representatives

HANDOFFS, SEED = 64, 17


def test_every_kind_of_fault_does_something() -> None:
    assert sum(WEIGHTS.values()) == 1000
    for kind in WEIGHTS:
        injection = make(kind, Random(1))
        at_the_client = injection.cancel_after_s, injection.cancel_after_tokens
        is_at_the_worker = parse_faults(injection.faults) != NO_FAULTS
        is_short = injection.timeout_s < 1.0
        assert is_at_the_worker or injection.kill_role or is_short or any(at_the_client)


def test_the_figures_tell_what_is_wrong() -> None:
    outcomes = [
        Outcome("corrupt", "", is_wrong=False, is_hung=False, num_attempts=2, elapsed_s=1.0),
        Outcome("corrupt", "", is_wrong=True, is_hung=False, num_attempts=1, elapsed_s=1.0),
        Outcome("cancel", "CANCELLED", is_wrong=False, is_hung=False, num_attempts=0, elapsed_s=1),
        Outcome("cancel", "INTERNAL", is_wrong=False, is_hung=False, num_attempts=0, elapsed_s=1),
        Outcome("delay", "HANGS", is_wrong=False, is_hung=True, num_attempts=0, elapsed_s=35.0),
    ]
    assert totals(outcomes) == {
        "wrong_tokens": 1,
        "hangs": 1,
        "finished": 2,
        "typed_errors": 1,
        "internal_errors": 1,
    }
    assert "CANCELLED 1, INTERNAL 1" in table(outcomes)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("handoffs", representatives([HANDOFFS, 600], {HANDOFFS}))
def test_a_storm_ends_clean(capsys: pytest.CaptureFixture[str], handoffs: int) -> None:
    kinds = {draw(Random(f"{SEED} {index}")).kind for index in range(handoffs)}
    assert kinds == set(WEIGHTS)
    assert main(["--handoffs", str(handoffs), "--seed", str(SEED), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["handoffs"] == handoffs == figures["finished"] + figures["typed_errors"]
    assert figures["finished"] > handoffs / 2
    assert figures["kills"] >= 2
    assert figures["scrapes"] > 20
