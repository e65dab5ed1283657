from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from baton.cli.main import app
from tests.support.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny")


def test_writes_a_checkpoint_and_says_what_it_came_to(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(
        app, ["quantize", str(model), str(out), "--scheme", "int4", "--group-size", "32", "--json"]
    )
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout.splitlines()[-1])
    assert document["num_layers"] == 21
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert document["quantized_bytes"] <= written < document["plain_bytes"] / 2
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"] == {
        "quant_method": "baton",
        "version": 1,
        "scheme": "int4",
        "lm_head": False,
        "group_size": 32,
    }


def test_prints_sizes_for_people(model: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["quantize", str(model), str(tmp_path / "out"), "--lm-head"])
    assert result.exit_code == 0, result.output
    assert "22 layers as int8 with lm_head: 0.5 MiB of weights became 0.2 MiB" in result.output


def test_prints_how_many_layers_are_experts(tmp_path: Path) -> None:
    model = make_tiny_model("mixtral", tmp_path / "mixture")
    result = CliRunner().invoke(app, ["quantize", str(model), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "36 layers (24 of them experts') as int8: 1.1 MiB of weights" in result.output


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--scheme", "int2"], "must be one of"),
        (["--scheme", "int4", "--group-size", "128"], "group sizes that fit: 32, 64"),
    ],
)
def test_says_why_it_cannot(model: Path, tmp_path: Path, options: list[str], reason: str) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["quantize", str(model), str(out), *options])
    assert result.exit_code == 1
    assert reason in result.output.replace("\n", " ")
    assert not out.exists()


def test_says_what_to_install(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "baton.engine.quantize_model", None)
    result = CliRunner().invoke(app, ["quantize", str(model), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "baton-cli[local]" in result.output.replace("\n", " ")
