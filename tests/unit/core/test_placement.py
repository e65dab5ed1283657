"""Where a request runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.cluster import ClusterView, Member, ServiceState, ServiceStatus, WorkerRates
from baton.core.errors import NoWorker
from baton.core.hashing import Fingerprint, KvLayout
from baton.core.placement import (
    POLICIES,
    Load,
    Placement,
    PlacementJob,
    PlacementRules,
    can_exchange_kv,
    place,
    place_beside,
)

NOW = 100.0
FINGERPRINT = Fingerprint("m", "c", "w", "t", KvLayout.one_group(16, "float32", (2,), (64,)))


def member(worker_id: str, **changes: Any) -> Member:
    suspect_until_s = changes.pop("suspect_until_s", 0.0)
    rates = WorkerRates(**changes.pop("rates", {}))
    fields = {"state": ServiceState.READY, "model": "m", "fingerprint": FINGERPRINT, **changes}
    status = ServiceStatus(worker_id, worker_id.split("-")[0], f"{worker_id}:1", **fields)
    return Member(status, rates, lease_ends_at_s=NOW + 3, suspect_until_s=suspect_until_s)


def view(*members: Member) -> ClusterView:
    return ClusterView({m.worker_id: m for m in members})


def job(num_tokens: int = 1000, **fields: Any) -> PlacementJob:
    return PlacementJob(
        model="m", num_tokens=num_tokens, ordinal=fields.pop("ordinal", 0), **fields
    )


def run(cluster: ClusterView, job: PlacementJob, policy: str = "slo", **rules: Any) -> Placement:
    return place(cluster, job, PlacementRules(policy=policy, **rules), NOW)


def ids(placement: Placement) -> tuple[str, str]:
    return (placement.prefill.worker_id if placement.prefill else "", placement.decode.worker_id)


CLUSTER = view(*(member(f"{role}-{i}") for role in ("prefill", "decode") for i in range(3)))


@pytest.mark.parametrize("policy", POLICIES)
def test_equal_workers_take_turns(policy: str) -> None:
    used = [ids(run(CLUSTER, job(ordinal=i), policy)) for i in range(6)]
    assert {p for p, _ in used} == {"prefill-0", "prefill-1", "prefill-2"}
    assert {d for _, d in used} == {"decode-0", "decode-1", "decode-2"}


def test_only_workers_that_compute_the_same_go_on_with_an_output() -> None:
    other = replace(FINGERPRINT, weights_hash="other")
    cluster = view(
        member("decode-0", num_requests_running=40),
        member("decode-1", fingerprint=other),
        member("prefill-0", fingerprint=other),
    )
    going_on = job(digest=FINGERPRINT.digest())
    assert ids(run(cluster, job())) == ("prefill-0", "decode-1")
    assert ids(run(cluster, going_on)) == ("", "decode-0")
    assert place_beside(cluster, "decode-1", job(), NOW) is not None
    assert place_beside(cluster, "decode-1", going_on, NOW) is None
    with pytest.raises(NoWorker):
        run(cluster, job(digest=b"of nobody"))


@pytest.mark.parametrize("policy", ["least_loaded", "slo"])
def test_busy_workers_are_avoided(policy: str) -> None:
    cluster = view(
        member("decode-0", num_requests_running=40),
        member("decode-1", num_requests_running=2),
        member("prefill-0", rates={"queued_prefill_tokens": 9000}),
        member("prefill-1", rates={"queued_prefill_tokens": 10}),
    )
    for ordinal in range(4):
        assert ids(run(cluster, job(ordinal=ordinal), policy)) == ("prefill-1", "decode-1")


@pytest.mark.parametrize("policy", ["least_loaded", "slo"])
def test_what_was_just_placed_counts_before_it_is_announced(policy: str) -> None:
    loads = {"prefill-0": Load(3, 5000), "decode-0": Load(9, 0), "decode-1": Load(9, 0)}
    placement = run(CLUSTER, job(loads=loads), policy)
    assert placement.decode.worker_id == "decode-2"
    assert placement.prefill is not None
    assert placement.prefill.worker_id != "prefill-0"


@pytest.mark.parametrize("policy", ["prefix_aware", "slo"])
def test_a_cached_prefix_attracts(policy: str) -> None:
    cached = {"prefill-2": 60, "decode-1": 10}
    for ordinal in range(3):
        placement = run(CLUSTER, job(ordinal=ordinal, cached_blocks=cached), policy)
        assert ids(placement) == ("prefill-2", "decode-1")
        assert placement.prefill_cached_tokens == 960
        assert placement.decode_cached_tokens == 160


@pytest.mark.parametrize(("num_running", "wins"), [(2, True), (8, False)])
def test_prefix_aware_leaves_a_crowded_worker_for_an_idle_one(num_running: int, wins: bool) -> None:
    cluster = view(member("decode-0", num_requests_running=num_running), member("decode-1"))
    placement = run(cluster, job(cached_blocks={"decode-0": 60}), "prefix_aware")
    assert (placement.decode.worker_id == "decode-0") is wins


def test_a_cached_prefix_does_not_outweigh_a_long_queue() -> None:
    cluster = view(
        member("decode-0"),
        member("prefill-0", rates={"queued_prefill_tokens": 50_000}),
        member("prefill-1"),
    )
    placement = run(cluster, job(cached_blocks={"prefill-0": 60}))
    assert ids(placement) == ("prefill-1", "decode-0")


def test_faster_prefill_worker_wins() -> None:
    cluster = view(
        member("decode-0"),
        member("prefill-0", rates={"prefill_tokens_per_s": 100.0}),
        member("prefill-1", rates={"prefill_tokens_per_s": 9000.0}),
    )
    assert ids(run(cluster, job()))[0] == "prefill-1"
    assert run(cluster, job()).reason == "lowest_ttft"


def test_decode_worker_without_room_is_avoided() -> None:
    cluster = view(
        member("decode-0", kv_blocks={"free": 3, "cached": 4, "in_use": 93}),
        member("decode-1", kv_blocks={"free": 50, "cached": 40, "in_use": 10}),
        member("prefill-0"),
    )
    assert {ids(run(cluster, job(ordinal=i)))[1] for i in range(2)} == {"decode-1"}


@pytest.mark.parametrize(
    ("num_tokens", "cached", "reason"),
    [(31, 0, "short_suffix"), (32, 0, "lowest_ttft"), (1000, 62, "short_suffix")],
)
def test_short_uncached_suffix_is_computed_by_the_decode_worker(
    num_tokens: int, cached: int, reason: str
) -> None:
    cluster = view(member("decode-0"), member("prefill-0"))
    placement = run(cluster, job(num_tokens, cached_blocks={"decode-0": cached}))
    assert placement.reason == reason
    assert placement.is_local == (reason == "short_suffix")
    assert placement.decision == ("local" if placement.is_local else "disaggregated")


def test_local_when_it_is_predicted_to_be_faster_and_its_speed_is_known() -> None:
    prefill = member("prefill-0", rates={"queued_prefill_tokens": 20_000})
    known = member("decode-0", rates={"prefill_tokens_per_s": 2000.0})
    assert run(view(known, prefill), job()).reason == "local_predicted_faster"
    assert run(view(member("decode-0"), prefill), job()).reason == "lowest_ttft"
    busy = member("decode-0", rates={"prefill_tokens_per_s": 2000.0}, num_requests_running=50)
    assert run(view(busy, prefill), job()).reason == "lowest_ttft"


def test_forced_disaggregation_never_goes_local_while_there_is_a_prefill_worker() -> None:
    suspect = member("prefill-0", suspect_until_s=NOW + 5)
    for prefill in (member("prefill-0"), suspect):
        placement = run(view(member("decode-0"), prefill), job(1), force_disaggregation=True)
        assert (ids(placement)[0], placement.reason) == ("prefill-0", "forced")
    assert run(view(member("decode-0")), job(), force_disaggregation=True).is_local


@pytest.mark.parametrize(
    "prefill",
    [
        member("prefill-0", state=ServiceState.DRAINING),
        member("prefill-0", suspect_until_s=NOW + 5),
        member("prefill-0", model="other"),
        member("prefill-0", fingerprint=Fingerprint("m", "c", "OTHER", "t", FINGERPRINT.layout)),
    ],
)
def test_no_usable_prefill_worker_means_local(prefill: Member) -> None:
    placement = run(view(member("decode-0"), prefill), job())
    assert (placement.is_local, placement.reason) == (True, "no_prefill_worker")


def test_failed_prefill_worker_is_left_out_even_if_alone() -> None:
    placement = run(CLUSTER, job(excluded=frozenset({"prefill-0", "prefill-1", "prefill-2"})))
    assert placement.is_local


def test_failed_or_suspected_decode_worker_is_used_only_when_alone() -> None:
    suspect = member("decode-0", suspect_until_s=NOW + 5)
    assert run(view(suspect), job()).decode.worker_id == "decode-0"
    assert run(view(suspect, member("decode-1")), job()).decode.worker_id == "decode-1"
    excluded = frozenset({"decode-0"})
    assert run(view(member("decode-0")), job(excluded=excluded)).decode.worker_id == "decode-0"
    healthy = view(member("decode-0"), member("decode-1"))
    assert run(healthy, job(excluded=excluded)).decode.worker_id == "decode-1"


def test_without_decode_worker_there_is_no_placement() -> None:
    for cluster in (view(), view(member("decode-0", model="other")), view(member("prefill-0"))):
        with pytest.raises(NoWorker) as caught:
            run(cluster, job())
        assert caught.value.retry_after_s


def test_unknown_fingerprints_are_trusted_until_the_hand_off() -> None:
    assert can_exchange_kv(member("prefill-0", fingerprint=None), member("decode-0"))


_MEMBERS = st.builds(
    member,
    st.from_regex(r"(prefill|decode)-[0-5]", fullmatch=True),
    state=st.sampled_from(ServiceState),
    num_requests_running=st.integers(0, 100),
    suspect_until_s=st.sampled_from([0.0, NOW + 1]),
    kv_blocks=st.sampled_from([{}, {"free": 0}, {"free": 100, "cached": 5}]),
    fingerprint=st.sampled_from([None, FINGERPRINT]),
    rates=st.fixed_dictionaries({
        "prefill_tokens_per_s": st.floats(0, 1e6),
        "decode_step_s": st.floats(0, 10),
        "queued_prefill_tokens": st.integers(0, 10**7),
        "push_bytes_per_s": st.floats(0, 1e12),
        "max_num_seqs": st.integers(0, 512),
    }),
)
_IDS = [f"{role}-{i}" for role in ("prefill", "decode") for i in range(6)]


@given(
    st.lists(_MEMBERS, max_size=8),
    st.sampled_from(sorted(POLICIES)),
    st.builds(
        job,
        st.integers(1, 10**6),
        ordinal=st.integers(0, 10**6),
        cached_blocks=st.dictionaries(st.sampled_from(_IDS), st.integers(0, 10**5)),
        excluded=st.frozensets(st.sampled_from(_IDS)),
    ),
    st.booleans(),
)
def test_any_cluster_gives_a_sound_placement_or_no_worker(
    members: list[Member], policy: str, request: PlacementJob, force: bool
) -> None:
    cluster = view(*members)
    ready = [m for m in cluster if m.status.state is ServiceState.READY]
    decodes = {m.worker_id for m in ready if m.status.role == "decode"}
    if not decodes:
        with pytest.raises(NoWorker):
            run(cluster, request, policy, force_disaggregation=force)
        return
    placement = run(cluster, request, policy, force_disaggregation=force)
    assert placement.decode.worker_id in decodes
    assert 0 <= placement.decode_cached_tokens < request.num_tokens
    assert 0 <= placement.prefill_cached_tokens < request.num_tokens
    assert placement.predicted_ttft_s >= 0
    fresh = {m.worker_id for m in ready if m.is_usable(NOW)} - request.excluded
    if fresh & decodes:
        assert placement.decode.worker_id in fresh
    if placement.prefill is not None and not force:
        assert placement.prefill.worker_id in fresh
