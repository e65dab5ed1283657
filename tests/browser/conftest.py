"""A headless Chromium, where there is one, and a real system for it to look at."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from baton.cli.rundir import RunDirectory, SystemState
from tests.browser.page import Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
START_TIMEOUT_S = 150
SETTINGS = {
    "BATON_SCHEDULER_FORCE_DISAGGREGATION": "true",
    "BATON_PREFILL_MAX_NUM_BATCHED_TOKENS": "128",  # a long prompt then has several chunks
    "BATON_DECODE_ADAPTIVE_DRAFTS": "false",  # so that there are accepted drafts to see
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    skip = pytest.mark.skip(reason="needs Chromium: apt-get install chromium chromium-driver")
    for item in items:
        if here not in item.path.parents:
            continue
        item.add_marker(pytest.mark.timeout(START_TIMEOUT_S + 30))
        if not (CHROMIUM and DRIVER):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    page = Page.open(str(CHROMIUM), str(DRIVER), tmp_path_factory.mktemp("profile"))
    try:
        yield page
    finally:
        page.close()


@pytest.fixture
def page(browser: Page) -> Page:
    """The browser as it is at its start: wide, light, without keys or a page."""
    browser.reset()
    return browser


@dataclass(frozen=True, slots=True)
class System:
    """A whole Baton with the demo model: one prefill worker, two decode workers."""

    run: RunDirectory

    @property
    def state(self) -> SystemState:
        state = self.run.running()
        assert state is not None
        return state

    @property
    def url(self) -> str:
        gateway = self.state.process("gateway")
        assert gateway is not None
        return f"http://{gateway.http_address}"

    @property
    def scheduler(self) -> str:
        scheduler = self.state.process("scheduler")
        assert scheduler is not None
        return scheduler.address

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "baton.cli.main", *arguments],
            env={**os.environ, **SETTINGS, "BATON_HOME": str(self.run.path)},
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_S,
            check=False,
        )

    def kill_decode_worker(self) -> str:
        """kill -9 of one decode worker; returns its id."""
        services = json.loads(self.command("status", "--json").stdout)["services"]
        worker = next(service for service in services if service["role"] == "decode")
        os.kill(worker["pid"], signal.SIGKILL)
        return str(worker["worker_id"])


@pytest.fixture(scope="session")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    system = System(RunDirectory(tmp_path_factory.mktemp("home")))
    try:
        result = system.command("up", "-d", "--decode", "2", "--no-restart")
        assert result.returncode == 0, result.stderr
        yield system
    finally:
        system.command("down")
