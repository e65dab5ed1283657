"""docker-compose.yml: its schema, what the schema cannot see, and that every setting is real."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.repository import ROOT, SERVICES, TORCH_SERVICES
from tests.support.service_settings import settings_class, variables

SCRIPTS = Path(sys.executable).parent
FILE = ROOT / "docker-compose.yml"
# Not settings of Baton: which service to run, and how to keep libraries silent.
OTHERS = {"SERVICE", "GRPC_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"}
# After its drain a process stops its server (10 s at most) and leaves (5 s at most).
AFTER_DRAIN_S = 15.0


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))


def _resolved(text: str) -> str:
    """With every `${NAME:-default}` replaced by its default."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def _environment(service: dict[str, Any]) -> dict[str, str]:
    return {name: _resolved(str(value)) for name, value in service.get("environment", {}).items()}


def test_follows_the_compose_specification() -> None:
    result = subprocess.run(
        [SCRIPTS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", FILE],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr


def test_names_only_what_it_defines(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert set(services) == {"nats", *SERVICES}
    used_volumes: set[str] = set()
    for name, service in services.items():
        assert set(service["networks"]) <= set(compose["networks"]), name
        assert set(service.get("depends_on", {})) <= set(services), name
        sources = [_resolved(volume).split(":")[0] for volume in service.get("volumes", [])]
        for source in sources:
            if source.startswith("."):
                assert (ROOT / source).is_dir(), f"{name} mounts {source}"
            else:
                used_volumes.add(source)
    assert used_volumes == set(compose["volumes"])


def test_waits_for_health_without_a_circle(compose: dict[str, Any]) -> None:
    services = compose["services"]
    needs = {name: set(service.get("depends_on", {})) for name, service in services.items()}
    for name, service in services.items():
        assert service["healthcheck"]["test"], name
        for needed, condition in service.get("depends_on", {}).items():
            assert condition == {"condition": "service_healthy"}, f"{name} on {needed}"
    started: set[str] = set()
    while len(started) < len(needs):
        startable = {name for name, all_of in needs.items() if all_of <= started} - started
        assert startable, f"depends_on goes in a circle among {set(needs) - started}"
        started |= startable


def test_services_can_be_scaled(compose: dict[str, Any]) -> None:
    """`--scale decode=3` fails when replicas would share a name, a host port or an address."""
    for name in SERVICES:
        service = compose["services"][name]
        assert "container_name" not in service
        assert "hostname" not in service
        assert _environment(service)["BATON_ADVERTISE_HOST"] == ""
        assert _environment(service).get("BATON_WORKER_ID", "") == ""
        assert name == "gateway" or "ports" not in service


def test_the_api_is_published_to_this_machine_only(compose: dict[str, Any]) -> None:
    [port] = compose["services"]["gateway"]["ports"]
    assert _resolved(port) == "127.0.0.1:8000:8000"


def test_only_workers_carry_torch_and_every_image_holds_its_services(
    compose: dict[str, Any],
) -> None:
    for name in SERVICES:
        service = compose["services"][name]
        held = service["build"]["args"]["SERVICES"].split()
        assert name in held
        assert service["environment"]["SERVICE"] == name
        assert (name in TORCH_SERVICES) == bool(set(held) & set(TORCH_SERVICES))
        assert service["deploy"]["resources"]["limits"]["memory"]


@pytest.mark.parametrize("name", SERVICES)
def test_every_variable_is_a_setting_with_a_good_value(
    compose: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = _environment(compose["services"][name])
    given = {key: value for key, value in environment.items() if key not in OTHERS}
    assert set(given) - variables(name) == set()
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    settings = settings_class(name)()
    assert environment["GRPC_VERBOSITY"] == "NONE"
    grace = re.fullmatch(r"(\d+)s", compose["services"][name]["stop_grace_period"])
    assert grace is not None
    assert settings.drain_grace_s + AFTER_DRAIN_S <= int(grace[1]), "SIGKILL would cut off a drain"
    assert name not in TORCH_SERVICES or given["BATON_NUM_THREADS"] == "1"
    assert settings.host == "0.0.0.0"
    assert settings.nats_url == "nats://nats:4222"
    ports = [str(port).rpartition(":")[2] for port in compose["services"][name].get("ports", [])]
    listening = {str(value) for key, value in given.items() if key.endswith("PORT")}
    assert set(ports) <= listening


def test_gateway_and_scheduler_take_the_same_keys_and_none_lies_here(
    compose: dict[str, Any],
) -> None:
    given = {
        name: {key: value for key, value in service.get("environment", {}).items() if "KEY" in key}
        for name, service in compose["services"].items()
    }
    passed_on = {key: f"${{{key}:-}}" for key in ("BATON_API_KEYS", "BATON_GATEWAY_KEY")}
    assert {name: keys for name, keys in given.items() if keys} == {
        "gateway": passed_on, "scheduler": passed_on
    }  # fmt: skip
    for ignoring in (".gitignore", ".dockerignore"):
        ignored = (ROOT / ignoring).read_text(encoding="utf-8").splitlines()
        assert {".env", "*"} & set(ignored), f"a file .env with keys is not in {ignoring}"


def test_cache_keeps_its_blocks_on_a_volume_that_its_user_may_write(
    compose: dict[str, Any],
) -> None:
    cache = compose["services"]["cache"]
    path = _environment(cache)["BATON_DISK_PATH"]
    assert f"cache-data:{path}" in cache["volumes"]
    # A new volume takes owner and mode of the image's folder.
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    assert f"install --directory --owner=baton --group=baton {path}" in dockerfile
