"""How much of a hand-off a client notices."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmarks.handoff.caller import Caller, Timed, make_prompt
from benchmarks.handoff.processes import Processes, core_of


@dataclass(slots=True)
class OverlapFigures:
    """Interleaved requests: computed and handed over, and computed only."""

    alone: list[Timed] = field(default_factory=list)
    handed: list[Timed] = field(default_factory=list)
    alone_cpu_s: list[float] = field(default_factory=list)
    """Processor time of the prefill worker, per request."""
    handed_cpu_s: list[float] = field(default_factory=list)

    @property
    def added_ttft_fraction(self) -> float:
        """What reserving and pushing add to the time to the first token."""
        pairs = zip(self.handed, self.alone, strict=True)
        return median(one.first_token_s / other.first_token_s for one, other in pairs) - 1.0

    @property
    def added_cpu_fraction(self) -> float:
        """What it adds to the prefill worker's processor time: disturbed less by other work."""
        return median(self.handed_cpu_s) / median(self.alone_cpu_s) - 1.0

    @property
    def hidden_fraction(self) -> float:
        """Part of the transfer that ran while the prompt was computed."""
        return median(one.transfer.hidden_fraction for one in self.handed if one.transfer)

    @property
    def exposed_s(self) -> float:
        """From the first token to the decode worker's commit."""
        return median(one.transfer.exposed_s for one in self.handed if one.transfer)


async def measure_overlap(
    model: Path,
    logs: Path,
    num_tokens: int,
    num_rounds: int,
    note: Callable[[str], None],
    **prefill_settings: object,
) -> OverlapFigures:
    """Times prompts of `num_tokens`, with and without a hand-off, by turns."""
    rng = random.Random(num_tokens)
    num_blocks = 4 * (num_tokens // 16 + 8)
    figures = OverlapFigures()
    async with Processes(logs) as processes:
        common: dict[str, object] = {"model_path": model, "num_blocks": num_blocks}
        note("starting a prefill and a decode worker")
        decode, prefill = await asyncio.gather(
            processes.start("decode", **common, cores=core_of(1)),
            processes.start("prefill", **common, cores=core_of(0), **prefill_settings),
        )
        alone = Caller(processes.channels, prefill)
        handing = Caller(processes.channels, prefill, decode)
        for index in range(num_rounds + 1):
            order = [
                (alone, figures.alone, figures.alone_cpu_s),
                (handing, figures.handed, figures.handed_cpu_s),
            ]
            for caller, found, cpu_s in order if index % 2 else reversed(order):
                before_s = await processes.cpu_s(prefill)
                timed = await caller.run(make_prompt(rng, num_tokens))
                if index:  # the first round connects and warms up
                    found.append(timed)
                    cpu_s.append(await processes.cpu_s(prefill) - before_s)
            if index:
                note(
                    f"round {index}: {figures.alone[-1].first_token_s * 1e3:.0f} ms alone, "
                    f"{figures.handed[-1].first_token_s * 1e3:.0f} ms handed over"
                )
    return figures
