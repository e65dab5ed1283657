from __future__ import annotations

import pytest

from baton.core.errors import InvalidRequest
from tests.support.faults import NO_FAULTS, FaultPlan, Faults, parse_faults


def test_faults_are_read_from_text() -> None:
    assert parse_faults("") == NO_FAULTS
    assert parse_faults("corrupt_chunk=1, times=2") == Faults(corrupt_chunk=1, times=2)
    assert parse_faults("delay_start_s=3,delay_chunk_s=0.5") == Faults(
        delay_start_s=3.0, delay_chunk_s=0.5
    )
    assert parse_faults("drop_manifest") == Faults(drop_manifest=True)


@pytest.mark.parametrize(
    "text", ["x", "corrupt_chunk", "corrupt_chunk=-1", "drop_manifest=1", "delay_start_s=x"]
)
def test_what_is_no_fault_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="corrupt_chunk=N"):
        parse_faults(text)


def test_a_plan_makes_as_many_pushes_fail_as_it_was_told() -> None:
    plan = FaultPlan("drop_manifest,times=2")
    assert plan.is_on
    assert [plan.next("r", 1).drop_manifest for _ in range(3)] == [True, True, False]
    assert FaultPlan("drop_chunk=1").next("r", 2).drop_chunk == 1
    assert not FaultPlan("").is_on


def test_a_request_names_its_faults_only_where_the_setting_lets_it() -> None:
    plan = FaultPlan("from_request_id")
    assert plan.is_on
    assert plan.next("r~drop_chunk=1,silent_s=2", 1) == Faults(drop_chunk=1, silent_s=2.0)
    assert plan.next("r~drop_chunk=1", 2) == NO_FAULTS
    assert plan.next("r", 1) == NO_FAULTS
    with pytest.raises(InvalidRequest, match="faults in the request_id"):
        plan.next("r~x", 1)
    assert FaultPlan("").next("r~drop_chunk=1", 1) == NO_FAULTS
