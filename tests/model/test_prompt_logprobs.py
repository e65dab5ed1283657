"""Log-probabilities of prompts: those of transformers, whatever the prompt's way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from baton.core.errors import InvalidRequest
from baton.core.sampling import SamplingParams, TokenLogprob
from baton.engine.events import Tokens
from tests.model.conftest import TinyModel
from tests.model.harness import Driver, assert_idle, make_engine, make_prompts, make_spec
from tests.support.tiny_models import load_reference

PROMPTS = make_prompts((1, 2, 33, 90), seed=31)
ASKED = SamplingParams(temperature=0.0, ignore_eos=True, prompt_logprobs=3)


def _told(driver: Driver, seq_id: str) -> tuple[TokenLogprob, ...]:
    events = [e for e in driver.events if isinstance(e, Tokens) and e.seq_id == seq_id]
    assert all(not event.prompt_logprobs for event in events[1:])
    return events[0].prompt_logprobs


def _assert_right(directory: Path, prompt: Sequence[int], told: Sequence[TokenLogprob]) -> None:
    with torch.inference_mode():
        logits = load_reference(directory)(torch.tensor([prompt])).logits[0]
    expected = logits.log_softmax(dim=-1)[:-1]
    assert len(told) == len(prompt) - 1
    for row, token_id, one in zip(expected, prompt[1:], told, strict=True):
        assert one.logprob == pytest.approx(row[token_id].item(), abs=1e-3)
        values, _ = row.topk(3)
        assert one.top_logprobs == pytest.approx(values.tolist(), abs=1e-3)
        assert len(one.top_token_ids) == 3


@pytest.mark.parametrize("max_num_batched_tokens", [16, 512])
def test_they_are_those_of_transformers_in_chunks_and_beside_others(
    tiny_model: TinyModel, max_num_batched_tokens: int
) -> None:
    directory = tiny_model("llama")
    with make_engine(
        directory, max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=8
    ) as engine:
        driver = Driver(engine)
        silent = replace(ASKED, prompt_logprobs=None, logprobs=True)
        for index, prompt in enumerate(PROMPTS):
            engine.sequences.submit(make_spec(f"silent{index}", prompt, 4, sampling=silent))
            engine.sequences.submit(make_spec(f"asked{index}", prompt, 4, sampling=ASKED))
        outputs = driver.run()
        for index, prompt in enumerate(PROMPTS):
            assert outputs[f"asked{index}"] == outputs[f"silent{index}"]
            assert not _told(driver, f"silent{index}")
            _assert_right(directory, prompt, _told(driver, f"asked{index}"))
        assert_idle(engine)


@pytest.mark.parametrize("kind", ["gemma2", "granite", "cohere", "gpt2", "mixtral"])
def test_logits_are_made_for_some_tokens_at_a_time(tiny_model: TinyModel, kind: str) -> None:
    """Soft caps, scales and whatever else a model does behind its output layer included."""
    directory = tiny_model(kind)
    with make_engine(directory) as engine:
        driver = Driver(engine)
        head = engine._runner.model.module.get_output_embeddings()
        num_rows: list[int] = []
        head.register_forward_pre_hook(lambda _, given: num_rows.append(given[0].shape[-2]))
        for index, prompt in enumerate(PROMPTS):
            engine.sequences.submit(make_spec(str(index), prompt, 2, sampling=ASKED))
        driver.run()
        for index, prompt in enumerate(PROMPTS):
            _assert_right(directory, prompt, _told(driver, str(index)))
        assert 0 < max(num_rows) <= 32
        assert sum(num_rows) == sum(map(len, PROMPTS)) + len(PROMPTS)


def test_a_cached_prefix_does_not_hide_them(tiny_model: TinyModel) -> None:
    directory = tiny_model("llama")
    with make_engine(directory) as engine:
        driver = Driver(engine)
        for name in ("first", "again"):
            engine.sequences.submit(make_spec(name, PROMPTS[3], 2, sampling=ASKED))
            driver.run()
            _assert_right(directory, PROMPTS[3], _told(driver, name))
        assert (
            engine.sequences.reserve(
                make_spec("r", PROMPTS[3], 2, sampling=ASKED)
            ).num_cached_blocks
            == 0
        )
        engine.sequences.start_local("r")
        driver.run()
        _assert_right(directory, PROMPTS[3], _told(driver, "r"))
        assert_idle(engine)


def test_they_survive_preemption_and_come_once(tiny_model: TinyModel) -> None:
    directory = tiny_model("llama")
    prompts = make_prompts((60, 61, 62, 63), seed=32)
    with make_engine(
        directory,
        num_blocks=14,
        max_num_batched_tokens=32,
        max_num_seqs=4,
        max_model_len_tokens=120,
    ) as engine:
        driver = Driver(engine)
        for index, prompt in enumerate(prompts):
            engine.sequences.submit(
                make_spec(str(index), prompt, 40, sampling=ASKED, priority=index)
            )
            driver.step()
        driver.run()
        assert engine.stats().counters["preemptions"] > 0
        for index, prompt in enumerate(prompts):
            _assert_right(directory, prompt, _told(driver, str(index)))


def test_a_later_attempt_does_not_tell_them_again(tiny_model: TinyModel) -> None:
    with make_engine(tiny_model("llama")) as engine:
        driver = Driver(engine)
        spec = make_spec("r", PROMPTS[2], 4, sampling=ASKED, num_output_tokens=2)
        engine.sequences.submit(spec)
        driver.run()
        assert not _told(driver, "r")


def test_more_alternatives_than_there_are_of_outputs_are_refused() -> None:
    assert SamplingParams(prompt_logprobs=20).check().prompt_logprobs == 20
    with pytest.raises(InvalidRequest, match="prompt_logprobs"):
        SamplingParams(prompt_logprobs=21).check()


def test_a_prompt_with_more_of_them_than_a_message_holds_is_refused(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.engine.sequences.MAX_PROMPT_LOGPROBS", 100)
    with make_engine(tiny_model("llama")) as engine:
        engine.sequences.submit(make_spec("fits", [1] * 25, 2, sampling=ASKED))
        with pytest.raises(InvalidRequest, match="prompt_logprobs of 26 tokens"):
            engine.sequences.submit(make_spec("r", [1] * 26, 2, sampling=ASKED))


def test_a_prompt_that_is_preempted_half_way_is_told_once(tiny_model: TinyModel) -> None:
    directory = tiny_model("llama")
    first, prompt, other = make_prompts((14, 60, 10), seed=9)
    settings = {"max_num_batched_tokens": 16, "max_num_seqs": 4, "num_blocks": 6}
    with make_engine(directory, **settings) as engine:
        driver = Driver(engine)
        engine.sequences.submit(make_spec("a", first, 8))
        driver.step()
        engine.sequences.submit(make_spec("b", prompt, 1, sampling=ASKED))
        driver.step()
        engine.sequences.reserve(make_spec("r", other, 1))
        driver.step()
        driver.step()
        assert engine.stats().counters["preemptions"] == 1
        engine.sequences.release("r")
        driver.run()
        _assert_right(directory, prompt, _told(driver, "b"))
        assert_idle(engine)
