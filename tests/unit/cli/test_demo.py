"""The demo's verdict is honest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from baton.cli.demo import DemoFailed, check, demo_prompt
from baton.cli.models import NoModel, choose_models
from baton.cli.stages import sum_stages
from baton.client import Completion, Placement, Stage, Usage

NAMES = ("tokenize", "admit", "reserve", "queue", "prefill", "relay")
AFTER = ("handoff", "first_decode", "decode")
STAGES = tuple(Stage(name, i * 0.01, 0.01, before_first_token=True) for i, name in enumerate(NAMES))
STAGES += tuple(Stage(name, 0.06, 0.5, before_first_token=False) for name in AFTER)
GOOD = Completion(
    text="x",
    finish_reason="length",
    usage=Usage(prompt_tokens=300, completion_tokens=96),
    stages=STAGES,
    placement=Placement("p", "d", local_prefill=False, reason="forced", attempts=1),
    ttft_s=0.062,
)


def test_good_run_has_the_promised_last_line() -> None:
    assert check(GOOD).line() == "demo ok tokens=96 ttft_ms=62.0 stages_ms=60.0 gap_pct=3.23"


def test_only_stages_before_the_first_token_count() -> None:
    assert sum_stages(GOOD).stages_ms == pytest.approx(60.0)


@pytest.mark.parametrize("ttft_s", [0.064, 0.05, None])
def test_gap_in_either_direction_fails(ttft_s: float | None) -> None:
    with pytest.raises(DemoFailed, match="gap of"):
        check(replace(GOOD, ttft_s=ttft_s))


def test_local_prefill_missing_stages_and_no_text_fail() -> None:
    local = Placement("d", "d", local_prefill=True, reason="short_suffix", attempts=1)
    with pytest.raises(DemoFailed, match="prefill worker"):
        check(replace(GOOD, placement=local))
    with pytest.raises(DemoFailed, match="decode"):
        check(replace(GOOD, stages=STAGES[:-1]))
    with pytest.raises(DemoFailed, match="no text"):
        check(replace(GOOD, usage=Usage(prompt_tokens=300)))


def test_prompt_is_python_of_a_size_whose_prefill_shows() -> None:
    assert 2000 < len(demo_prompt()) < 3000
    assert demo_prompt().endswith("        return")


def model(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def test_models_are_chosen_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = model(tmp_path / "pair"), model(tmp_path / "pair-draft")
    monkeypatch.setenv("BATON_DEMO_MODEL", str(target))
    pair = choose_models("", "")
    assert (pair.name, pair.target, pair.draft) == ("pair", target, draft)
    assert choose_models("", "none").draft is None
    assert choose_models(str(target), "").draft is None, "a draft of the user's own model is named"
    assert choose_models(str(target), str(draft)).draft == draft
    with pytest.raises(NoModel, match=r"config\.json"):
        choose_models(str(tmp_path), "")
