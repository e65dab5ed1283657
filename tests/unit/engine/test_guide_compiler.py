"""Guides compiled on a few threads, with a compiler that takes as long as a test wants."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from baton.core.errors import InvalidRequest, QueueFull
from baton.core.guide import Guide
from baton.engine import guide_compiler
from baton.engine.guide_compiler import GuideCompiler
from tests.support.eventually import eventually

SLOW = [Guide.regex(f"slow{index}") for index in range(3)]
QUICK = Guide.regex("quick")


class _Compiles:
    """Counts what is compiled; slow guides end when they may."""

    def __init__(self) -> None:
        self.begun: Counter[Guide] = Counter()
        self.ended: Counter[Guide] = Counter()
        self.may_end = threading.Event()

    def __call__(self, guide: Guide) -> None:
        self.begun[guide] += 1
        if guide is not QUICK:
            assert self.may_end.wait(20)
        self.ended[guide] += 1


@asynccontextmanager
async def _compiler(compiles: _Compiles) -> AsyncIterator[GuideCompiler]:
    compiler = GuideCompiler(compiles)
    try:
        yield compiler
    finally:
        compiles.may_end.set()
        compiler.close()


async def test_the_wait_for_a_thread_does_not_count_against_a_guide(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guide_compiler, "_COMPILE_TIMEOUT_S", 0.1)
    compiles = _Compiles()
    async with _compiler(compiles) as compiler:
        slow = [asyncio.create_task(compiler.compile(guide)) for guide in SLOW[:2]]
        await eventually(lambda: len(compiles.begun) == 2)
        waiting = asyncio.create_task(compiler.compile(QUICK))
        for task in slow:
            with pytest.raises(InvalidRequest, match="took longer than"):
                await task
        assert not waiting.done()
        compiles.may_end.set()
        await waiting
        assert compiles.ended[QUICK] == 1


async def test_one_slow_guide_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    compiles = _Compiles()
    async with _compiler(compiles) as compiler:
        slow = asyncio.create_task(compiler.compile(SLOW[0]))
        await eventually(lambda: compiles.begun[SLOW[0]] == 1)
        await compiler.compile(QUICK)
        assert not slow.done()
        compiles.may_end.set()
        await slow


async def test_guides_that_wait_too_long_or_are_too_many_may_be_sent_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guide_compiler, "_QUEUE_TIMEOUT_S", 0.1)
    monkeypatch.setattr(guide_compiler, "_MAX_WAITING", 1)
    compiles = _Compiles()
    async with _compiler(compiles) as compiler:
        slow = [asyncio.create_task(compiler.compile(guide)) for guide in SLOW[:2]]
        await eventually(lambda: len(compiles.begun) == 2)
        waiting = asyncio.create_task(compiler.compile(SLOW[2]))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="too many"):
            await compiler.compile(QUICK)
        with pytest.raises(QueueFull, match="busy"):
            await waiting
        compiles.may_end.set()
        await asyncio.gather(*slow)
        await compiler.compile(QUICK)
    assert SLOW[2] not in compiles.begun


async def test_requests_with_the_same_guide_share_its_compile() -> None:
    compiles = _Compiles()
    async with _compiler(compiles) as compiler:
        tasks = [asyncio.create_task(compiler.compile(SLOW[0])) for _ in range(5)]
        await eventually(lambda: compiles.begun[SLOW[0]] == 1)
        tasks[0].cancel()
        compiles.may_end.set()
        await asyncio.gather(*tasks[1:])
        assert compiles.begun[SLOW[0]] == 1
