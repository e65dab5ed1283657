"""Times the gateway in front of a scheduler that computes nothing, then loses clients.

    python -m benchmarks.gateway --json
    python -m benchmarks.gateway --clients 0            # without the demo system

1. What gateway and SDK add to a request's median latency, beside the same call by gRPC in turn.
2. Server-sent chunks per second of a gateway on one core, read by a client that only counts. The
   rate per second of processor time does not move with what else the machine does.
3. Clients that hang up at random moments on a whole system with the demo model: requests and KV
   blocks that its processes still hold two seconds after the last one went.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gateway.disconnects import Load, demo_system, measure_losses
from benchmarks.gateway.latency import measure_latency
from benchmarks.gateway.processes import cores, gateway, mock_scheduler
from benchmarks.gateway.stream_rate import measure_stream_rate


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options; ends the process on wrong ones."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gateway",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--rounds", type=int, default=300, help="requests timed each way (default: %(default)s)")
    add("--streams", type=int, default=16, help="streams read side by side (default: %(default)s)")
    add("--tokens", type=int, default=2000, help="chunks of each stream (default: %(default)s)")
    add("--clients", type=int, default=500, help="clients that hang up (default: %(default)s)")
    add("--seed", type=int, default=1, help="of the moments when they do (default: %(default)s)")
    add("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args(argv)
    if min(options.rounds, options.streams, options.tokens) < 1 or options.clients < 0:
        parser.error("--rounds, --streams and --tokens must be at least 1, --clients at least 0")
    return options


def say(text: str) -> None:
    """A line for people."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def measure_front(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Latency and rate, the gateway on a core of its own."""
    own, others = cores()
    os.sched_setaffinity(0, others)  # the mock inherits it
    with mock_scheduler() as scheduler, gateway(scheduler, folder, own) as front:
        os.sched_setaffinity(0, {*own, *others})  # or the direct calls share a core with the mock
        latency = measure_latency(scheduler, front, options.rounds)
        added_ms = latency.gateway_ms - latency.direct_ms
        say(
            f"latency   {latency.direct_ms:.2f} ms by gRPC, {latency.gateway_ms:.2f} ms through the"
            f" gateway: {added_ms:+.2f} ms (medians of {options.rounds})"
        )
        os.sched_setaffinity(0, others)
        rate = measure_stream_rate(scheduler, front, options.streams, options.tokens)
        say(
            f"streams   {rate.chunks_per_s:,.0f} chunks/s on one core,"
            f" {rate.chunks_per_cpu_s:,.0f} per second of its time;"
            f" {rate.mock_messages_per_s:,.0f} messages/s straight from the mock"
        )
    os.sched_setaffinity(0, {*own, *others})
    return {
        "added_ms_p50": round(added_ms, 3),
        "direct_ms_p50": round(latency.direct_ms, 3),
        "sse_chunks_per_s": round(rate.chunks_per_s),
        "sse_chunks_per_cpu_s": round(rate.chunks_per_cpu_s),
        "mock_messages_per_s": round(rate.mock_messages_per_s),
    }


def lose_clients(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What clients leave behind when they go."""
    if not options.clients:
        return {"held_after_disconnects": None}
    say(f"starting a system with the demo model for {options.clients} clients that hang up")
    load = Load(num_clients=options.clients, seed=options.seed)
    with demo_system(folder / "system") as state:
        losses = asyncio.run(measure_losses(state, load))
    say(
        f"hang-ups  {losses.held} requests and KV blocks held {losses.released_after_s:.2f} s after"
        f" the last of {options.clients} clients; {losses.cut_streams} went in mid-stream"
    )
    return {
        "held_after_disconnects": losses.held,
        "released_after_s": round(losses.released_after_s, 2),
        "cut_streams": losses.cut_streams,
    }


def main(argv: list[str] | None = None) -> int:
    """Entry point; exit status 1 when something was left behind."""
    options = parse(argv)
    with tempfile.TemporaryDirectory(prefix="baton-gateway-") as name:
        folder = Path(name)
        figures = {**measure_front(options, folder), **lose_clients(options, folder)}
    if options.json:
        say(json.dumps(figures))
    return 1 if figures["held_after_disconnects"] else 0


if __name__ == "__main__":
    sys.exit(main())
