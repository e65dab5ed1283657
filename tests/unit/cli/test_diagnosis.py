"""What the doctor makes of what it saw."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from baton.cli.diagnosis import ERROR, OK, WARNING, Finding, diagnose
from baton.cli.examination import (
    DirectAnswer,
    Examination,
    MeasuredPath,
    Scrape,
    Subject,
    parse_scrape,
)
from baton.core.cluster import ServiceState, ServiceStatus
from baton.core.hashing import Fingerprint, KvLayout

FINGERPRINT = Fingerprint("m", "c", "w", "t", KvLayout.one_group(16, "float32", (1,), (8,)))
BLOCKS = {"free": 6, "cached": 2}


def status(worker_id: str, **changes: Any) -> ServiceStatus:
    role, _, number = worker_id.partition("-")
    fields = {
        "state": ServiceState.READY,
        "model": "m",
        "version": "1",
        "cores": (int(number) + (10 if role == "decode" else 0),),
        "fingerprint": FINGERPRINT if role in {"prefill", "decode"} else None,
        "kv_blocks": BLOCKS if role in {"prefill", "decode"} else {},
        "stats": {"num_kv_blocks": 8.0},
        **changes,
    }
    return ServiceStatus(worker_id, role, f"h:{worker_id}", **fields)


def subject(worker_id: str, *, offset_s: float = 0.0, **changes: Any) -> Subject:
    own = status(worker_id, **changes)
    word = DirectAnswer(own, offset_s, 0.001)
    return Subject(own, word, word, Scrape(dict(own.kv_blocks), is_bus_connected=True))


def seen(*subjects: Subject, **fields: Any) -> Examination:
    others = [subject(name) for name in ("tokenizer-0", "prefill-0", "decode-0")]
    names = {item.known.worker_id for item in subjects}
    kept = [item for item in others if item.known.worker_id not in names]
    path = MeasuredPath("prefill-0", "decode-0", 5e8, 0.001)
    return Examination(**{
        "is_bus_connected": True,
        "subjects": (*kept, *subjects),
        "paths": (path,),
        **fields,
    })


def bad(examination: Examination) -> list[Finding]:
    return [finding for finding in diagnose(examination) if finding.level != OK]


def test_a_healthy_system_has_only_good_findings() -> None:
    findings = diagnose(seen())
    assert {finding.level for finding in findings} == {OK}
    assert len({finding.check for finding in findings}) == 9
    assert "500 MB/s" in next(f.text for f in findings if f.check == "paths")


def lost(worker_id: str) -> Subject:
    return Subject(status(worker_id, state=ServiceState.LOST), None, None, None)


def holding(**changes: Any) -> Subject:
    return subject("decode-0", kv_blocks={"free": 5, "in_use": 3}, **changes)


CASES: list[tuple[Examination, str, str, str]] = [
    (seen(lost("decode-1")), "services", ERROR, "decode-1 at h:decode-1 does not answer"),
    (seen(lost("decode-0")), "services", ERROR, "there is no decode"),
    (seen(lost("prefill-0")), "services", WARNING, "there is no prefill"),
    (seen(subject("cache-0", state=ServiceState.DRAINING)), "services", WARNING, "is draining"),
    (seen(subject("cache-0", version="2")), "versions", WARNING, "2: cache-0"),
    (
        seen(subject("prefill-1", fingerprint=replace(FINGERPRINT, weights_hash="x"))),
        "compatibility",
        ERROR,
        "does not compute what decode-0 at h:decode-0 does: weights: w != x",
    ),
    (seen(is_broker_listening=False), "bus", ERROR, "does not listen"),
    (seen(is_bus_connected=False), "bus", WARNING, "the scheduler is not connected"),
    (
        seen(replace(subject("cache-0"), scrape=Scrape({}, is_bus_connected=False))),
        "bus",
        WARNING,
        "cache-0 at h:cache-0 is not connected",
    ),
    (seen(replace(subject("cache-0"), scrape=None)), "bus", WARNING, "metrics of cache-0"),
    (
        seen(subject("decode-0", kv_blocks={"free": 7})),
        "blocks",
        ERROR,
        "add up to 7 in its status, the pool has 8",
    ),
    (
        seen(replace(subject("decode-0"), scrape=Scrape({"free": 9}, is_bus_connected=True))),
        "blocks",
        ERROR,
        "add up to 9 in its metrics",
    ),
    (seen(holding()), "blocks", WARNING, "holds 3 KV blocks though it runs nothing"),
    (seen(subject("cache-0", offset_s=-0.2)), "clocks", WARNING, "-0.200 s off"),
    (seen(subject("decode-1", cores=(10, 99))), "cores", WARNING, "share cores 10 of h"),
    (seen(subject("decode-1", cores=())), "cores", WARNING, "3 workers on h"),
    (
        seen(paths=(MeasuredPath("p", "d", 1e6, 0.2),)),
        "paths",
        WARNING,
        "p to d: 1 MB/s, round trip 200.00 ms",
    ),
    (
        seen(paths=(MeasuredPath("p", "d", error="UNAVAILABLE: no"),)),
        "paths",
        ERROR,
        "no KV can go from p to d: UNAVAILABLE: no",
    ),
    (seen(leftover_pids=(7, 8)), "leftovers", ERROR, "still live: 7, 8"),
]


@pytest.mark.parametrize(("examination", "check", "level", "text"), CASES)
def test_what_is_wrong_is_found(
    examination: Examination, check: str, level: str, text: str
) -> None:
    found = [f for f in bad(examination) if text in f.text]
    assert [(f.check, f.level) for f in found] == [(check, level)]
    assert all(finding.advice for finding in bad(examination))


def test_what_a_running_request_holds_is_no_leak() -> None:
    assert bad(seen(holding(num_requests_running=1))) == []
    freed = DirectAnswer(status("decode-0"), 0.0, 0.001)
    assert bad(seen(replace(holding(), later=freed))) == []


def test_a_small_offset_or_an_unsure_one_is_none() -> None:
    unsure = DirectAnswer(status("cache-0"), 0.5, 0.45)
    assert bad(seen(replace(subject("cache-0"), own=unsure, later=unsure))) == []
    assert bad(seen(subject("cache-0", offset_s=0.09))) == []


def test_a_scrape_is_read() -> None:
    page = (
        "# HELP baton_kv_blocks KV blocks\n# TYPE baton_kv_blocks gauge\n"
        'baton_kv_blocks{state="free"} 6.0\nbaton_kv_blocks{state="held"} 2.0\n'
        "baton_bus_connected 0.0\nother 1.0\n"
    )
    assert parse_scrape(page) == Scrape({"free": 6, "held": 2}, is_bus_connected=False)
    assert parse_scrape("") == Scrape({}, is_bus_connected=None)
