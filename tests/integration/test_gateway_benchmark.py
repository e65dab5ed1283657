"""The gateway benchmark's command line, and that it measures; nothing here is timed."""

from __future__ import annotations

import json

import pytest

from benchmarks.gateway.__main__ import main, parse


@pytest.mark.parametrize("option", ["--rounds", "--streams", "--tokens"])
def test_sizes_of_nothing_are_refused(option: str) -> None:
    with pytest.raises(SystemExit):
        parse([option, "0"])


def test_it_ends_with_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--rounds", "3", "--streams", "2", "--tokens", "20", "--clients", "0"]
    assert main([*sizes, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures.keys() >= {"added_ms_p50", "sse_chunks_per_s", "held_after_disconnects"}
    assert figures["sse_chunks_per_s"] > 0
    assert figures["direct_ms_p50"] > 0
