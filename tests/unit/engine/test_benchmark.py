"""The engine benchmark's command line, and that it measures; nothing here is timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.engine.__main__ import main, parse
from benchmarks.engine.experts import main as measure_experts
from benchmarks.engine.quantized import QuantizedFigures
from benchmarks.engine.shapes import count_parameters, model_directory

KEYS = {
    "decode_b1_floor_fraction",
    "decode_b16_over_b1",
    "vs_transformers_b1",
    "vs_transformers_b16",
    "prefill_floor_fraction",
    "int8_decode_speedup",
    "int8_perplexity_change",
    "overhead_fraction",
}


def test_a_missing_device_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit):
        parse(["--device", "cuda"])
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--batch", "--context"])
def test_sizes_of_nothing_are_refused(option: str) -> None:
    with pytest.raises(SystemExit):
        parse([option, "0"])


def test_it_ends_with_one_line_of_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (model_directory("demo", torch.bfloat16, None) / "config.json").is_file():  # type: ignore[arg-type]
        pytest.skip("the demo model is not here")
    monkeypatch.setattr("benchmarks.engine.floors._READ_BYTES", 1 << 20)
    monkeypatch.setattr("benchmarks.engine.floors._GEMM_SIZE", 64)
    monkeypatch.setattr(
        "benchmarks.engine.__main__.measure_quantized", lambda *_: QuantizedFigures()
    )
    sizes = ["--batch", "1", "16", "--context", "32", "--prompt", "32", "--steps", "1"]
    assert main([*sizes, "--passes", "1", "--no-transformers", "--threads", "1", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures.keys() >= KEYS
    assert figures["decode_b1_floor_fraction"] > 0
    assert figures["vs_transformers_b1"] is None
    assert figures["decode_tokens_per_s"].keys() == {"1x32", "16x32"}
    assert figures["paged_layers"] + figures["sdpa_layers"] > 0
    assert figures["eager_steps"] > 0


def test_a_shape_without_weights_is_a_config_alone(tmp_path: Path) -> None:
    directory = model_directory("llama-3.1-8b", torch.bfloat16, tmp_path, has_weights=False)
    assert [path.name for path in directory.iterdir()] == ["config.json"]
    total, multiplied = count_parameters(directory)
    assert total == pytest.approx(7.5e9, rel=0.01), "without the embedding: a row is looked up"
    assert total - multiplied == 128256 * 4096


def test_parameters_of_a_mixture_are_those_of_a_token(tmp_path: Path) -> None:
    directory = model_directory("qwen3-moe-0.5b", torch.bfloat16, tmp_path, has_weights=False)
    expert, attention = 3 * 1024 * 512, (2 * 16 + 2 * 4) * 64 * 1024
    total, multiplied = count_parameters(directory)
    assert multiplied == pytest.approx(8 * (4 * expert + attention), rel=0.01)
    assert total - multiplied == 32000 * 1024


def test_experts_end_with_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--hidden", "128", "--inner", "64", "--experts", "4", "--top", "2", "--layers", "1"]
    assert measure_experts([*sizes, "--batch", "1", "5", "--turns", "1", "--json"]) == 0
    *_, one, five, last = capsys.readouterr().out.splitlines()
    assert one.startswith("| 1 |")
    assert five.startswith("| 5 |")
    ratios = json.loads(last)["over_loop"]["5"]
    assert ratios.keys() >= {"grouped_mm", "packed", "int8", "int4"}
    assert all(ratio > 0 for ratio in ratios.values())
