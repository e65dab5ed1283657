"""Decode steps that are recorded once and repeated: the tokens of generate, padded or not.

The recording stands in for CUDA graphs, and plain operators for the varlen kernel.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch

from baton.engine import backends, graphs
from baton.engine.engine import Engine
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
from tests.support.recording import RecordingCapture, recorded_decoding

# Without what only CPUs have: packed layers, and experts one by one, which wait for routing.
SETTINGS = {
    "block_size": 256,
    "num_blocks": 24,
    "max_model_len_tokens": 768,
    "prepack_linears": False,
}


@pytest.fixture
def capture() -> Iterator[RecordingCapture]:
    with recorded_decoding() as recording:
        yield recording


def _run(engine: Engine, prompts: list[tuple[int, ...]], num_tokens: int) -> list[list[int]]:
    driver = Driver(engine)
    for index, prompt in enumerate(prompts):
        engine.sequences.submit(make_spec(str(index), prompt, num_tokens))
    outputs = driver.run()
    assert_idle(engine)
    return [outputs[str(index)] for index in range(len(prompts))]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gemma3_text", "mixtral"])
def test_tokens_are_those_of_generate(
    tiny_model: TinyModel, kind: str, capture: RecordingCapture
) -> None:
    directory = tiny_model(kind)
    # Five sequences are padded to six; two of them cross into another block.
    prompts = make_prompts((1, 17, 250, 256, 505), seed=11)
    expected = references(directory, prompts, 12)
    with make_engine(directory, max_num_seqs=6, **SETTINGS) as engine:
        assert capture.num_captured == 5, "1, 2, 3, 4, 6"
        assert _run(engine, prompts, 12) == expected
        counters = engine.stats().counters
        assert capture.num_replayed == counters["graph_steps"] > 8
        assert counters["graph_steps"] + counters["eager_steps"] == counters["steps"]
        assert counters["eager_steps"] >= 1, "prompts are computed eagerly"


def test_sequences_that_come_and_go_change_the_batch_size(
    tiny_model: TinyModel, capture: RecordingCapture
) -> None:
    directory = tiny_model("llama")
    prompts = make_prompts([5 + 9 * index for index in range(7)], seed=12)
    expected = references(directory, prompts, 16)
    with make_engine(directory, max_num_seqs=8, **SETTINGS) as engine:
        driver = Driver(engine)
        for index, prompt in enumerate(prompts):
            engine.sequences.submit(make_spec(str(index), prompt, 4 + 2 * index))
            driver.step()
            driver.step()
        outputs = driver.run()
        for index in range(7):
            assert outputs[str(index)] == expected[index][: 4 + 2 * index]
        assert engine.stats().counters["graph_steps"] > 0


def test_padding_writes_to_no_block_of_the_pool(
    tiny_model: TinyModel, capture: RecordingCapture
) -> None:
    with make_engine(tiny_model("llama"), max_num_seqs=8, **SETTINGS) as engine:
        kv = engine._runner.kv
        parts = kv._parts(0, kv.layout.num_layers)
        assert [len(part) for part in parts] == [25] * len(parts), "one block more than the pool's"
        # Capturing ran with padding only: nothing but the scratch block was touched.
        assert not any(part[:24].any() for part in parts)
        assert all(part[24].any() for part in parts)
        driver = Driver(engine)
        prompts = make_prompts((30, 40, 50, 60, 70), seed=13)
        for index, prompt in enumerate(prompts):
            engine.sequences.submit(make_spec(str(index), prompt, 8))
        for _ in range(4):
            driver.step()
        tables = [sequence.block_table for sequence in engine._state.running.values()]
        used = {block for table in tables for block in table}
        unused = [block for block in range(24) if block not in used]
        assert len(used) == 5
        assert not any(part[unused].any() for part in parts)
        # And none of the sequences' own blocks has KV behind its tokens.
        for sequence in engine._state.running.values():
            (block,) = sequence.block_table
            assert not any(part[block, sequence.num_computed_tokens :].any() for part in parts)
            assert all(part[block, sequence.num_computed_tokens - 1].any() for part in parts)


def test_logits_are_the_same_with_and_without(
    tiny_model: TinyModel, capture: RecordingCapture
) -> None:
    directory = tiny_model("mistral")
    prompts = make_prompts((3, 40, 300), seed=14)
    with (
        make_engine(directory, max_num_seqs=4, **SETTINGS) as on,
        make_engine(directory, max_num_seqs=4, cuda_graphs=False, **SETTINGS) as off,
    ):
        assert _run(on, prompts, 10) == _run(off, prompts, 10)
        assert on.stats().counters["graph_steps"] > 0
        assert off.stats().counters["graph_steps"] == 0
        assert off.stats().counters["eager_steps"] == off.stats().counters["steps"]


def test_drafts_are_proposed_by_graphs_and_verified_without(
    tiny_model: TinyModel, capture: RecordingCapture
) -> None:
    directory, draft = tiny_model("llama"), tiny_model("llama", seed=1)
    prompts = make_prompts((9, 260), seed=15)
    expected = references(directory, prompts, 20)
    settings = {**SETTINGS, "draft_model_path": str(draft), "speculation": True}
    with make_engine(directory, max_num_seqs=4, **settings) as engine:
        assert _run(engine, prompts, 20) == expected
        assert engine.stats().counters["draft_tokens"] > 0
        assert engine.stats().counters["eager_steps"] > 10, "several tokens per sequence"
        assert engine._draft_runner is not None
        assert engine._draft_runner.counters["graph_steps"] > 10


def test_a_model_that_cannot_be_captured_decodes_eagerly(
    tiny_model: TinyModel, capture: RecordingCapture, caplog: pytest.LogCaptureFixture
) -> None:
    def waiting(query: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        query.sum().item()
        output: torch.Tensor = varlen.operator(query, *arguments, **options)
        return output

    directory = tiny_model("llama")
    prompts = make_prompts((9, 30), seed=16)
    expected = references(directory, prompts, 8)
    with (
        caplog.at_level(logging.INFO),
        patch.object(backends, "find_kernel", lambda *_: waiting),
        make_engine(directory, max_num_seqs=4, **SETTINGS) as engine,
    ):
        assert "decode steps are not captured: aten.item" in caplog.text
        assert _run(engine, prompts, 8) == expected
        assert engine.stats().counters["graph_steps"] == 0


def test_a_model_with_other_attention_is_not_captured(
    tiny_model: TinyModel, capture: RecordingCapture, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), make_engine(tiny_model("gemma2"), **SETTINGS):
        assert "not captured: 3 of 3 layers do not attend with varlen" in caplog.text
        assert capture.num_captured == 0


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 5, 6, 7, 64, 100, 512, 4096])
def test_batch_sizes_are_few_and_close(max_num_seqs: int) -> None:
    sizes = graphs.batch_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert len(sizes) <= graphs.MAX_GRAPHS
    assert sizes[-1] == min(max_num_seqs, 1024)
    for below, size in zip([0, *sizes], sizes, strict=False):
        assert (size - below - 1) / size <= 1 / 3
