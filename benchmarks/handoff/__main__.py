"""Times the hand-off of KV from one process to another, and what a client notices of it.

    python -m benchmarks.handoff
    python -m benchmarks.handoff --tokens 512 --rounds 10 --json
    python -m benchmarks.handoff --only overlap --model demo --tokens 200

Real services as processes of their own, prefill on one core and decode on another; random weights
of the shape that is named; nothing is downloaded. The measurements:

  bandwidth  a large piece of KV from one process to another, beside memcpy
  rounding   int8 on the wire: the quality of the demo model after it, and the bandwidth below which
             it saves time
  overlap    prompts computed and handed over beside prompts only computed, by turns: what the
             hand-off adds to the time to the first token, and how much of it ran meanwhile
  prefix     a prefix fetched from the cache service beside the same prefix computed

Two processes on a machine that does other work disturb each other: quote hardware and command.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers.utils import logging

from benchmarks.engine.shapes import NAMES, model_directory
from benchmarks.handoff.bandwidth import TRANSPORTS, measure
from benchmarks.handoff.overlap import OverlapFigures, measure_overlap
from benchmarks.handoff.prefix import PrefixFigures, measure_prefix
from benchmarks.handoff.rounding import RoundingFigures, measure_rounding

_PARTS = ("bandwidth", "rounding", "overlap", "prefix")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options; ends the process on wrong ones."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.handoff",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", choices=NAMES, default="smollm2-135m", help="shape (default: %(default)s)")
    add("--tokens", type=int, default=2048, help="of prompt and prefix (default: %(default)s)")
    add("--rounds", type=int, default=5, help="requests of each kind (default: %(default)s)")
    add("--only", choices=_PARTS, nargs="+", default=_PARTS, help="measure only these")
    add("--logs", type=Path, help="keep the services' logs in this folder")
    add("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args(argv)
    if options.tokens < 16 or options.tokens % 16:
        parser.error("--tokens must be a multiple of 16")
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    return options


def say(text: str = "") -> None:
    """A line for people."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """Progress."""
    sys.stderr.write(f"  ... {text}\n")
    sys.stderr.flush()


def show_bandwidth() -> dict[str, Any]:
    """Measures and prints what the transports carry; returns the figures, null where one fails."""
    figures: dict[str, Any] = {}
    copies = []
    for transport in TRANSPORTS:
        note(f"64 MiB between two processes over {transport}")
        try:
            found = measure(transport)
        except RuntimeError as error:
            say(f"{transport}: {error}")
            figures[f"{transport}_gb_s"] = None
            continue
        copies.append(found.memcpy_gb_per_s)
        figures[f"{transport}_gb_s"] = round(found.gb_per_s, 2)
        say(
            f"{transport}: {found.gb_per_s:.2f} GB/s (best {found.best_gb_per_s:.2f}), "
            f"memcpy {found.memcpy_gb_per_s:.2f} GB/s"
        )
    figures["memcpy_gb_s"] = round(median(copies), 2) if copies else None
    return figures


def show_rounding(figures: RoundingFigures) -> dict[str, Any]:
    """Prints what int8 on the wire costs; returns the figures."""
    say(
        f"int8: {figures.wire_fraction:.3f} of the bytes, {figures.cost_s_per_gb * 1e3:.0f} ms per "
        f"GB to round and restore: saves time below {figures.break_even_gb_s:.2f} GB/s"
    )
    say(
        f"int8: perplexity {figures.perplexity_change:+.4%}, "
        f"{figures.token_agreement:.2%} of tokens stay the most likely ones"
    )
    return {
        "int8_break_even_gb_s": round(figures.break_even_gb_s, 3),
        "int8_perplexity_change": round(figures.perplexity_change, 6),
        "int8_token_agreement": round(figures.token_agreement, 4),
    }


def show_overlap(figures: OverlapFigures) -> dict[str, Any]:
    """Prints what a hand-off adds; returns the figures."""
    alone_s = median(one.first_token_s for one in figures.alone)
    handed_s = median(one.first_token_s for one in figures.handed)
    transfers = [one.transfer for one in figures.handed if one.transfer]
    say(f"first token: {alone_s * 1e3:.1f} ms alone, {handed_s * 1e3:.1f} ms with a hand-off")
    say(
        f"hand-off: {transfers[0].num_bytes / 1e6:.1f} MB in {transfers[0].num_chunks} chunks, "
        f"{median(one.active_s for one in transfers) * 1e3:.1f} ms on their way, "
        f"{figures.exposed_s * 1e3:.1f} ms of it after the first token"
    )
    say(
        f"processor time of the prefill worker: {median(figures.alone_cpu_s) * 1e3:.0f} ms alone, "
        f"{median(figures.handed_cpu_s) * 1e3:.0f} ms with a hand-off"
    )
    second_s = median(one.second_token_s or 0.0 for one in figures.handed)
    say(f"second token: {second_s * 1e3:.1f} ms, made by the decode worker")
    return {
        "added_ttft_fraction": round(figures.added_ttft_fraction, 4),
        "added_cpu_fraction": round(figures.added_cpu_fraction, 4),
        "hidden_fraction": round(figures.hidden_fraction, 4),
        "exposed_ms": round(figures.exposed_s * 1e3, 2),
        "ttft_alone_ms": round(alone_s * 1e3, 1),
        "ttft_handed_over_ms": round(handed_s * 1e3, 1),
    }


def show_prefix(figures: PrefixFigures) -> dict[str, Any]:
    """Prints what a stored prefix saves; returns the figures."""
    say(
        f"prefix: first token after {median(figures.computed_s) * 1e3:.1f} ms computed, "
        f"{median(figures.fetched_s) * 1e3:.1f} ms fetched"
    )
    return {"prefix_speedup": round(figures.speedup, 2)}


async def run(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Measures, prints, returns the figures."""
    note(f"making {options.model}")
    model = model_directory(options.model, torch.bfloat16, scratch)
    logs = options.logs or scratch
    logs.mkdir(parents=True, exist_ok=True)
    sizes = (model, logs, options.tokens, options.rounds, note)
    figures: dict[str, Any] = {}
    if "overlap" in options.only:
        figures |= show_overlap(await measure_overlap(*sizes))
    if "prefix" in options.only:
        figures |= show_prefix(await measure_prefix(*sizes))
    return figures


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark."""
    options = parse(argv)
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    say(f"{options.model}, {options.tokens} tokens, {len(os.sched_getaffinity(0))} cores")
    started_s = time.monotonic()
    figures: dict[str, Any] = {"model": options.model, "tokens": options.tokens}
    if "bandwidth" in options.only:
        figures |= show_bandwidth()
    if "rounding" in options.only:
        figures |= show_rounding(measure_rounding(note))
    if {"overlap", "prefix"}.intersection(options.only):
        with tempfile.TemporaryDirectory(prefix="baton-benchmark-") as scratch:
            figures |= asyncio.run(run(options, Path(scratch)))
    say(f"measured in {time.monotonic() - started_s:.0f} s")
    if options.json:
        say(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
