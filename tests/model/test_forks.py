"""Sequences with one prompt: its KV is computed once, and their outputs are those of each alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from baton.core.errors import KvCacheFull
from baton.core.handoff.frames import Span
from baton.core.sampling import SamplingParams
from tests.model.conftest import TinyModel
from tests.model.harness import GREEDY, Driver, assert_idle, make_engine, make_prompts, make_spec

NUM_CHOICES = 4
NUM_TOKENS = 20


def _sampling(choice: int) -> SamplingParams:
    return SamplingParams(temperature=1.0, seed=100 + choice, ignore_eos=True)


@pytest.mark.parametrize("num_prompt_tokens", [1, 15, 16, 17, 18, 40, 50])
@pytest.mark.parametrize("has_draft", [False, True])
def test_choices_share_the_prompt_and_sample_as_if_alone(
    tiny_model: TinyModel, num_prompt_tokens: int, has_draft: bool
) -> None:
    directory = tiny_model("llama")
    (prompt,) = make_prompts((num_prompt_tokens,), seed=41)
    draft = str(directory) if has_draft else None
    with make_engine(directory) as engine:
        driver = Driver(engine)
        alone = []
        for choice in range(NUM_CHOICES):
            spec = make_spec(f"a{choice}", prompt, NUM_TOKENS, sampling=_sampling(choice))
            engine.sequences.submit(replace(spec, cache_salt=str(choice)))
            alone.append(driver.run()[f"a{choice}"])
    with make_engine(directory, draft_model_path=draft, speculation=has_draft) as engine:
        driver = Driver(engine)
        engine.sequences.submit(make_spec("0", prompt, NUM_TOKENS, sampling=_sampling(0)))
        for _ in range(3):
            driver.step()
        for choice in range(1, NUM_CHOICES):
            spec = make_spec(str(choice), prompt, NUM_TOKENS, sampling=_sampling(choice))
            grant = engine.sequences.reserve(spec, fork_of="0")
            assert grant.num_cached_blocks == (num_prompt_tokens - 1) // 16
            engine.sequences.start_local(str(choice))
        outputs = driver.run()
        assert [outputs[str(choice)] for choice in range(NUM_CHOICES)] == alone
        counters = engine.stats().counters
        assert counters["forks"] == NUM_CHOICES - 1
        is_partly_filled = (num_prompt_tokens - 1) % 16 > 0
        assert counters["copied_blocks"] == (NUM_CHOICES - 1) * is_partly_filled
        assert counters.get("prefill_tokens", 0) == (num_prompt_tokens > 1) * num_prompt_tokens
        assert_idle(engine)


def test_a_choice_may_begin_when_the_first_one_has_written_further(tiny_model: TinyModel) -> None:
    (prompt,) = make_prompts((20,), seed=42)
    with make_engine(tiny_model("llama")) as engine:
        driver = Driver(engine)
        engine.sequences.submit(make_spec("0", prompt, 40))
        for _ in range(30):
            driver.step()
        assert len(driver.outputs["0"]) > 12, "its second block is full by now, and published"
        engine.sequences.reserve(make_spec("1", prompt, 40), fork_of="0")
        engine.sequences.release("0")
        engine.sequences.start_local("1")
        output = driver.run()["1"]
        assert output[: len(driver.outputs["0"])] == driver.outputs["0"]
        assert_idle(engine)


def test_what_cannot_be_shared_is_computed(tiny_model: TinyModel) -> None:
    prompt, other = make_prompts((40, 40), seed=43)
    with make_engine(tiny_model("llama")) as engine:
        driver = Driver(engine)
        engine.sequences.submit(make_spec("0", prompt, 30))
        driver.step()
        engine.sequences.submit(make_spec("late", other, 30))
        specs = [
            (make_spec("salt", prompt, 2, cache_salt="another tenant"), "0"),
            (make_spec("unknown", prompt, 2), "nobody"),
            (make_spec("other", other, 2), "0"),
            (make_spec("not yet", other, 2), "late"),
            (make_spec("asked", prompt, 2, sampling=replace(GREEDY, prompt_logprobs=0)), "0"),
        ]
        for spec, origin in specs:
            engine.sequences.reserve(spec, fork_of=origin)
            engine.sequences.start_local(spec.seq_id)
        driver.run()
        assert not engine.stats().counters.get("forks")
        assert driver.outputs["salt"] == driver.outputs["unknown"]
        assert_idle(engine)


def test_a_pushed_fork_keeps_what_was_pushed(tiny_model: TinyModel) -> None:
    directory = tiny_model("llama")
    (prompt,) = make_prompts((20,), seed=44)
    with make_engine(directory) as source, make_engine(directory) as target:
        source.sequences.submit(make_spec("p", prompt, 8, prefill_only=True))
        (first,) = Driver(source).run()["p"]
        driver = Driver(target)
        target.sequences.submit(make_spec("0", prompt, 8))
        driver.step()
        assert (
            target.sequences.reserve(make_spec("1", prompt, 8), fork_of="0").num_cached_blocks == 1
        )
        target.sequences.begin_fill("1")
        num_layers = target.fingerprint.layout.num_layers
        payload = source.transfer.read_blocks("p", Span(0, num_layers, 1, 1))
        target.transfer.write_blocks("1", Span(0, num_layers, 1, 1), memoryview(payload))
        target.sequences.commit("1", first)
        outputs = driver.run()
        assert [first, *outputs["1"]] == outputs["0"]
        assert not target.stats().counters["copied_blocks"]
        source.sequences.release("p")
        assert_idle(target)


@pytest.mark.parametrize("is_full", [False, True])
def test_forks_that_never_run_give_back_their_references(
    tiny_model: TinyModel, is_full: bool
) -> None:
    (prompt,) = make_prompts((20,), seed=45)
    with make_engine(tiny_model("llama"), num_blocks=6, headroom_tokens=16) as engine:
        driver = Driver(engine)
        engine.sequences.submit(make_spec("0", prompt, 30))
        driver.step()
        engine.sequences.reserve(make_spec("1", prompt, 30), fork_of="0")
        if is_full:
            engine.sequences.reserve(make_spec("2", prompt, 30), fork_of="0")
            with pytest.raises(KvCacheFull):
                engine.sequences.reserve(make_spec("3", prompt, 30), fork_of="0")
        engine.check()
        for name in "12":
            engine.sequences.release(name, quarantine=True)
            engine.sequences.end_quarantine(name)
        driver.run()
        assert_idle(engine)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_forks_that_end_or_are_preempted_do_not_disturb_the_others(
    tiny_model: TinyModel, kv_dtype: str
) -> None:
    directory = tiny_model("llama")
    (prompt,) = make_prompts((22,), seed=46)
    with make_engine(directory, kv_dtype=kv_dtype) as engine:
        driver = Driver(engine)
        for choice in range(NUM_CHOICES):
            spec = make_spec(str(choice), prompt, 30, sampling=_sampling(choice))
            engine.sequences.submit(replace(spec, cache_salt=str(choice)))
        alone = driver.run()
    # The prompt's first block is shared; with what each writes they do not all fit.
    with make_engine(directory, num_blocks=7, headroom_tokens=1, kv_dtype=kv_dtype) as engine:
        driver = Driver(engine)
        engine.sequences.submit(make_spec("0", prompt, 30, sampling=_sampling(0)))
        driver.step()
        for choice in range(1, NUM_CHOICES):
            engine.sequences.reserve(
                make_spec(str(choice), prompt, 30, sampling=_sampling(choice)), "0"
            )
        engine.sequences.start_local("1")
        engine.sequences.start_local("2")
        for _ in range(4):
            driver.step()
        engine.sequences.release("1")
        engine.sequences.start_local("3")
        outputs = driver.run()
        assert [outputs[name] for name in "023"] == [alone[name] for name in "023"]
        assert outputs["1"] == alone["1"][: len(outputs["1"])]
        counters = engine.stats().counters
        assert counters["forks"] == counters["copied_blocks"] == NUM_CHOICES - 1
        assert counters["preemptions"] > 0
        assert_idle(engine)


def test_a_forks_draft_knows_the_prompt(tiny_model: TinyModel) -> None:
    """Its KV is copied too: a draft that is the target itself is always right."""
    directory = tiny_model("llama")
    (prompt,) = make_prompts((30,), seed=47)
    with make_engine(directory, draft_model_path=str(directory), speculation=True) as engine:
        driver = Driver(engine)
        engine.sequences.submit(make_spec("0", prompt, 20))
        for _ in range(2):
            driver.step()
        engine.sequences.reserve(make_spec("1", prompt, 20), fork_of="0")
        engine.sequences.release("0")
        before = engine.stats().counters
        engine.sequences.start_local("1")
        driver.run()
        after = engine.stats().counters
        assert after["copied_blocks"] == 1
        drafted, accepted = (
            after[name] - before[name] for name in ("draft_tokens", "accepted_tokens")
        )
        assert drafted == accepted > 0
