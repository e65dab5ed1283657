"""A request's stage breakdown as a table, and what it adds up to."""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from baton.client import Completion, Stage

_MIN_MB_PER_S_DURATION_S = 1e-6


@dataclass(frozen=True, slots=True)
class StageSum:
    """The stages before the first token against what the client saw."""

    ttft_ms: float
    stages_ms: float

    @property
    def gap_pct(self) -> float:
        """Part of the client's time to first token that no stage explains (or explains twice)."""
        if self.ttft_ms <= 0:
            return 100.0
        return abs(self.ttft_ms - self.stages_ms) / self.ttft_ms * 100.0


def sum_stages(completion: Completion) -> StageSum:
    """The sum of the stages on the path to the first token."""
    stages_s = sum(stage.duration_s for stage in completion.stages if stage.before_first_token)
    return StageSum(ttft_ms=(completion.ttft_s or 0.0) * 1e3, stages_ms=stages_s * 1e3)


def print_stages(console: Console, completion: Completion) -> None:
    """One line per stage, with bytes and speed of the hand-off, then sum and placement."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("stage")
    table.add_column("start ms", justify="right")
    table.add_column("ms", justify="right")
    table.add_column("")
    table.add_column("worker", style="dim")
    for is_before in (True, False):
        for stage in completion.stages:
            if stage.before_first_token is is_before:
                table.add_row(
                    stage.name,
                    f"{stage.start_s * 1e3:.1f}",
                    f"{stage.duration_s * 1e3:.2f}",
                    Text(_facts(stage), style="" if stage.num_bytes else "dim"),
                    Text(stage.worker_id),
                )
        table.add_section()
    console.print(table, highlight=False)
    total = sum_stages(completion)
    console.print(
        f"to the first token: {total.stages_ms:.1f} ms in stages, {total.ttft_ms:.1f} ms at the"
        f" client, gap {total.gap_pct:.1f} %",
        highlight=False,
    )
    _print_summary(console, completion)


def _print_summary(console: Console, completion: Completion) -> None:
    usage = completion.usage
    parts = [f"{usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached)"]
    decode_s = completion.elapsed_s - (completion.ttft_s or 0.0)
    if usage.completion_tokens > 1 and decode_s > 0:
        rate = (usage.completion_tokens - 1) / decode_s
        parts.append(f"{usage.completion_tokens} output tokens at {rate:.0f} tokens/s")
    if usage.draft_tokens:
        share = usage.accepted_tokens / usage.draft_tokens
        parts.append(f"{share:.0%} of {usage.draft_tokens} draft tokens accepted")
    if placement := completion.placement:
        where = "prefill at the decode worker" if placement.local_prefill else "prefill apart"
        parts.append(f"{where} ({placement.reason}), attempt {placement.attempts}")
    console.print("; ".join(parts), style="dim", highlight=False)


def _facts(stage: Stage) -> str:
    facts = []
    if stage.num_tokens:
        facts.append(f"{stage.num_tokens} tokens")
    if stage.num_bytes:
        facts.append(f"{stage.num_bytes / 1e6:.2f} MB")
        active_s = stage.duration_s - stage.idle_s
        if active_s > _MIN_MB_PER_S_DURATION_S:
            # Between chunks a hand-off waits for the next one to be computed: no fault of the path.
            facts.append(f"{stage.num_bytes / 1e6 / active_s:.0f} MB/s")
    return ", ".join(facts)
