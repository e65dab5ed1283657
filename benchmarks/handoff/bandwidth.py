"""How fast KV gets from one process to another, by each transport, beside memcpy.

    python -m benchmarks.handoff.bandwidth
    python -m benchmarks.handoff.bandwidth --transport shm grpc --json

One push of 64 MiB at a time, blocks of an 8B model's shape, over loopback: the services' own
sender and receiver, checksums and block copies included, with tensors but no model behind them.
memcpy is one copy of as many bytes in one process, right before: a push has three copies at least
(blocks to buffer, buffer to buffer, buffer to blocks) and two checksums.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from baton.core.handoff.frames import Manifest, Span
from baton.core.handoff.reservation import Reservation, ReservationState
from baton.core.handoff.verification import Expected
from baton.core.hashing import Fingerprint, KvLayout, tokens_hash
from baton.core.sampling import SamplingParams
from baton.core.sequence import SequenceSpec
from baton.decode.sessions import Session
from baton.decode.settings import DecodeSettings
from baton.engine.events import Grant
from baton.engine.kv_cache import KvCache
from baton.handoff.push_stream import PushStream
from baton.handoff.receiver import Intake
from baton.handoff.sender import PushReport, PushSender, SenderParts
from baton.handoff.transports.registry import ReceiverTransports, SenderTransports
from baton.rpc.server import create_server, listen
from baton.wire.channel import ChannelPool
from baton.wire.clock import SystemClock
from baton.wire.prefill import PushTarget
from baton.wire.push import RpcPushCall, add_push_server

TRANSPORTS = ("nixl", "shm", "grpc")
_BLOCK_SIZE = 16
_LAYOUT = KvLayout.one_group(_BLOCK_SIZE, "bfloat16", (8,) * 32, (128,) * 32)
_FINGERPRINT = Fingerprint("8b-shape", "", "", "", _LAYOUT)
_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """What was measured."""

    transport: str
    num_bytes: int
    gb_per_s: float
    """Median over the pushes."""
    best_gb_per_s: float
    memcpy_gb_per_s: float


def measure(transport: str, num_bytes: int = 64 << 20, repeats: int = 15) -> Bandwidth:
    """Pushes `num_bytes` of KV to another process, `repeats` times after a warm-up.

    Raises:
        RuntimeError: the transport does not work here; it was not measured.
    """
    torch.set_num_threads(1)
    num_blocks = max(1, num_bytes // _LAYOUT.block_bytes)
    memcpy = _memcpy_gb_per_s(num_blocks * _LAYOUT.block_bytes)
    mine, theirs = multiprocessing.get_context("spawn").Pipe()
    receiver = multiprocessing.get_context("spawn").Process(
        target=_receive, args=(theirs, transport, num_blocks), daemon=True
    )
    receiver.start()
    try:
        if not mine.poll(60):
            raise RuntimeError("the receiving process did not start")
        reports = asyncio.run(_send(mine.recv(), transport, num_blocks, repeats + 3))[3:]
    finally:
        receiver.terminate()
        receiver.join()
    used = {report.transport for report in reports}
    if used != {transport}:
        raise RuntimeError(f"{transport} does not work here: {', '.join(sorted(used))} was used")
    speeds = [item.num_bytes / (item.ended_at_s - item.began_at_s) / 1e9 for item in reports]
    return Bandwidth(transport, reports[0].num_bytes, median(speeds), max(speeds), memcpy)


def _memcpy_gb_per_s(num_bytes: int) -> float:
    source, target = np.ones(num_bytes, np.uint8), np.zeros(num_bytes, np.uint8)
    times = []
    for _ in range(7):
        began_at_s = time.perf_counter()
        target[:] = source
        times.append(time.perf_counter() - began_at_s)
    return num_bytes / median(times) / 1e9


class _Receiver:
    """In place of a decode worker's engine and sessions: every reservation exists."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self.fingerprint = _FINGERPRINT
        self._kv = KvCache(_LAYOUT, num_blocks, torch.device("cpu"))
        self._expected = Expected(
            _FINGERPRINT,
            0,
            num_blocks,
            num_blocks * _BLOCK_SIZE,
            tokens_hash(_spec(num_blocks).token_ids),
        )

    def write(self, _seq_id: str, span: Span, _encoding: Any, payload: memoryview) -> None:
        self._kv.write(_blocks(span), span.layer_start, span.layer_end, payload)

    def find(self, reservation_id: str, epoch: int) -> Any:
        reservation = Reservation(reservation_id, "request", 1, epoch, 0.0)
        return Session(reservation, _spec(self._num_blocks), Grant(self._num_blocks, 0))

    def expected(self, _session: Any) -> Expected:
        return self._expected

    def commit(self, session: Any, _manifest: Manifest) -> None:
        session.reservation.transition(ReservationState.COMMITTED)

    def push_opened(self, *_: Any) -> None:
        """Nobody looks."""

    push_progressed = chunk_arrived = push_ended = writes_ended = push_opened


