"""Speculation must be invisible in the output, greedy or not, whatever the draft proposes."""

from __future__ import annotations

import itertools

import pytest

from baton.core.draft_policy import DraftPolicy
from baton.core.sampling import DraftSource, SamplingParams
from baton.engine.events import Tokens
from tests.model.conftest import TinyModel
from tests.model.harness import (
    Driver,
    assert_idle,
    make_engine,
    make_prompts,
    make_spec,
    references,
)

NUM_TOKENS = 24


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gemma2", "mixtral"])
@pytest.mark.parametrize("is_draft_perfect", [True, False])
def test_greedy_output_is_that_of_transformers(
    tiny_model: TinyModel, kind: str, is_draft_perfect: bool
) -> None:
    directory = tiny_model(kind)
    draft = directory if is_draft_perfect else tiny_model("llama", seed=9)
    prompts = make_prompts((1, 15, 16, 17, 33, 200), seed=11)
    expected = references(directory, prompts, NUM_TOKENS)
    with make_engine(
        directory, draft_model_path=str(draft), speculation=True, max_num_batched_tokens=64
    ) as engine:
        driver = Driver(engine)
        for index, prompt in enumerate(prompts):
            engine.sequences.submit(make_spec(str(index), prompt, NUM_TOKENS))
            driver.step()
        outputs = driver.run()
        assert [outputs[str(index)] for index in range(len(prompts))] == expected
        counters = engine.stats().counters
        assert counters["draft_tokens"] > 0
        if is_draft_perfect:
            assert counters["accepted_tokens"] > 0.8 * counters["draft_tokens"]
            per_step = [
                len(event.token_ids) for event in driver.events if isinstance(event, Tokens)
            ]
            assert max(per_step) == 5
        assert_idle(engine)


