"""What an examination means: pure. Each finding says what is wrong and what to do about it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

from baton.cli.examination import Examination, Subject
from baton.core.blocks import BlockState
from baton.core.cluster import ServiceState, ServiceStatus
from baton.core.roles import Role

OK, WARNING, ERROR = "ok", "warning", "error"
MAX_CLOCK_OFFSET_S = 0.1
SLOW_PATH_BYTES_PER_S = 50e6
_WORKER_ROLES = {Role.PREFILL, Role.DECODE}
_IDLE_STATES = {BlockState.FREE.value, BlockState.CACHED.value}
_NEEDED = {
    Role.DECODE: (ERROR, "nothing can be generated", "start a decode worker"),
    Role.TOKENIZER: (ERROR, "text cannot be read or written", "start a tokenizer"),
    Role.PREFILL: (WARNING, "decode workers compute all prompts", "start a prefill worker"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked."""

    check: str
    level: str
    """ok, warning or error."""
    text: str
    advice: str = ""


_Findings = Iterator[tuple[str, str, str] | tuple[str, str]]
"""Level, text and, unless all is well, advice."""


def diagnose(seen: Examination) -> list[Finding]:
    """Everything that was checked, in the order in which it is best read."""
    findings = []
    for name, check, all_well in _CHECKS:
        found = [Finding(name, *finding) for finding in check(seen)]
        findings += found or [Finding(name, OK, all_well)]
    return findings


def _up(seen: Examination) -> list[ServiceStatus]:
    return [subject.own.status for subject in seen.subjects if subject.own is not None]


def _name(status: ServiceStatus) -> str:
    return f"{status.worker_id or status.role} at {status.address}"


def _services(seen: Examination) -> _Findings:
    for subject in seen.subjects:
        known = subject.known
        if subject.own is None:
            yield (
                ERROR,
                f"{_name(known)} does not answer",
                f"look at the end of its log, and start the {known.role} again; is the address"
                " reachable from here?",
            )
        elif subject.own.status.state is not ServiceState.READY:
            state = subject.own.status.state.value
            yield WARNING, f"{_name(known)} is {state}", "wait for it, or look at its log"
    roles = {status.role for status in _up(seen)}
    for role, (level, effect, advice) in _NEEDED.items():
        if role not in roles:
            yield level, f"there is no {role} that answers: {effect}", advice


def _versions(seen: Examination) -> _Findings:
    by_version = defaultdict(list)
    for status in _up(seen):
        by_version[status.version].append(status.worker_id)
    if len(by_version) > 1:
        parts = (f"{version}: {', '.join(ids)}" for version, ids in sorted(by_version.items()))
        yield WARNING, "versions differ: " + "; ".join(parts), "upgrade the older ones"


def _compatibility(seen: Examination) -> _Findings:
    # Decode workers before prefill workers, the oldest first.
    workers = sorted(_up(seen), key=lambda status: (status.role, -status.uptime_s))
    first: dict[str, ServiceStatus] = {}
    for status in workers:
        if status.role not in _WORKER_ROLES or status.fingerprint is None:
            continue
        reference = first.setdefault(status.model, status)
        differences = (reference.fingerprint or status.fingerprint).differences(status.fingerprint)
        if differences:
            yield (
                ERROR,
                f"{_name(status)} serves {status.model!r} but does not compute what"
                f" {_name(reference)} does: {'; '.join(differences)}",
                "it gets nothing to do: start it with the same model directory, dtype, block size"
                " and quantization, or under another --model-name",
            )


def _bus(seen: Examination) -> _Findings:
    if seen.is_broker_listening is False:
        yield ERROR, "the NATS server of this system does not listen", "`baton down && baton up`"
    is_any_away = False
    for subject in seen.subjects:
        known = subject.known
        if subject.scrape is not None and subject.scrape.is_bus_connected is False:
            is_any_away = True
            yield (
                WARNING,
                f"{_name(known)} is not connected to NATS",
                "requests go on, but joining workers and cached prefixes are noticed late: check"
                " BATON_NATS_URL and that the server runs",
            )
        elif subject.scrape is None and subject.own is not None:
            yield (
                WARNING,
                f"metrics of {_name(known)} cannot be read at"
                f" {known.metrics_address or 'any port'}",
                "is the port open to this machine? Prometheus may not reach it either",
            )
    if not is_any_away and not seen.is_bus_connected:
        yield WARNING, "the scheduler is not connected to NATS", "check BATON_NATS_URL"


