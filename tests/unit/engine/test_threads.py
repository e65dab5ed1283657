from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from baton.engine import devices


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_more_threads_than_cores_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(devices, "num_cores", lambda: 2)
    assert devices.use_threads(2) == 2
    assert not caplog.records
    assert devices.use_threads(3) == 3
    assert "3 threads compute on 2 cores" in caplog.text


def test_without_a_setting_there_are_never_more_threads_than_cores(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.set_num_threads(2)
    monkeypatch.setattr(devices, "num_cores", lambda: 1)
    assert devices.use_threads(None) == 1
    assert torch.get_num_threads() == 1
    assert not caplog.records
