"""KV in 8 bits: half the memory, on every way that KV takes."""

from __future__ import annotations

import pytest
import torch

from baton.core.errors import KvLayoutMismatch
from baton.core.handoff.frames import Span
from baton.core.sampling import SamplingParams
from baton.engine.events import Tokens
from tests.model.conftest import TinyModel
from tests.model.harness import Driver, assert_idle, make_engine, make_prompts, make_spec
from tests.model.test_handoff import hand_over
from tests.support.tiny_models import load_reference

NUM_TOKENS = 16


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "deepseek_v2"])
def test_logprobs_stay_close_to_those_of_plain_kv(tiny_model: TinyModel, kind: str) -> None:
    directory = tiny_model(kind)
    (prompt,) = make_prompts((60,), seed=51)
    sampling = SamplingParams(temperature=0.0, ignore_eos=True, prompt_logprobs=0)
    with torch.inference_mode():
        logits = load_reference(directory)(torch.tensor([prompt])).logits[0]
    expected = logits.log_softmax(dim=-1)[:-1].gather(1, torch.tensor(prompt[1:]).unsqueeze(1))
    with make_engine(directory, kv_dtype="int8", max_num_batched_tokens=16, max_num_seqs=4) as e:
        driver = Driver(e)
        e.sequences.submit(make_spec("a", prompt, 4, sampling=sampling))
        driver.run()
        (first,) = [event for event in driver.events if getattr(event, "prompt_logprobs", ())]
        assert isinstance(first, Tokens)
        told = torch.tensor([one.logprob for one in first.prompt_logprobs])
        difference = (told - expected.squeeze(1)).abs()
        assert difference.median() < 0.15
        assert difference.max() > 1e-4, "nothing was rounded"


def test_a_pool_of_the_same_bytes_has_almost_twice_the_blocks(tiny_model: TinyModel) -> None:
    directory = tiny_model("qwen3")
    num_blocks = {}
    for kv_dtype in ("auto", "int8"):
        settings = {"dtype": "bfloat16", "num_blocks": None, "kv_bytes": 1 << 20}
        with make_engine(directory, kv_dtype=kv_dtype, **settings) as engine:
            num_blocks[kv_dtype] = sum(engine.kv_counts().values())
    # 24 numbers in 48 bytes, or in 26.
    assert num_blocks["int8"] / num_blocks["auto"] == pytest.approx(48 / 26, rel=0.01)


def test_what_it_was_computed_in_is_in_the_fingerprint(tiny_model: TinyModel) -> None:
    directory = tiny_model("llama")
    settings = {"kv_dtype": "int8", "dtype": "bfloat16"}
    with make_engine(directory, kv_dtype="int8") as wide, make_engine(directory, **settings) as e:
        assert e.fingerprint.layout == wide.fingerprint.layout
        assert e.fingerprint != wide.fingerprint


def test_it_hands_over_to_its_like_and_to_nothing_else(tiny_model: TinyModel) -> None:
    directory = tiny_model("llama")
    (prompt,) = make_prompts((40,), seed=52)
    with (
        make_engine(directory, kv_dtype="int8") as source,
        make_engine(directory, kv_dtype="int8") as target,
        make_engine(directory) as plain,
    ):
        source.sequences.submit(make_spec("alone", prompt, NUM_TOKENS))
        alone = Driver(source).run()["alone"]
        first = hand_over(source, target, "moved", prompt)
        assert [first, *Driver(target).run()["moved"]] == alone
        assert source.fingerprint == target.fingerprint
        assert "dtype: int8 != float32" in source.fingerprint.differences(plain.fingerprint)
        plain.sequences.reserve(make_spec("refused", prompt, NUM_TOKENS))
        plain.sequences.begin_fill("refused")
        payload = memoryview(bytes(source.fingerprint.layout.block_bytes))
        with pytest.raises(KvLayoutMismatch):
            plain.transfer.write_blocks("refused", Span(0, 3, 0, 1), payload)
        plain.sequences.release("refused")
        hashes = [engine.block_hashes(make_spec("", prompt, 1)) for engine in (source, plain)]
        assert hashes[0] != hashes[1], "nor do they share prefixes"
        assert_idle(source)
        assert_idle(target)


def test_prefixes_preemption_forks_and_drafts_change_no_token(tiny_model: TinyModel) -> None:
    directory = tiny_model("llama")
    prompts = make_prompts((40, 25, 30), seed=53)
    with make_engine(directory, kv_dtype="int8") as engine:
        driver = Driver(engine)
        for index, prompt in enumerate(prompts):
            engine.sequences.submit(make_spec(str(index), prompt, 30))
        expected = dict(driver.run())
        engine.sequences.submit(make_spec("again", prompts[0], 30))
        assert driver.run()["again"] == expected["0"]
    with make_engine(
        directory,
        kv_dtype="int8",
        draft_model_path=str(directory),
        speculation=True,
        num_blocks=9,
    ) as engine:
        driver = Driver(engine)
        for index, prompt in enumerate(prompts):
            engine.sequences.submit(make_spec(str(index), prompt, 30))
        outputs = driver.run()
        assert engine.stats().counters["preemptions"] > 0
        assert {name: outputs[name] for name in expected} == expected
        engine.sequences.submit(make_spec("origin", prompts[0], 30))
        driver.step()
        engine.sequences.reserve(make_spec("fork", prompts[0], 30), fork_of="origin")
        engine.sequences.start_local("fork")
        assert driver.run()["fork"] == expected["0"]