def _blocks(seen: Examination) -> _Findings:
    for subject in seen.subjects:
        if subject.own is None or subject.own.status.role not in _WORKER_ROLES:
            continue
        status = subject.own.status
        pool = int(status.stats.get("num_kv_blocks", 0))
        counts = {"its status": status.kv_blocks}
        if subject.scrape is not None:
            counts["its metrics"] = subject.scrape.kv_blocks
        for source, by_state in counts.items():
            total = sum(by_state.values())
            if pool and total != pool:
                yield (
                    ERROR,
                    f"{_name(status)}: blocks by state add up to {total} in {source}, the pool has"
                    f" {pool}",
                    "this is a defect: restart the worker and report it",
                )
        held = _held_while_idle(subject)
        if held:
            yield (
                WARNING,
                f"{_name(status)} holds {held} KV blocks though it runs nothing",
                "leases end within seconds; if it is still so in a minute, this is a leak: report"
                " it with the worker's log",
            )


def _held_while_idle(subject: Subject) -> int:
    """Blocks held at both looks while nothing ran."""
    looks = [answer.status for answer in (subject.own, subject.later) if answer is not None]
    if any(status.num_requests_running + status.num_requests_waiting for status in looks):
        return 0
    return min(
        sum(n for state, n in status.kv_blocks.items() if state not in _IDLE_STATES)
        for status in looks
    )


def _clocks(seen: Examination) -> _Findings:
    for subject in seen.subjects:
        answer = subject.own
        if answer is None or answer.clock_offset_s is None:
            continue
        if abs(answer.clock_offset_s) - answer.clock_error_s > MAX_CLOCK_OFFSET_S:
            yield (
                WARNING,
                f"the clock of {_name(answer.status)} is {answer.clock_offset_s:+.3f} s off this"
                " one's",
                "traces will show its stages at the wrong time (leases are not affected): run NTP"
                " or chrony there",
            )


def _cores(seen: Examination) -> _Findings:
    by_host = defaultdict(list)
    for status in _up(seen):
        if status.role in _WORKER_ROLES:
            by_host[status.address.rpartition(":")[0]].append(status)
    for host, workers in by_host.items():
        unpinned = [status.worker_id for status in workers if not status.cores]
        if unpinned and len(workers) > 1:
            yield (
                WARNING,
                f"{len(workers)} workers on {host}, and not pinned to cores: {', '.join(unpinned)}",
                "threads that share cores starve each other: give each its own with --cores",
            )
        for one, other in combinations(workers, 2):
            shared = sorted({*one.cores} & {*other.cores})
            if shared:
                yield (
                    WARNING,
                    f"{one.worker_id} and {other.worker_id} share cores"
                    f" {', '.join(map(str, shared))} of {host}",
                    "start fewer workers, or give each its own with --cores",
                )


def _paths(seen: Examination) -> _Findings:
    for path in seen.paths:
        ends = f"{path.prefill_id} to {path.decode_id}"
        figures = (
            f"{ends}: {path.bytes_per_s / 1e6:.0f} MB/s, round trip"
            f" {path.round_trip_s * 1e3:.2f} ms"
        )
        if path.error:
            yield (
                ERROR,
                f"no KV can go from {ends}: {path.error}",
                "can the prefill worker reach the decode worker's address (advertise_host, network"
                " policies, TLS)?",
            )
        elif path.bytes_per_s < SLOW_PATH_BYTES_PER_S:
            yield WARNING, figures, "hand-offs will be slow: put them closer, or compute locally"
        else:
            yield OK, figures


def _leftovers(seen: Examination) -> _Findings:
    if seen.leftover_pids:
        pids = ", ".join(map(str, seen.leftover_pids))
        yield ERROR, f"processes of an earlier run still live: {pids}", "run `baton down`"


_CHECKS = (
    ("services", _services, "every process answers"),
    ("versions", _versions, "all processes run the same version"),
    ("compatibility", _compatibility, "workers of a model compute the same"),
    ("bus", _bus, "every process is connected to NATS"),
    (
        "blocks",
        _blocks,
        "KV blocks by state add up to every pool, and none is held without a request",
    ),
    ("clocks", _clocks, "wall clocks agree"),
    ("cores", _cores, "no two workers share a core"),
    ("paths", _paths, "no prefill and decode worker to measure between"),
    ("leftovers", _leftovers, "nothing is left over from an earlier run"),
)