def _sampled(seed: int, **settings: object) -> SamplingParams:
    return SamplingParams(temperature=0.7, seed=seed, ignore_eos=True, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("is_draft_perfect", [True, False])
def test_sampled_output_is_the_same_with_and_without(
    tiny_model: TinyModel, is_draft_perfect: bool
) -> None:
    directory = tiny_model("llama")
    draft = directory if is_draft_perfect else tiny_model("qwen2", seed=9)
    prompts = make_prompts((3, 20, 40, 41), seed=12)
    settings = [
        _sampled(1),
        _sampled(2, top_p=0.8, top_k=50),
        _sampled(3, frequency_penalty=1.0, presence_penalty=0.5, repetition_penalty=1.2),
        _sampled(4, min_p=0.05, logprobs=True, top_logprobs=2),
    ]
    outputs = []
    for speculation in (False, True):
        with make_engine(directory, draft_model_path=str(draft), speculation=speculation) as engine:
            driver = Driver(engine)
            for index, prompt in enumerate(prompts):
                spec = make_spec(str(index), prompt, NUM_TOKENS, sampling=settings[index])
                engine.sequences.submit(spec)
            outputs.append(driver.run())
            assert bool(engine.stats().counters["draft_tokens"]) is speculation
            logprobs = [
                logprob
                for event in driver.events
                if isinstance(event, Tokens) and event.seq_id == "3"
                for logprob in event.logprobs
            ]
            assert len(logprobs) == NUM_TOKENS
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(("switch", "is_default"), [(False, True), (True, False), (None, False)])
def test_a_request_can_switch_it(
    tiny_model: TinyModel, switch: bool | None, is_default: bool
) -> None:
    directory = tiny_model("llama")
    sampling = SamplingParams(temperature=0.0, ignore_eos=True, speculation=switch)
    (prompt,) = make_prompts((10,))
    with make_engine(directory, draft_model_path=str(directory), speculation=is_default) as engine:
        engine.sequences.submit(make_spec("a", prompt, 8, sampling=sampling))
        Driver(engine).run()
        assert bool(engine.stats().counters["draft_tokens"]) is bool(switch)


@pytest.mark.parametrize("source", [DraftSource.MODEL, DraftSource.NGRAM, None])
@pytest.mark.parametrize("has_draft", [True, False])
def test_adaptive_and_looked_up_drafts_change_no_token(
    tiny_model: TinyModel, source: DraftSource | None, has_draft: bool
) -> None:
    directory = tiny_model("llama")
    draft = str(tiny_model("llama", seed=9)) if has_draft else None
    # Repetitive prompts, so that there is something to look up.
    prompts = [prompt * 5 for prompt in make_prompts((3, 7, 20), seed=16)]
    outputs = []
    for speculation in (False, True):
        with make_engine(
            directory, draft_model_path=draft, speculation=speculation, adaptive_drafts=True
        ) as engine:
            driver = Driver(engine)
            for index, prompt in enumerate(prompts):
                sampling = _sampled(index, draft_source=source, repetition_penalty=0.2)
                engine.sequences.submit(
                    make_spec(str(index), prompt, NUM_TOKENS, sampling=sampling)
                )
                driver.step()
            outputs.append(driver.run())
            is_modelled = has_draft and source is not DraftSource.NGRAM
            if speculation and not is_modelled:
                assert engine.stats().counters["accepted_tokens"] > 0
            assert_idle(engine)
    assert outputs[0] == outputs[1]


def test_a_draft_that_costs_what_it_saves_is_hardly_asked(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_model("llama")
    (prompt,) = make_prompts((20,), seed=17)
    (expected,) = references(directory, [prompt], 60)
    # Every look at the clock takes a second: target and draft cost the same.
    clock = itertools.count()
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    counts = []
    for adaptive_drafts in (False, True):
        with make_engine(
            directory,
            draft_model_path=str(tiny_model("llama", seed=9)),
            speculation=True,
            adaptive_drafts=adaptive_drafts,
        ) as engine:
            engine.sequences.submit(make_spec("a", prompt, 60))
            assert Driver(engine).run()["a"] == expected
            counts.append(engine.stats().counters["draft_tokens"])
    assert counts[1] < counts[0] / 4


def test_drafts_never_pass_max_tokens_or_the_context(tiny_model: TinyModel) -> None:
    directory = tiny_model("llama")
    prompts = make_prompts((30, 30, 30), seed=13)
    expected = references(directory, prompts, 34)
    with make_engine(
        directory,
        draft_model_path=str(directory),
        speculation=True,
        num_draft_tokens=7,
        num_blocks=12,
        max_model_len_tokens=64,
    ) as engine:
        for index, max_tokens in enumerate((1, 2, 34)):
            engine.sequences.submit(make_spec(str(index), prompts[index], max_tokens))
        outputs = Driver(engine).run()
        assert outputs["0"] == expected[0][:1]
        assert outputs["1"] == expected[1][:2]
        assert outputs["2"] == expected[2]
        assert_idle(engine)


def test_a_stop_token_among_accepted_drafts_ends_the_output_there(tiny_model: TinyModel) -> None:
    directory = tiny_model("llama")
    (prompt,) = make_prompts((20,), seed=14)
    (expected,) = references(directory, [prompt], 12)
    stop = expected[7]
    end = expected.index(stop) + 1
    sampling = SamplingParams(temperature=0.0, ignore_eos=True, stop_token_ids=(stop,))
    with make_engine(directory, draft_model_path=str(directory), speculation=True) as engine:
        driver = Driver(engine)
        engine.sequences.submit(make_spec("a", prompt, 12, sampling=sampling))
        assert driver.run()["a"] == expected[:end]
        last = driver.events[-1]
        assert isinstance(last, Tokens)
        assert last.stop_token_id == stop


def test_preempted_sequences_speculate_on(tiny_model: TinyModel) -> None:
    directory = tiny_model("llama")
    prompts = make_prompts((20, 25, 30, 10), seed=15)
    expected = references(directory, prompts, 40)
    with make_engine(
        directory, draft_model_path=str(directory), speculation=True, num_blocks=9
    ) as engine:
        for index, prompt in enumerate(prompts):
            engine.sequences.submit(make_spec(str(index), prompt, 40))
        outputs = Driver(engine).run()
        assert [outputs[str(index)] for index in range(len(prompts))] == expected
        assert engine.stats().counters["preemptions"] > 0
        assert engine.stats().counters["accepted_tokens"] > 0


def test_what_a_step_verified_and_the_targets_part_of_its_time_are_measured(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_model("llama")
    (prompt,) = make_prompts((20,), seed=18)
    clock, seen = itertools.count(), {}
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(DraftPolicy, "observe_target", lambda _, rows, s: seen.update({rows: s}))
    with make_engine(directory, draft_model_path=str(directory), speculation=True) as engine:
        # The last step of 13 tokens, after the prompt's and two with all drafts, has 1 draft.
        engine.sequences.submit(make_spec("a", prompt, 13))
        Driver(engine).run()
    assert set(seen) == {5, 2}
    # Looks at the clock: begin, update, end, and two around the draft, whose second is not counted.
    assert set(seen.values()) == {3.0}
