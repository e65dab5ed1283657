"""Who may import whom, and that every distribution declares what it imports."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.support.repository import ROOT, SERVICES, TORCH_SERVICES, Part, imported_modules, parts

SCRIPTS = Path(sys.executable).parent
# Declared because another library needs it at run time, without an import of ours.
IMPORTED_BY_OTHERS = {
    "uvicorn": "started from the gateway's settings",
    "httptools": "uvicorn's parser",
    "accelerate": "used by transformers while loading",
    "safetensors": "used by transformers while loading",
}

# Namespaces that several distributions share, so that the first name does not tell which one.
SHARED_NAMESPACES = {
    "google.protobuf": "protobuf",
    "grpc": "grpcio",
    "opentelemetry": "opentelemetry-api",
    "opentelemetry.sdk": "opentelemetry-sdk",
    "opentelemetry.exporter": "opentelemetry-exporter-otlp-proto-grpc",
}


def _run(*command: str | Path, timeout_s: float = 55) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False
    )


@pytest.mark.parametrize("service", [name for name in SERVICES if name not in TORCH_SERVICES])
def test_service_imports_without_torch(service: str) -> None:
    code = (
        f"import sys, baton.{service}.__main__\n"
        "heavy = {'torch', 'transformers', 'baton.engine'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = _run(sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr


def test_sdk_and_cli_import_without_server_libraries() -> None:
    code = (
        "import sys, baton.client\n"
        "heavy = {'torch', 'nats', 'pydantic', 'opentelemetry', 'baton.rpc'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = _run(sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr


def test_import_contracts_hold() -> None:
    result = _run(SCRIPTS / "lint-imports", "--no-cache")
    assert result.returncode == 0, result.stdout


def test_ruff_is_content() -> None:
    result = _run(SCRIPTS / "ruff", "check", "--output-format", "concise", ".")
    assert result.returncode == 0, result.stdout


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _declared(part: Part) -> set[str]:
    requirements = part.project["project"]["dependencies"]  # type: ignore[index]
    return {_normal(re.split(r"[<>=!~\[ ;]", text, maxsplit=1)[0]) for text in requirements}


def _optional(part: Part) -> set[str]:
    extras = part.project["project"].get("optional-dependencies", {})  # type: ignore[attr-defined]
    return {
        _normal(re.split(r"[<>=!~\[ ;]", text, maxsplit=1)[0])
        for requirements in extras.values()
        for text in requirements
    }


def _distributions_of(part: Part) -> set[str]:
    """Distributions whose modules the part's own files import."""
    by_module = packages_distributions()
    prefixes = (
        SHARED_NAMESPACES
        | {"baton.oip": "baton-protos"}
        | {
            "baton." + ("v1" if other.name == "protos" else other.name): f"baton-{other.name}"
            for other in parts()
        }
    )
    found: set[str] = set()
    for name in set().union(*(imported_modules(path) for path in part.modules())):
        matching = [prefix for prefix in prefixes if f"{name}.".startswith(f"{prefix}.")]
        top = name.partition(".")[0]
        if matching:
            found.add(prefixes[max(matching, key=len)])
        elif top != "baton" and top not in sys.stdlib_module_names:
            found.update(_normal(dist) for dist in by_module.get(top, [f"unknown: {top}"]))
    return found - {f"baton-{part.name}"}


@pytest.mark.parametrize("part", parts(), ids=lambda part: part.name)
def test_declared_dependencies_are_the_imported_ones(part: Part) -> None:
    if part.name == "protos":
        pytest.skip("generated code only")
    declared, imported = _declared(part), _distributions_of(part)
    assert imported - declared - _optional(part) == set(), "imported and not declared"
    unused = declared - imported - set(IMPORTED_BY_OTHERS)
    assert unused == set(), "declared and not imported"


def test_every_dependency_says_why() -> None:
    silent = [
        f"{part.name}: {line.strip()}"
        for part in parts()
        for line in (part.folder / "pyproject.toml").read_text(encoding="utf-8").splitlines()
        if re.match(r'\s+"[a-z]', line) and "#" not in line and "baton-" not in line
    ]
    assert silent == []


def test_constraints_pin_all_that_is_installed_by_setup() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [line for line in pins if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][\w.]*", line)] == []
    pinned = {_normal(line.split("==")[0]) for line in pins}
    wanted = set().union(*(_declared(part) for part in parts()))
    assert {name for name in wanted if not name.startswith("baton-")} - pinned == set()
    assert "torch==2.13.0" in pins
