"""What the gateway and its SDK add to one request."""

from __future__ import annotations

import http.client
import json
import time
from contextlib import closing
from dataclasses import dataclass
from statistics import median

import grpc

from baton.v1 import inference_pb2, inference_pb2_grpc
from benchmarks.gateway.processes import Front

TIMEOUT_S = 10.0
NUM_TOKENS = 16
NUM_WARM_UPS = 20
PROMPT = "def quicksort(items):"


@dataclass(frozen=True, slots=True)
class Latency:
    """Medians over all rounds."""

    direct_ms: float
    """The mock called by gRPC, without the SDK."""
    gateway_ms: float
    """The same answer over HTTP, as one JSON object."""


class _Direct:
    def __init__(self, channel: grpc.Channel) -> None:
        self._stub = inference_pb2_grpc.InferenceServiceStub(channel)

    def ask(self) -> None:
        request = inference_pb2.GenerateRequest(text=PROMPT)
        request.sampling.max_tokens = NUM_TOKENS
        for _ in self._stub.Generate(request, timeout=TIMEOUT_S):
            pass


class _Http:
    def __init__(self, front: Front) -> None:
        self._connection = http.client.HTTPConnection(front.host, front.port, timeout=TIMEOUT_S)
        self._body = json.dumps({"model": "mock", "prompt": PROMPT, "max_tokens": NUM_TOKENS})

    def ask(self) -> None:
        headers = {"content-type": "application/json"}
        self._connection.request("POST", "/v1/completions", self._body, headers)
        answer = self._connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"the gateway answered {answer.status}: {text[:200]!r}")

    def close(self) -> None:
        self._connection.close()


def measure_latency(scheduler: str, front: Front, num_rounds: int) -> Latency:
    """Asks both ways by turns, so that whatever else the machine does hits both alike."""
    with grpc.insecure_channel(scheduler) as channel, closing(_Http(front)) as over_http:
        ways = (_Direct(channel).ask, over_http.ask)
        took_ms: tuple[list[float], list[float]] = ([], [])
        for number in range(NUM_WARM_UPS + num_rounds):
            for ask, samples in zip(ways, took_ms, strict=True):
                started_s = time.perf_counter()
                ask()
                if number >= NUM_WARM_UPS:
                    samples.append((time.perf_counter() - started_s) * 1e3)
    direct, gateway = took_ms
    return Latency(median(direct), median(gateway))
