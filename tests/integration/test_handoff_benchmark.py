"""The hand-off's benchmark over real processes: that it measures; nothing here is timed."""

from __future__ import annotations

import json

import pytest

from benchmarks.handoff.__main__ import main, parse


@pytest.mark.parametrize("sizes", [["--tokens", "24"], ["--tokens", "0"], ["--rounds", "0"]])
def test_sizes_that_cannot_work_are_refused(sizes: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse(sizes)


@pytest.mark.parametrize(
    ("part", "keys"),
    [("overlap", {"added_ttft_fraction", "hidden_fraction"}), ("prefix", {"prefix_speedup"})],
)
def test_it_ends_with_one_line_of_json(
    capsys: pytest.CaptureFixture[str], part: str, keys: set[str]
) -> None:
    sizes = ["--model", "demo", "--tokens", "64", "--rounds", "1"]
    assert main([*sizes, "--only", part, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert keys <= figures.keys()
    assert 0.0 <= figures.get("hidden_fraction", 0.5) <= 1.0
    assert figures.get("prefix_speedup", 0.5) > 0.0
