"""What the scheduler makes of members and KV events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from baton.core.cluster import Announcement, ServiceState, ServiceStatus, WorkerRates
from baton.core.errors import InvalidRequest, ModelNotFound, NoWorker
from baton.core.hashing import Fingerprint, KvLayout, block_hashes, root_hash
from baton.core.placement import PlacementJob, PlacementRules, place
from baton.core.prefix_index import PrefixIndex
from baton.rpc.kv_index_feed import KvIndexFeed
from baton.rpc.membership import MembershipView
from baton.scheduler.view import ClusterWatch
from baton.wire.announcement import KvEvent, kv_event_to_bytes
from baton.wire.clock import SystemClock
from baton.wire.control import KvSnapshot
from tests.support.clock import ReadClock
from tests.support.eventually import eventually

FINGERPRINT = Fingerprint("m", "c", "w", "t", KvLayout.one_group(4, "float32", (1,), (8,)))


class FakeBus:
    is_connected = True

    def __init__(self) -> None:
        self.handlers: dict[str, Callable[[str, bytes], Awaitable[None]]] = {}

    async def subscribe(self, subject: str, handler: Any) -> None:
        self.handlers[subject] = handler

    def on_connect(self, callback: Any) -> None:
        pass

    async def publish(self, subject: str, data: bytes) -> None:
        pass

    async def kv(self, worker_id: str, sequence: int, *stored: bytes) -> None:
        event = KvEvent(worker_id, sequence, stored, ())
        await self.handlers["baton.kv.*"](f"baton.kv.{worker_id}", kv_event_to_bytes(event))


class FakeControl:
    def __init__(self) -> None:
        self.snapshots: dict[str, KvSnapshot] = {}
        self.num_asked = 0

    async def kv_snapshot(self, address: str, *, num_blocks: int) -> KvSnapshot:
        self.num_asked += 1
        if address not in self.snapshots:
            raise NoWorker("not there")
        return self.snapshots[address]


class _BenchClock(SystemClock):
    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def now(self) -> float:
        return self._bench.now


class Bench:
    def __init__(self) -> None:
        self.bus = FakeBus()
        self.control = FakeControl()
        self.now = 100.0
        self.members = MembershipView(self.bus, self._refuse, clock=ReadClock(lambda: self.now))  # type: ignore[arg-type]
        self.prefixes = KvIndexFeed(self.control, self.members.view, SystemClock())
        self.cluster = ClusterWatch(self.members, self.prefixes.index, _BenchClock(self))

    async def _refuse(self, address: str) -> Announcement:
        raise NoWorker("nobody")

    def join(self, worker_id: str, **fields: Any) -> None:
        rates = fields.pop("rates", WorkerRates())
        leaving = fields.pop("leaving", False)
        status = ServiceStatus(
            worker_id,
            worker_id.split("-")[0],
            f"{worker_id}:1",
            **{
                "state": ServiceState.READY,
                "model": "m",
                "fingerprint": FINGERPRINT,
                **fields,
            },
        )
        self.members.observe(Announcement(status, 3.0, rates, leaving=leaving))

    def snapshot(self, worker_id: str, sequence: int, *hashes: bytes) -> None:
        self.control.snapshots[f"{worker_id}:1"] = KvSnapshot(worker_id, sequence, hashes)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    await bench.prefixes.start(bench.bus, bench.members)  # type: ignore[arg-type]
    yield bench
    await bench.prefixes.close()


def _hashes(num_tokens: int, salt: str = "") -> list[bytes]:
    root = root_hash(FINGERPRINT.digest(), salt)
    return list(block_hashes(root, range(num_tokens), 4))


async def test_new_worker_is_asked_for_its_cache(bench: Bench) -> None:
    hashes = _hashes(12)
    bench.snapshot("decode-0", 7, *hashes)
    bench.join("decode-0")
    await eventually(lambda: bench.prefixes.index.num_blocks("decode-0") == 3)
    assert bench.cluster.cached_blocks("m", range(12), "") == {"decode-0": 3}
    assert bench.cluster.cached_blocks("m", range(9), "") == {"decode-0": 2}
    assert bench.cluster.cached_blocks("m", range(12), "other tenant") == {}


async def test_events_are_followed_and_a_gap_is_mended(bench: Bench) -> None:
    hashes = _hashes(16)
    bench.snapshot("decode-0", 0)
    bench.join("decode-0")
    await eventually(lambda: bench.control.num_asked == 1)
    await bench.bus.kv("decode-0", 1, hashes[0])
    await eventually(lambda: bench.cluster.cached_blocks("m", range(16), "") == {"decode-0": 1})
    bench.snapshot("decode-0", 3, *hashes[:3])
    await bench.bus.kv("decode-0", 4, hashes[3])
    await eventually(lambda: bench.cluster.cached_blocks("m", range(16), "") == {"decode-0": 4})
    assert bench.control.num_asked == 2
    await eventually(lambda: not bench.prefixes.index.has_gap("decode-0"))


async def test_worker_that_leaves_is_forgotten(bench: Bench) -> None:
    bench.snapshot("decode-0", 1, *_hashes(4))
    bench.join("decode-0")
    await eventually(lambda: bench.prefixes.index.num_blocks("decode-0") == 1)
    bench.join("decode-0", leaving=True)
    assert not bench.prefixes.index.worker_ids
    await bench.bus.kv("decode-0", 2, *_hashes(4))
    assert not bench.prefixes.index.worker_ids


async def test_snapshot_is_asked_for_again_until_it_comes(bench: Bench) -> None:
    bench.join("prefill-0")
    await eventually(lambda: bench.control.num_asked == 1)
    bench.snapshot("prefill-0", 2, *_hashes(8))
    await eventually(lambda: bench.prefixes.index.num_blocks("prefill-0") == 2)


async def test_bad_event_is_passed_over(bench: Bench) -> None:
    await bench.bus.handlers["baton.kv.*"]("baton.kv.x", b"\xff\xff")
    assert not bench.prefixes.index.worker_ids


def test_model_is_resolved_or_named() -> None:
    bench = Bench()
    with pytest.raises(NoWorker):
        bench.cluster.resolve_model("")
    bench.join("decode-0")
    assert bench.cluster.resolve_model("") == bench.cluster.resolve_model("m") == "m"
    with pytest.raises(ModelNotFound, match=r"'x' is not served here; served: 'm'"):
        bench.cluster.resolve_model("x")
    bench.join("decode-1", model="n")
    with pytest.raises(InvalidRequest, match="'m', 'n'"):
        bench.cluster.resolve_model("")


def test_limits_and_places_come_from_the_workers() -> None:
    bench = Bench()
    assert bench.cluster.num_places("m") == 1
    bench.join("decode-0", max_model_len_tokens=900, rates=WorkerRates(max_num_seqs=3))
    bench.join("decode-1", max_model_len_tokens=800, rates=WorkerRates(max_num_seqs=4))
    bench.join("decode-2", state=ServiceState.DRAINING, rates=WorkerRates(max_num_seqs=99))
    assert bench.cluster.max_model_len_tokens("m") == 800
    assert bench.cluster.num_places("m") == 7


def test_tokenizer_that_knows_the_model_and_is_healthy_is_preferred() -> None:
    bench = Bench()
    bench.join("tokenizer-0", models=("x",))
    with pytest.raises(NoWorker):
        bench.cluster.tokenizer("m")
    bench.join("tokenizer-1", models=("x", "m"))
    bench.join("tokenizer-2", models=("m",))
    in_turn = [bench.cluster.tokenizer("m").worker_id for _ in range(4)]
    assert sorted(in_turn) == ["tokenizer-1", "tokenizer-1", "tokenizer-2", "tokenizer-2"]
    assert bench.cluster.tokenizer("m", frozenset({"tokenizer-1:1"})).worker_id == "tokenizer-2"
    both = frozenset({"tokenizer-1:1", "tokenizer-2:1"})
    assert bench.cluster.tokenizer("m", both).worker_id in {"tokenizer-1", "tokenizer-2"}


@pytest.mark.parametrize("has_prefill", [True, False])
def test_load_counts_until_the_prompt_is_computed_and_the_attempt_ends(has_prefill: bool) -> None:
    bench = Bench()
    bench.join("decode-0")
    if has_prefill:
        bench.join("prefill-0")
    job = PlacementJob(model="m", num_tokens=100, ordinal=0)
    placement = place(bench.members.view(), job, PlacementRules(), bench.now)
    prefill_id = "prefill-0" if has_prefill else "decode-0"
    with bench.cluster.placed(placement, 100) as prefilled:
        assert bench.cluster.loads()[prefill_id].prefill_tokens == 100
        assert bench.cluster.loads()["decode-0"].num_requests == 1
        prefilled()
        prefilled()
        assert set(bench.cluster.loads()) == {"decode-0"}
        assert bench.cluster.loads()["decode-0"].prefill_tokens == 0
    assert not bench.cluster.loads()
    with bench.cluster.placed(placement, 100):
        pass
    assert not bench.cluster.loads()


def test_index_is_the_shared_one() -> None:
    bench = Bench()
    assert isinstance(bench.prefixes.index, PrefixIndex)


OTHER = Fingerprint("m", "c", "other", "t", FINGERPRINT.layout)


def _serving(bench: Bench) -> set[str]:
    return {member.worker_id for member in bench.cluster.view()}


async def test_a_worker_that_computes_something_else_is_refused_readably(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.join("decode-0")
    assert _serving(bench) == {"decode-0"}
    bench.join("decode-1", fingerprint=OTHER, uptime_s=99.0)
    bench.join("prefill-0", fingerprint=OTHER)
    bench.join("prefill-1")
    assert _serving(bench) == {"decode-0", "prefill-1"}
    bench.join("decode-1", fingerprint=OTHER, uptime_s=100.0)
    assert _serving(bench) == {"decode-0", "prefill-1"}
    assert bench.cluster.num_refused() == {"decode": 1, "prefill": 1}
    assert {status.worker_id for status in bench.cluster.statuses()} >= {"decode-1", "prefill-0"}
    refusals = [r for r in caplog.records if r.message.startswith("worker refused")]
    assert sorted(r.worker for r in refusals) == ["decode-1", "prefill-0"]  # type: ignore[attr-defined]
    assert refusals[0].differences == "weights: w != other"  # type: ignore[attr-defined]


async def test_new_weights_take_over_when_the_last_old_worker_has_left(bench: Bench) -> None:
    bench.join("decode-0")
    bench.cluster.view()
    bench.join("decode-1", fingerprint=OTHER)
    assert _serving(bench) == {"decode-0"}
    bench.join("decode-0", state=ServiceState.DRAINING)
    assert _serving(bench) == {"decode-1"}
    assert bench.cluster.num_refused() == {"decode": 1}
    bench.join("decode-0", leaving=True)
    assert bench.cluster.num_refused() == {}
