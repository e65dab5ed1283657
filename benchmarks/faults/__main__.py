"""Hand-offs with a random fault in each: no wrong token, no held block, no request without an end.

    python -m benchmarks.faults --handoffs 2000 --json
    python -m benchmarks.faults --handoffs 100 --seed 7 --concurrency 4

Starts a broker, a tokenizer, a scheduler, two prefill and two decode workers with a tiny random
model as processes of their own. Each hand-off gets one fault: a worker killed with SIGKILL at a
random moment (and replaced), a chunk or the manifest dropped, a delay past the lease, a chunk
corrupted, sent twice or out of order, a stale epoch, a cancel by the client at a random point, or
a deadline that is too short. Output is compared with that of an undisturbed run: all of it where a
request finished, what came of it otherwise. All the while the workers' metrics are read: blocks by
state must add up to the pool in each scrape. Exit status 1 when anything is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.faults.injection import WEIGHTS
from benchmarks.faults.storm import MODEL, Outcome, Storm
from tests.support.system import System
from tests.support.tiny_models import make_tiny_model

_PROGRESS_INTERVAL_S = 5.0
_DEFECTS = frozenset({"INTERNAL", "HANGS"})


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options; ends the process on wrong ones."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--handoffs", type=int, default=200, help="how many (default: %(default)s)")
    add("--concurrency", type=int, default=8, help="at a time (default: %(default)s)")
    add("--seed", type=int, default=1, help="of prompts and faults (default: %(default)s)")
    add("--directory", type=Path, help="keep the processes' logs here")
    add("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args(argv)
    if min(options.handoffs, options.concurrency) < 1:
        parser.error("--handoffs and --concurrency must be at least 1")
    return options


class Progress:
    """Says how far a storm is, every few seconds."""

    def __init__(self, num_handoffs: int) -> None:
        self._num_handoffs = num_handoffs
        self._began_at_s = self._said_at_s = time.monotonic()

    def __call__(self, storm: Storm) -> None:
        """Takes note of another outcome."""
        now, done = time.monotonic(), len(storm.outcomes)
        if now - self._said_at_s < _PROGRESS_INTERVAL_S:
            return
        self._said_at_s = now
        left_s = (now - self._began_at_s) / done * (self._num_handoffs - done)
        facts = totals(storm.outcomes)
        note(
            f"{done}/{self._num_handoffs}, about {left_s:.0f} s left; {storm.num_kills} kills, "
            + ", ".join(f"{count} {name}" for name, count in facts.items())
        )


def note(text: str) -> None:
    """Progress."""
    sys.stderr.write(f"  ... {text}\n")
    sys.stderr.flush()


def totals(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """What it all comes to."""
    return {
        "wrong_tokens": sum(outcome.is_wrong for outcome in outcomes),
        "hangs": sum(outcome.is_hung for outcome in outcomes),
        "finished": sum(not outcome.error for outcome in outcomes),
        "typed_errors": sum(bool(o.error) and o.error not in _DEFECTS for o in outcomes),
        "internal_errors": sum(outcome.error == "INTERNAL" for outcome in outcomes),
    }


def table(outcomes: Sequence[Outcome]) -> str:
    """A line per kind of fault."""
    lines = [
        f"{'fault':<15}{'count':>6}{'finished':>10}{'retried':>9}{'p50 s':>8}{'p99 s':>8}  errors"
    ]
    for kind in WEIGHTS:
        of_kind = [outcome for outcome in outcomes if outcome.kind == kind]
        if not of_kind:
            continue
        times = sorted(outcome.elapsed_s for outcome in of_kind)
        errors = Counter(outcome.error for outcome in of_kind if outcome.error)
        lines.append(
            f"{kind:<15}{len(of_kind):>6}{sum(not o.error for o in of_kind):>10}"
            f"{sum(o.num_attempts > 1 for o in of_kind):>9}"
            f"{times[len(times) // 2]:>8.2f}{times[int(0.99 * len(times))]:>8.2f}  "
            + ", ".join(f"{name} {count}" for name, count in errors.most_common())
        )
    return "\n".join(lines)


async def measure(options: argparse.Namespace, directory: Path) -> dict[str, object]:
    """Runs everything; returns the figures."""
    note("starting processes")
    model = await asyncio.to_thread(make_tiny_model, "llama", directory / "model")
    async with System(directory / "system", {MODEL: model}) as system:
        storm = Storm(system, options.seed)
        await storm.start()
        began_at_s = time.monotonic()
        await storm.run(options.handoffs, options.concurrency, Progress(options.handoffs))
        took_s = time.monotonic() - began_at_s
        note("waiting until nothing is held")
        held_blocks = await storm.held_blocks()
    sys.stdout.write(table(storm.outcomes) + "\n")
    return {
        "handoffs": len(storm.outcomes),
        **totals(storm.outcomes),
        "held_blocks": held_blocks,
        "scrapes": storm.num_scrapes,
        "unbalanced_scrapes": storm.num_unbalanced,
        "kills": storm.num_kills,
        "crashes": storm.num_crashes,
        "seed": options.seed,
        "concurrency": options.concurrency,
        "took_s": round(took_s, 1),
    }


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    options = parse(argv)
    with tempfile.TemporaryDirectory() as temporary:
        directory = options.directory or Path(temporary)
        figures = asyncio.run(measure(options, directory))
    if options.json:
        sys.stdout.write(json.dumps(figures) + "\n")
    else:
        sys.stdout.write(", ".join(f"{name} {value}" for name, value in figures.items()) + "\n")
    wrong = ["wrong_tokens", "hangs", "internal_errors", "held_blocks"]
    wrong += ["unbalanced_scrapes", "crashes"]
    return 1 if any(figures[name] for name in wrong) else 0


if __name__ == "__main__":
    sys.exit(main())
