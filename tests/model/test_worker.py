"""The engine in its thread."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from baton.core.errors import Internal, ModelNotFound, QueueFull
from baton.core.guide import Guide
from baton.core.sampling import SamplingParams
from baton.engine.config import EngineConfig
from baton.engine.events import EngineEvent, Failed, Started, Tokens
from baton.engine.worker import EngineWorker
from tests.model.conftest import TinyModel
from tests.model.harness import make_prompts, make_spec, references
from tests.support.eventually import eventually


def _config(directory: Path) -> EngineConfig:
    return EngineConfig(str(directory), "tiny", dtype="float32", num_blocks=64)


async def _run(
    worker: EngineWorker, name: str, prompt: tuple[int, ...], num: int
) -> list[EngineEvent]:
    events: asyncio.Queue[EngineEvent] = asyncio.Queue()
    worker.subscribe(name, events.put_nowait)
    worker.engine.sequences.submit(make_spec(name, prompt, num))
    found: list[EngineEvent] = []
    async with asyncio.timeout(20):
        while not found or getattr(found[-1], "finish_reason", None) is None:
            found.append(await events.get())
            if isinstance(found[-1], Failed):
                break
    worker.unsubscribe(name)
    return found


async def test_many_at_once_from_asyncio(tiny_model: TinyModel) -> None:
    directory = tiny_model("llama")
    prompts = make_prompts((5, 40, 17), seed=31)
    expected = references(directory, prompts, 10)
    reports: list[tuple[float, str]] = []
    worker = await EngineWorker.start(_config(directory), lambda *report: reports.append(report))
    try:
        assert [fraction for fraction, _ in reports] == sorted(f for f, _ in reports)
        assert reports[-1][0] == 1.0
        found = await asyncio.gather(
            *(_run(worker, str(index), prompt, 10) for index, prompt in enumerate(prompts))
        )
        for events, output in zip(found, expected, strict=True):
            assert isinstance(events[0], Started)
            tokens = [token for e in events if isinstance(e, Tokens) for token in e.token_ids]
            assert tokens == output
        assert worker.is_alive
        assert worker.engine.step_age_s < 5
    finally:
        await worker.stop()
    assert not worker.is_alive
    await worker.stop()


async def test_a_model_that_cannot_be_loaded_raises(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        await EngineWorker.start(_config(tmp_path / "nowhere"))


async def test_a_release_at_any_moment_leaves_nothing(tiny_model: TinyModel) -> None:
    worker = await EngineWorker.start(_config(tiny_model("llama")))
    engine = worker.engine
    try:
        for index, prompt in enumerate(make_prompts([30] * 8, seed=32)):
            name = str(index)
            events: list[EngineEvent] = []
            worker.subscribe(name, events.append)
            engine.sequences.submit(make_spec(name, prompt, 500))
            await eventually(lambda n=index, found=events: len(found) >= n, timeout_s=10)
            engine.sequences.release(name)
            worker.unsubscribe(name)

        def is_idle() -> bool:
            counts = engine.kv_counts()
            return counts["free"] + counts["cached"] == 64

        await eventually(is_idle, timeout_s=5)
        assert engine.stats().num_running == 0
    finally:
        await worker.stop()


async def test_the_engines_death_fails_all_sequences(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await EngineWorker.start(_config(tiny_model("llama")))
    monkeypatch.setattr(worker.engine._runner, "forward", lambda _: 1 // 0)
    (event,) = (await _run(worker, "a", (1, 2, 3), 10))[-1:]
    assert isinstance(event, Failed)
    assert isinstance(event.error, Internal)
    await eventually(lambda: not worker.is_alive, timeout_s=5)
    with pytest.raises(Internal):
        worker.engine.sequences.submit(make_spec("b", (1,), 1))
    await worker.stop()


async def test_a_callback_that_fails_costs_no_other_request_its_tokens(
    tiny_model: TinyModel, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tiny_model("llama")
    prompts = make_prompts((5, 9), seed=33)
    worker = await EngineWorker.start(_config(directory))
    failed: list[EngineEvent] = []

    def fail(event: EngineEvent) -> None:
        if isinstance(event, Tokens):
            raise ValueError("a defect of the reader")
        failed.append(event)

    try:
        worker.subscribe("bad", fail)
        worker.engine.sequences.submit(make_spec("bad", prompts[0], 100))
        events = await _run(worker, "good", prompts[1], 20)
        tokens = [token for e in events if isinstance(e, Tokens) for token in e.token_ids]
        assert [tokens] == references(directory, prompts[1:], 20)
        await eventually(lambda: isinstance(failed[-1], Failed), timeout_s=5)
        assert worker.engine.stats().num_running == 0, "the sequence without a reader ended"
        assert "a sequence's callback failed" in caplog.text
    finally:
        await worker.stop()


async def test_a_step_that_hangs_shows_its_age(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await EngineWorker.start(_config(tiny_model("llama")))
    runner = worker.engine._runner
    forward, may_end = runner.forward, threading.Event()

    def hanging(*args: Any) -> Any:
        assert may_end.wait(20)
        return forward(*args)

    monkeypatch.setattr(runner, "forward", hanging)
    try:
        assert worker.engine.step_age_s < 0.1
        worker.engine.sequences.submit(make_spec("a", (1, 2, 3), 1))
        await eventually(lambda: worker.engine.step_age_s > 0.2, timeout_s=5)
        assert worker.is_alive
        may_end.set()
        await eventually(lambda: worker.engine.step_age_s == 0, timeout_s=5)
    finally:
        may_end.set()
        await worker.stop()


async def test_a_guide_that_was_displaced_is_not_compiled_on_the_event_loop(
    tiny_model: TinyModel,
) -> None:
    worker = await EngineWorker.start(_config(tiny_model("llama")))
    guides = [Guide.regex(f"a{{{count}}}") for count in range(1, 4)]
    try:
        worker.engine.grammars._max_compiled = 2
        for guide in guides:
            await worker.prepare(guide)
        sampling = SamplingParams(temperature=0.0, guide=guides[0])
        spec = make_spec("a", (1, 2, 3), 5, sampling=sampling)
        with pytest.raises(QueueFull, match="displaced"):
            worker.engine.sequences.reserve(spec)
        await worker.prepare(guides[0])
        worker.engine.sequences.reserve(spec)
    finally:
        await worker.stop()
