"""Who may start, who waits, who is sent away."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.core.admission import Admission, Ticket
from baton.core.errors import QueueFull


def _offer(admission: Admission, request_id: str, priority: int = 0, now: float = 0.0) -> Ticket:
    return admission.offer(request_id, "m", priority=priority, deadline_s=now + 100, now=now)


def test_priority_goes_first_then_arrival() -> None:
    admission = Admission(10)
    for request_id, priority in (("a", 0), ("b", 5), ("c", 0), ("d", 5)):
        _offer(admission, request_id, priority)
    assert [ticket.request_id for ticket in admission.admit("m", 3, 0.0)] == ["b", "d", "a"]
    assert (admission.num_running(), admission.num_waiting()) == (3, 1)
    assert admission.admit("m", 3, 0.0) == []


def test_full_queue_refuses_with_a_delay() -> None:
    admission = Admission(2)
    _offer(admission, "a")
    _offer(admission, "b")
    with pytest.raises(QueueFull, match="2 requests wait") as caught:
        _offer(admission, "c")
    assert caught.value.retry_after_s
    assert admission.num_waiting() == 2


def test_models_do_not_share_a_queue() -> None:
    admission = Admission(1)
    _offer(admission, "a")
    admission.offer("b", "other", priority=0, deadline_s=9.0, now=0.0)
    assert [t.request_id for t in admission.admit("other", 1, 0.0)] == ["b"]


def _measured(seconds_each: float) -> Admission:
    """An admission whose requests end every so many seconds, three of them still waiting."""
    admission = Admission(100)
    for number in range(13):
        _offer(admission, f"r{number}")
    for number in range(10):
        (ticket,) = admission.admit("m", 1, number * seconds_each)
        admission.leave(ticket, (number + 1) * seconds_each)
    return admission


def test_what_cannot_start_before_its_deadline_is_refused_at_once() -> None:
    admission = _measured(2.0)
    now = 20.0
    with pytest.raises(QueueFull, match="deadline"):
        admission.offer("late", "m", priority=0, deadline_s=now + 3, now=now)
    admission.offer("fine", "m", priority=0, deadline_s=now + 30, now=now)
    assert admission.retry_after_s("m") == pytest.approx(10.0)


def test_idle_time_is_not_taken_for_slowness() -> None:
    admission = Admission(10)
    for hour in range(3):
        ticket = _offer(admission, f"r{hour}", now=hour * 3600.0)
        admission.admit("m", 1, hour * 3600.0)
        admission.leave(ticket, hour * 3600.0 + 1)
    assert admission.retry_after_s("m") < 1


def test_put_back_keeps_its_place_and_holds_the_others() -> None:
    admission = Admission(10)
    first = _offer(admission, "a")
    _offer(admission, "b")
    running = _offer(admission, "urgent", priority=9)
    admission.admit("m", 2, 0.0)
    admission.put_back(first, blocked_until_s=5.0)
    assert admission.blocked_until_s("m") == 5.0
    assert admission.admit("m", 9, 4.9) == []
    assert [t.request_id for t in admission.admit("m", 2, 5.0)] == ["a"]
    admission.put_back(first, blocked_until_s=50.0)
    admission.leave(running, 6.0)
    assert [t.request_id for t in admission.admit("m", 1, 6.0)] == ["a"]


def test_leave_is_idempotent() -> None:
    admission = Admission(10)
    waiting, running = _offer(admission, "a"), _offer(admission, "b", priority=1)
    admission.admit("m", 1, 0.0)
    for _ in range(2):
        admission.leave(waiting, 1.0)
        admission.leave(running, 1.0)
    assert (admission.num_running(), admission.num_waiting()) == (0, 0)


class AdmissionMachine(RuleBasedStateMachine):
    """Whatever happens, nobody is lost, nobody runs twice, and the bounds hold."""

    def __init__(self) -> None:
        super().__init__()
        self.admission = Admission(5)
        self.waiting: dict[str, Ticket] = {}
        self.running: dict[str, Ticket] = {}
        self.now = 0.0
        self.count = 0

    @rule(priority=st.integers(-2, 2), elapsed_s=st.floats(0, 2))
    def offer(self, priority: int, elapsed_s: float) -> None:
        self.now += elapsed_s
        self.count += 1
        name = f"r{self.count}"
        try:
            ticket = self.admission.offer(
                name, "m", priority=priority, deadline_s=self.now + 1e9, now=self.now
            )
        except QueueFull:
            assert len(self.waiting) >= 5  # those put back come on top
        else:
            self.waiting[name] = ticket

    @rule(capacity=st.integers(0, 4))
    def admit(self, capacity: int) -> None:
        in_order = sorted(self.waiting.values())
        num_running = len(self.running)
        admitted = self.admission.admit("m", capacity, self.now)
        assert admitted == in_order[: len(admitted)]
        assert not admitted or num_running + len(admitted) <= capacity
        for ticket in admitted:
            self.running[ticket.request_id] = self.waiting.pop(ticket.request_id)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def put_back(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.running)))
        self.admission.put_back(self.running[name], self.now + 1)
        self.waiting[name] = self.running.pop(name)

    @precondition(lambda self: self.running or self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted([*self.running, *self.waiting])))
        ticket = self.running.pop(name, None) or self.waiting.pop(name)
        self.admission.leave(ticket, self.now)

    @invariant()
    def counts_agree(self) -> None:
        assert self.admission.num_running() == len(self.running)
        assert self.admission.num_waiting() == len(self.waiting)


TestAdmissionMachine = AdmissionMachine.TestCase
TestAdmissionMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