def _receive(ready: Connection, transport: str, num_blocks: int) -> None:
    """The receiving process."""
    torch.set_num_threads(1)
    receiver: Any = _Receiver(num_blocks)

    async def serve() -> None:
        settings = DecodeSettings(model_path=".", kv_transports=_ordered(transport))
        intake = Intake(
            receiver,
            receiver,
            ReceiverTransports(_ordered(transport).split(","), settings.transport_bytes),
            num_credits=settings.credits,
            progress_timeout_s=_TIMEOUT_S,
            clock=SystemClock(),
        )
        service: Any = SimpleNamespace(receive=intake.receive, push_ended=lambda *_: None)
        server = create_server(settings)
        add_push_server(server, service, SystemClock())
        port = listen(server, settings)
        await server.start()
        ready.send(f"127.0.0.1:{port}")
        await server.wait_for_termination()

    asyncio.run(serve())


async def _send(address: str, transport: str, num_blocks: int, repeats: int) -> list[PushReport]:
    kv = KvCache(_LAYOUT, num_blocks, torch.device("cpu"))
    for part in (*kv.keys, *kv.values):
        part.normal_()

    def read(_seq_id: str, span: Span, _encoding: Any, out: memoryview) -> None:
        kv.read(_blocks(span), span.layer_start, span.layer_end, out)

    store: Any = SimpleNamespace(fingerprint=_FINGERPRINT, read=read)
    channels = ChannelPool(max_message_bytes=4 << 20)
    transports = SenderTransports(
        _ordered(transport).split(","), clock=SystemClock(), on_fallback=lambda *_: None
    )
    reports = []
    with ThreadPoolExecutor(2) as readers:
        for epoch in range(1, repeats + 1):
            push = PushSender(
                SenderParts(store, readers, SystemClock(), _TIMEOUT_S),
                _spec(num_blocks),
                PushTarget("receiver", address, "reservation", epoch, 0),
                lambda: PushStream(RpcPushCall(channels, address, _TIMEOUT_S), address, transports),
            )
            push.ready(num_blocks)
            push.finish(1, None, time.monotonic())
            reports.append(await push.run("request", 1, "sender"))
    await channels.close()
    return reports


def _blocks(span: Span) -> range:
    return range(span.block_start, span.block_start + span.num_blocks)


def _ordered(transport: str) -> str:
    return "grpc" if transport == "grpc" else f"{transport},grpc"


def _spec(num_blocks: int) -> SequenceSpec:
    token_ids = tuple(range(num_blocks * _BLOCK_SIZE))
    return SequenceSpec("sequence", token_ids, SamplingParams(seed=1), 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and shows; 0 when every transport that was asked for works."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.handoff.bandwidth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--transport", nargs="+", choices=TRANSPORTS, default=list(TRANSPORTS))
    add("--mib", type=int, default=64, help="KV per push (default: %(default)s)")
    add("--repeats", type=int, default=15, help="pushes per transport (default: %(default)s)")
    add("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args(argv)
    say = sys.stdout.write
    say(f"{'transport':<10}{'GB/s':>8}{'best':>8}{'memcpy':>8}{'of memcpy':>11}\n")
    figures, is_complete = [], True
    for transport in options.transport:
        try:
            figure = measure(transport, options.mib << 20, options.repeats)
        except RuntimeError as error:
            say(f"{transport:<10}{error}\n")
            is_complete = False
            continue
        figures.append(figure)
        say(
            f"{transport:<10}{figure.gb_per_s:>8.2f}{figure.best_gb_per_s:>8.2f}"
            f"{figure.memcpy_gb_per_s:>8.2f}{figure.gb_per_s / figure.memcpy_gb_per_s:>11.0%}\n"
        )
    if options.json:
        keys = ("transport", "num_bytes", "gb_per_s", "best_gb_per_s", "memcpy_gb_per_s")
        say(json.dumps([{key: getattr(item, key) for key in keys} for item in figures]) + "\n")
    return 0 if is_complete else 1


if __name__ == "__main__":
    sys.exit(main())
