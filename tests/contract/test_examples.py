"""The examples do what they say, in processes of their own."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from baton.core.errors import ModelNotFound
from tests.support.fake_inference import FakeInference, serve
from tests.support.repository import ROOT

EXAMPLES = ROOT / "examples"


@pytest_asyncio.fixture
async def service() -> AsyncIterator[tuple[FakeInference, str]]:
    fake = FakeInference()
    server, address = await serve(fake)
    yield fake, address
    await server.stop(0)


async def run(name: str, *arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(EXAMPLES / name),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"PYTHONIOENCODING": "utf-8"},
    )
    out, err = await asyncio.wait_for(process.communicate(), 30)
    return process.returncode or 0, out.decode(), err.decode()


def test_every_example_is_tested_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"stream_text.py", "ask_many.py"}


async def test_stream_text(service):
    fake, address = service
    assert await run("stream_text.py", address, "say") == (0, "Hello wörld!\n7 + 3 tokens\n", "")
    assert fake.requests[0].text == "say"
    fake.before.append(ModelNotFound("no such model"))
    status, _, told = await run("stream_text.py", address, "say")
    assert (status, told) == (1, "MODEL_NOT_FOUND: no such model\n")


@pytest.mark.parametrize("questions", [["why?"], ["why?", "how?"]])
async def test_ask_many(service, questions):
    fake, address = service
    status, out, err = await run("ask_many.py", address, *questions)
    assert (status, err) == (0, "")
    assert out.count("  Hello wörld!  (stop, ") == len(questions)
    asked = [request.chat.messages[0].content for request in fake.requests]
    assert sorted(asked) == sorted(questions)
