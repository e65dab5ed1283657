"""What a build does without a compiler."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

from tests.support.repository import ROOT


def _hatch_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "hatch_build", ROOT / "shared/engine/hatch_build.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_build_that_requires_kernels_fails_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = _hatch_build()
    monkeypatch.setattr(module, "compile_kernels", lambda: "no C compiler")
    hook = mock.Mock(spec=module.KernelBuildHook)
    data: dict[str, Any] = {"artifacts": []}
    monkeypatch.delenv("BATON_REQUIRE_KERNELS", raising=False)
    module.KernelBuildHook.initialize(hook, "standard", data)
    assert data == {"artifacts": []}, "without, but built"
    monkeypatch.setenv("BATON_REQUIRE_KERNELS", "1")
    with pytest.raises(RuntimeError, match="no C compiler"):
        module.KernelBuildHook.initialize(hook, "standard", data)
