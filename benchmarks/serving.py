"""Loads a running system through the SDK: a fixed number of requests at a time, seeded prompts.

    make up && make bench
    .venv/bin/python benchmarks/serving.py --requests 64 --concurrency 8 --max-tokens 64

Figures are the client's: time to first token, time per output token after it, tokens per second.
Give commit, hardware and command along with any figure that you quote.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from baton.cli.rundir import run_directory
from baton.cli.target import scheduler_address
from baton.client import AsyncClient, BatonError

NAMES = ("parse", "merge", "count", "find", "sort", "write", "split", "check", "load", "path")
TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One request, as the client saw it."""

    ttft_s: float
    elapsed_s: float
    num_tokens: int

    @property
    def tpot_s(self) -> float:
        """Seconds per token after the first."""
        return (self.elapsed_s - self.ttft_s) / max(1, self.num_tokens - 1)


def make_prompt(rng: Random, num_words: int) -> str:
    """Python-like text; every prompt begins differently, so no prefix is shared."""
    words = " ".join(rng.choice(NAMES) for _ in range(num_words))
    return f"# {rng.getrandbits(32):08x} {words}\ndef {rng.choice(NAMES)}("


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def run(options: argparse.Namespace, address: str) -> tuple[list[Sample], list[str], float]:
    """Samples, failures by text, and the seconds that it all took."""
    rng = Random(options.seed)
    prompts = [make_prompt(rng, options.prompt_words) for _ in range(options.requests)]
    samples: list[Sample] = []
    failures: list[str] = []
    async with AsyncClient(address, timeout_s=TIMEOUT_S) as client:

        async def work() -> None:
            while prompts:
                prompt = prompts.pop()
                try:
                    done = await client.generate(
                        prompt, max_tokens=options.max_tokens, ignore_eos=True, temperature=0.0
                    )
                except BatonError as error:
                    failures.append(f"{error.reason.name}: {error.message}")
                    continue
                ttft_s = done.ttft_s or done.elapsed_s
                samples.append(Sample(ttft_s, done.elapsed_s, done.usage.completion_tokens))

        await client.generate(make_prompt(rng, 4), max_tokens=4)  # connections and first-use costs
        started_at_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for _ in range(options.concurrency):
                group.create_task(work())
    return samples, failures, time.monotonic() - started_at_s


def report(samples: list[Sample], failures: list[str], took_s: float) -> str:
    """The figures as text."""
    lines = [f"requests {len(samples)} ok, {len(failures)} failed, in {took_s:.2f} s"]
    lines += [f"  failed: {text}" for text in sorted(set(failures))]
    if samples:
        tokens = sum(sample.num_tokens for sample in samples)
        lines.append(f"output   {tokens / took_s:9.1f} tokens/s")
        for name, values in (
            ("ttft", [sample.ttft_s for sample in samples]),
            ("tpot", [sample.tpot_s for sample in samples]),
        ):
            p50, p95 = percentile(values, 0.50), percentile(values, 0.95)
            lines.append(f"{name}     p50 {p50 * 1e3:9.1f} ms   p95 {p95 * 1e3:9.1f} ms")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Entry point; exit status 1 when a request failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--address", default="", help="scheduler; default: the local one")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--prompt-words", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    address = scheduler_address(options.address, run_directory())
    samples, failures, took_s = asyncio.run(run(options, address))
    sys.stdout.write(report(samples, failures, took_s))
    return 1 if failures or not samples else 0


if __name__ == "__main__":
    sys.exit(main())
