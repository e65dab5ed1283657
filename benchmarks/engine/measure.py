"""Times steps of the real engine, each beside what the machine can do at that moment."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from baton.core.handoff.frames import Span
from baton.core.sampling import SamplingParams
from baton.core.sequence import SequenceSpec
from baton.engine.config import EngineConfig
from baton.engine.engine import Engine
from benchmarks.engine.floors import Floors, timed
from benchmarks.engine.shapes import count_parameters

_SAMPLING = SamplingParams(temperature=0.0, ignore_eos=True)
_OUTPUT_TOKENS = 256
_WARMUP_STEPS = 2
_STEPS_PER_FLOOR = 3


@dataclass(slots=True)
class DecodeTimes:
    """Steps of one batch at one context."""

    batch: int
    context: int
    step_s: list[float] = field(default_factory=list)
    floor_s: list[float] = field(default_factory=list)
    """Per step: bytes that it must read, by the bandwidth measured just before it."""
    outside_s: list[float] = field(default_factory=list)
    """Per step: what was not the model's forward."""

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second."""
        return self.batch / median(self.step_s)

    @property
    def floor_fraction(self) -> float:
        """Share of the floor that was reached."""
        pairs = zip(self.floor_s, self.step_s, strict=True)
        return median(floor / step for floor, step in pairs)

    @property
    def overhead_fraction(self) -> float:
        """Share of a step outside the model's forward."""
        pairs = zip(self.outside_s, self.step_s, strict=True)
        return median(outside / step for outside, step in pairs)


@dataclass(slots=True)
class PrefillTimes:
    """Prompts computed in one step each."""

    num_tokens: int
    step_s: list[float] = field(default_factory=list)
    floor_s: list[float] = field(default_factory=list)

    @property
    def floor_fraction(self) -> float:
        """Share of the matrix product rate that was reached."""
        pairs = zip(self.floor_s, self.step_s, strict=True)
        return median(floor / step for floor, step in pairs)


