"""The pictures of docs/images: BATON_PICTURES=docs/images pytest tests/browser/test_pictures.py."""

from __future__ import annotations

import inspect
import os
import shlex
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from baton.client import Client
from tests.browser.conftest import System
from tests.browser.page import Page

FOLDER = os.environ.get("BATON_PICTURES", "")
MAX_BYTES = 200_000
NUM_CALLERS = 3
pytestmark = pytest.mark.skipif(not FOLDER, reason="BATON_PICTURES names no folder")


@contextmanager
def load(address: str) -> Iterator[None]:
    """Requests of several sizes, until left."""
    source = inspect.getsource(shlex)
    is_over = threading.Event()

    def call(seed: int) -> None:
        rng = Random(seed)
        with Client(address) as client:
            while not is_over.is_set():
                start = rng.randrange(3000)
                prompt = source[start : start + rng.choice((800, 1600, 2400))]
                options = {"max_tokens": rng.choice((32, 64, 96)), "temperature": 0.7}
                client.generate(f"# {seed}\n{prompt}", ignore_eos=True, **options)  # type: ignore[call-overload]

    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(NUM_CALLERS)]
    for caller in callers:
        caller.start()
    try:
        yield
    finally:
        is_over.set()
        for caller in callers:
            caller.join()


def save(page: Page, name: str, **clip: object) -> None:
    path = Path(FOLDER) / f"{name}.png"
    page.save(path, **clip)  # type: ignore[arg-type]
    assert path.stat().st_size < MAX_BYTES


def test_pictures(page: Page, system: System) -> None:
    page.visit(system.url)
    page.wait(lambda: page.texts(".card.worker"))
    save(page, "console-idle", selector="#topology")
    with load(system.scheduler):
        page.wait(lambda: len(page.all(".spark polyline")) == 2)
        page.wait(lambda: len(page.texts(".requests a")) >= 9, 120)
        page.wait(lambda: page.all(".flow.active"))
        save(page, "console-load", height=1060)
    page.resize((1280, 900))
    source = inspect.getsource(shlex)[:2600]
    page.run(source, max_tokens=64)
    page.wait(lambda: "length" in page.text("#waterfall .line-figures"))
    save(page, "console-waterfall", selector="#waterfall")
    page.theme("dark")
    page.resize((1280, 900))
    page.script("document.querySelector('#zoom input[value=handoff]').click()")
    save(page, "console-handoff-dark", selector="#waterfall")
    page.resize((380, 800))
    save(page, "console-phone-dark", height=1500)
