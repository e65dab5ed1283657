"""Which scheduler a request goes to."""

from __future__ import annotations

from collections import Counter

from baton.core.cluster import ClusterView, Member, ServiceState, ServiceStatus, WorkerRates
from baton.gateway.schedulers import MAX_CLIENTS, Schedulers


class Members:
    def __init__(self, num_schedulers: int) -> None:
        self.num_schedulers = num_schedulers

    def view(self) -> ClusterView:
        names = [f"scheduler-{index:02}" for index in range(self.num_schedulers)]
        return ClusterView({
            name: Member(
                ServiceStatus(name, "scheduler", f"{name}:1", state=ServiceState.READY),
                WorkerRates(),
                lease_ends_at_s=1e12,
            )
            for name in names
        })


async def test_schedulers_take_turns() -> None:
    schedulers = Schedulers("", Members(3), 5.0)  # type: ignore[arg-type]
    used = Counter([(await schedulers.client()).address for _ in range(9)])
    assert set(used.values()) == {3}
    await schedulers.close()


async def test_no_client_in_use_is_closed_for_another_scheduler() -> None:
    schedulers = Schedulers("", Members(MAX_CLIENTS + 4), 5.0)  # type: ignore[arg-type]
    clients = {id(await schedulers.client()) for _ in range(3 * MAX_CLIENTS)}
    assert len(clients) == len(await schedulers.clients()) == MAX_CLIENTS
    await schedulers.close()