class Bench:
    """One engine under measurement."""

    def __init__(self, directory: Path, floors: Floors, *, settings: dict[str, Any]) -> None:
        self.device = torch.device(settings["device"])
        self._directory = directory
        self._dtype = settings["dtype"]
        self._floors = floors
        self._rng = random.Random(0)
        started_s = time.perf_counter()
        self.engine = Engine(EngineConfig(str(directory), "benchmark", **settings))
        self.load_s = time.perf_counter() - started_s
        self.num_parameters, self._num_multiplied = count_parameters(directory)
        # The forward is timed from inside, so that planning, sampling and output remain.
        self._forward_s = 0.0
        if self.device.type == "cuda":
            self._time_runner(self.engine._runner)
            return
        module = self.engine._runner.model.module
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave)

    def close(self) -> None:
        """Lets go of the engine's memory."""
        self.engine.close()

    @property
    def counters(self) -> Mapping[str, float]:
        """What the engine counted."""
        return self.engine.stats().counters

    @property
    def token_kv_bytes(self) -> int:
        """KV bytes that a token of context has."""
        layout = self.engine.fingerprint.layout
        return layout.block_bytes // layout.block_size

    def decode(self, times: DecodeTimes, num_steps: int) -> None:
        """Adds `num_steps` steps to `times`."""
        itemsize = getattr(torch, self._dtype).itemsize
        with self.running(times.batch, times.context):
            read_bytes = self.num_parameters * itemsize
            read_bytes += times.batch * times.context * self.token_kv_bytes
            for index in range(num_steps):
                if index % _STEPS_PER_FLOOR == 0:
                    floor_s = read_bytes / self._floors.measure_read()
                    # Measuring has emptied the caches, which a running engine's step never finds.
                    self._step()
                step_s = self._step()
                times.floor_s.append(floor_s)
                times.step_s.append(step_s)
                times.outside_s.append(step_s - self._forward_s)

    def prefill(self, times: PrefillTimes, num_prompts: int) -> None:
        """Adds `num_prompts` prompts to `times`; the first of a run is not counted."""
        # The last layer is for the last token only.
        num_last = self.num_parameters - self._num_multiplied
        flops = 2 * (self._num_multiplied * times.num_tokens + num_last)
        for index in range(num_prompts + 1):
            self.engine.sequences.submit(self._spec("prompt", times.num_tokens, max_tokens=1))
            floor_s = flops / self._floors.measure_gemm()
            step_s = self._step()
            self.engine.sequences.release("prompt")
            if index:
                times.floor_s.append(floor_s)
                times.step_s.append(step_s)

    def against_transformers(self, batch: int, context: int, num_steps: int) -> float:
        """How many times more tokens per second than `generate` on the same weights.

        The engine takes a step after each of generate's, so that both see the same machine.
        """
        model: Any = AutoModelForCausalLM.from_pretrained(
            self._directory, dtype=getattr(torch, self._dtype), local_files_only=True
        )
        model.to(self.device)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        ratios: list[float] = []
        resumed_s: list[float] = []

        def alternate(ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
            del scores
            theirs_s = time.perf_counter() - resumed_s[-1] if resumed_s else 0.0
            ours_s = self._step()
            if len(resumed_s) > _WARMUP_STEPS:
                ratios.append(theirs_s / ours_s)
            resumed_s.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        prompts = [self._tokens(context) for _ in range(batch)]
        with self.running(batch, context), torch.inference_mode():
            model.generate(
                torch.tensor(prompts, device=self.device),
                attention_mask=torch.ones(batch, context, dtype=torch.int64, device=self.device),
                max_new_tokens=num_steps + _WARMUP_STEPS + 1,
                do_sample=False,
                stopping_criteria=[alternate],
            )
        return median(ratios)

    @contextmanager
    def running(self, batch: int, context: int) -> Iterator[None]:
        """Sequences that decode at a context, taken over as from a hand-off."""
        names = [str(index) for index in range(batch)]
        payload = self._payload(context)
        layout = self.engine.fingerprint.layout
        for name in names:
            grant = self.engine.sequences.reserve(
                self._spec(name, context, max_tokens=_OUTPUT_TOKENS)
            )
            self.engine.sequences.begin_fill(name)
            num_blocks = min(
                grant.num_blocks, -(-context // self.engine.fingerprint.layout.block_size)
            )
            self.engine.transfer.write_blocks(
                name, Span(0, layout.num_layers, 0, num_blocks), payload
            )
            self.engine.sequences.commit(name, 1)
        try:
            for _ in range(_WARMUP_STEPS):
                self._step()
            yield
        finally:
            for name in names:
                self.engine.sequences.release(name)

    def _payload(self, context: int) -> memoryview:
        """KV of one sequence: plausible numbers, and pages that are really there."""
        num_blocks = -(-context // self.engine.fingerprint.layout.block_size)
        num_bytes = num_blocks * self.engine.fingerprint.layout.block_bytes
        dtype = getattr(torch, self.engine.fingerprint.layout.dtype.replace("int8", "bfloat16"))
        content = torch.randn(num_bytes // dtype.itemsize).to(dtype)
        return content.view(torch.uint8).numpy().data

    def _step(self) -> float:
        self._forward_s = 0.0
        step_s = timed(self.engine.step, self.device)
        self.engine.drain_events()
        return step_s

    def _time_runner(self, runner: Any) -> None:
        """A captured step does not pass through the module: its inputs are timed with it."""
        forward = runner.forward

        def timed_forward(*arguments: Any) -> Any:
            results: list[Any] = []
            self._forward_s += timed(lambda: results.append(forward(*arguments)), self.device)
            return results[0]

        runner.forward = timed_forward

    def _enter(self, *_: object) -> None:
        self._forward_s -= time.perf_counter()

    def _leave(self, *_: object) -> None:
        self._forward_s += time.perf_counter()

    def _tokens(self, num: int) -> list[int]:
        return [self._rng.randrange(self.engine.vocab_size) for _ in range(num)]

    def _spec(self, name: str, num_tokens: int, *, max_tokens: int) -> SequenceSpec:
        return SequenceSpec(name, tuple(self._tokens(num_tokens)), _SAMPLING, max_tokens)
