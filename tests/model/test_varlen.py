"""Whole models on the varlen backend, with its kernel in plain operators: tokens of generate."""

from __future__ import annotations

import pytest
import torch

from baton.engine import backends
from tests.model.conftest import TinyModel
from tests.model.harness import (
    Driver,
    assert_idle,
    make_engine,
    make_prompts,
    make_spec,
    references,
)
from tests.support import varlen

NUM_TOKENS = 12
LENGTHS = (1, 17, 255, 256, 257, 600)


@pytest.mark.parametrize(
    ("kind", "num_varlen"),
    [("llama", 3), ("qwen3", 3), ("mistral", 3), ("gemma3_text", 6), ("gemma2", 0), ("gpt_oss", 0)],
)
def test_tokens_are_those_of_generate(
    tiny_model: TinyModel, kind: str, num_varlen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_calls = 0

    def kernel(*arguments: object, **options: object) -> object:
        nonlocal num_calls
        num_calls += 1
        return varlen.varlen_attn(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(backends, "find_kernel", lambda *_: kernel)
    directory = tiny_model(kind)
    prompts = make_prompts(LENGTHS, seed=9)
    expected = references(directory, prompts, NUM_TOKENS)
    with make_engine(
        directory, block_size=256, num_blocks=24, max_num_batched_tokens=300
    ) as engine:
        driver = Driver(engine)
        num_calls = 0  # loading tries the kernel, too
        for index, prompt in enumerate(prompts):
            engine.sequences.submit(make_spec(str(index), prompt, NUM_TOKENS))
        outputs = driver.run()
        assert [outputs[str(index)] for index in range(len(prompts))] == expected
        counters = engine.stats().counters
        assert counters.get("varlen_layers", 0) == num_varlen
        assert num_calls == num_varlen * counters["steps"]
        assert_idle(engine)


def _refuses(*arguments: object, **options: object) -> torch.Tensor:
    raise RuntimeError("no kernel image is available")


def _computes_nonsense(query: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
    return query.flip(0)


@pytest.mark.parametrize(
    ("kernel", "reason"), [(_refuses, "no kernel image"), (_computes_nonsense, "logits differ")]
)
def test_a_kernel_that_fails_when_tried_is_not_used(
    tiny_model: TinyModel,
    kernel: object,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(backends, "find_kernel", lambda *_: kernel)
    directory = tiny_model("llama")
    (prompt,) = make_prompts((30,), seed=9)
    expected = references(directory, [prompt], NUM_TOKENS)
    with make_engine(directory, block_size=256, num_blocks=4) as engine:
        engine.sequences.submit(make_spec("0", prompt, NUM_TOKENS))
        assert Driver(engine).run()["0"] == expected[0]
        assert engine.stats().counters["sdpa_layers"] == 3
        assert engine.stats().counters.get("varlen_layers", 0) == 0
    assert "varlen was tried and failed: " in caplog.text
    assert reason in caplog.text


def test_a_draft_model_and_its_target_attend_alike(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "find_kernel", lambda *_: varlen.varlen_attn)
    directory, draft = tiny_model("llama"), tiny_model("llama", seed=1)
    prompts = make_prompts((5, 300), seed=10)
    expected = references(directory, prompts, NUM_TOKENS)
    with make_engine(
        directory, block_size=256, num_blocks=8, draft_model_path=str(draft), speculation=True
    ) as engine:
        for index, prompt in enumerate(prompts):
            engine.sequences.submit(make_spec(str(index), prompt, NUM_TOKENS))
        outputs = Driver(engine).run()
        assert [outputs["0"], outputs["1"]] == expected
        assert engine.stats().counters["draft_tokens"] > 0
