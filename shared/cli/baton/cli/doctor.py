"""`baton doctor`: what is wrong with a system, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from baton.cli.diagnosis import ERROR, OK, WARNING, Finding, diagnose
from baton.cli.examination import Examination, MeasuredPath, examine, leftovers
from baton.cli.target import NoSystem

_STYLES = {OK: "green", WARNING: "yellow", ERROR: "bold red"}


def doctor(console: Console, address: str, num_probe_bytes: int, *, as_json: bool) -> int:
    """Examines a system and prints what was found; exit status 1 when there is an error."""
    try:
        seen = examine(address, num_probe_bytes)
        findings = diagnose(seen)
    except NoSystem as error:
        seen = Examination(is_bus_connected=False, leftover_pids=leftovers())
        found = [finding for finding in diagnose(seen) if finding.check == "leftovers"]
        findings = [Finding("services", ERROR, str(error), "start one with `baton up`"), *found]
    if as_json:
        console.print_json(data=to_document(findings, seen))
    else:
        _print(console, findings)
    return 1 if any(finding.level == ERROR for finding in findings) else 0


def to_document(findings: list[Finding], seen: Examination) -> dict[str, Any]:
    """What `baton doctor --json` prints."""
    return {
        "healthy": all(finding.level != ERROR for finding in findings),
        "findings": [asdict(finding) for finding in findings],
        "paths": [_path_document(path) for path in seen.paths],
        "clock_offsets_s": {
            subject.known.worker_id: subject.own.clock_offset_s
            for subject in seen.subjects
            if subject.own is not None
        },
    }


def _path_document(path: MeasuredPath) -> dict[str, Any]:
    workers = {"prefill": path.prefill_id, "decode": path.decode_id}
    if path.error:
        return {**workers, "error": path.error}
    return {**workers, "bytes_per_s": path.bytes_per_s, "round_trip_s": path.round_trip_s}


def _print(console: Console, findings: list[Finding]) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for finding in findings:
        text = Text(finding.text)
        if finding.advice:
            text.append(f"\n→ {finding.advice}", style="dim")
        table.add_row(Text(finding.level, style=_STYLES[finding.level]), finding.check, text)
    console.print(table)
    counts = {level: sum(f.level == level for f in findings) for level in (ERROR, WARNING)}
    console.print(f"{counts[ERROR]} errors, {counts[WARNING]} warnings")
