"""Guided outputs fulfil their guide, and are the same however they come about."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jsonschema import validate
from tokenizers import Tokenizer

from baton.core.errors import InvalidRequest
from baton.core.guide import Guide, GuideKind
from baton.core.handoff.frames import Span
from baton.core.sampling import FinishReason, SamplingParams
from baton.engine.config import EngineConfig
from baton.engine.engine import Engine
from baton.engine.events import Failed, Tokens
from baton.engine.worker import EngineWorker
from tests.model.conftest import TinyModel
from tests.model.harness import Driver, assert_idle, make_engine, make_prompts, make_spec
from tests.support.tiny_models import EOS_TOKEN_ID

MAX_TOKENS = 400
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["cat", "dog"]},
        "sizes": {
            "type": "array",
            "items": {"type": "integer", "minimum": -99, "maximum": 99},
            "minItems": 1,
            "maxItems": 4,
        },
    },
    "required": ["name", "kind", "sizes"],
    "additionalProperties": False,
}
GUIDE = Guide(GuideKind.JSON_SCHEMA, json.dumps(SCHEMA))


def _sampling(temperature: float = 0.0, **settings: object) -> SamplingParams:
    values: dict[str, object] = {"temperature": temperature, "guide": GUIDE, "seed": 5, **settings}
    return SamplingParams(**values)  # type: ignore[arg-type]


SETTINGS = [
    _sampling(),
    _sampling(1.0, seed=6),
    _sampling(1.5, seed=7),
    _sampling(0.8, top_p=0.9, top_k=20, min_p=0.01),
    _sampling(0.8, repetition_penalty=1.3, frequency_penalty=0.5, logprobs=True, top_logprobs=3),
    _sampling(0.0, min_tokens=30),
]


def _assert_fulfilled(directory: Path, output: list[int]) -> None:
    assert output[-1] == EOS_TOKEN_ID
    text = Tokenizer.from_file(str(directory / "tokenizer.json")).decode(output[:-1])
    validate(json.loads(text), SCHEMA)


def _run_all(engine: Engine, prompts: list[tuple[int, ...]]) -> dict[str, list[int]]:
    driver = Driver(engine)
    for index, prompt in enumerate(prompts):
        sampling = SETTINGS[index % len(SETTINGS)]
        engine.sequences.submit(make_spec(str(index), prompt, MAX_TOKENS, sampling=sampling))
        driver.step()
    # One without a guide shares every batch and is free to write anything.
    free = SamplingParams(temperature=1.0, seed=1, ignore_eos=True)
    engine.sequences.submit(make_spec("free", prompts[0], 40, sampling=free))
    outputs = driver.run()
    assert {driver.reasons[str(index)] for index in range(len(prompts))} == {FinishReason.STOP}
    assert_idle(engine)
    return outputs


PROMPTS = make_prompts((3, 16, 17, 40, 5, 9, 33, 70), seed=21)


@pytest.mark.parametrize("is_draft_perfect", [True, False])
def test_outputs_fulfil_the_schema_with_and_without_speculation(
    tiny_model: TinyModel, is_draft_perfect: bool
) -> None:
    directory = tiny_model("llama")
    draft = directory if is_draft_perfect else tiny_model("qwen2", seed=9)
    with make_engine(directory) as engine:
        plain = _run_all(engine, PROMPTS)
    for index in range(len(PROMPTS)):
        _assert_fulfilled(directory, plain[str(index)])
    assert len({tuple(output) for output in plain.values()}) >= len(PROMPTS) - 1
    with make_engine(directory, draft_model_path=str(draft), speculation=True) as engine:
        assert _run_all(engine, PROMPTS) == plain
        counters = engine.stats().counters
        # A perfect draft proposes masked too; without masks it would hardly ever be right.
        share = counters["accepted_tokens"] / counters["draft_tokens"]
        assert share > (0.8 if is_draft_perfect else 0.05)


def test_the_unguided_are_not_changed_by_guided_neighbours(tiny_model: TinyModel) -> None:
    free = SamplingParams(temperature=1.0, seed=1, ignore_eos=True)
    with make_engine(tiny_model("llama")) as engine:
        together = _run_all(engine, PROMPTS)["free"]
        driver = Driver(engine)
        engine.sequences.submit(make_spec("alone", PROMPTS[0], 40, sampling=free))
        assert driver.run()["alone"] == together


@pytest.mark.parametrize("sampling", [SETTINGS[0], SETTINGS[1], SETTINGS[4]])
@pytest.mark.parametrize("num_done", [1, 7, 15])
def test_another_engine_goes_on_in_the_middle(
    tiny_model: TinyModel, sampling: SamplingParams, num_done: int
) -> None:
    directory = tiny_model("llama")
    with make_engine(directory) as engine:
        driver = Driver(engine)
        engine.sequences.submit(make_spec("whole", PROMPTS[2], MAX_TOKENS, sampling=sampling))
        whole = driver.run()["whole"]
    _assert_fulfilled(directory, whole)
    assert len(whole) > num_done + 1
    with make_engine(directory, draft_model_path=str(directory), speculation=True) as engine:
        driver = Driver(engine)
        engine.sequences.submit(
            make_spec(
                "rest",
                [*PROMPTS[2], *whole[:num_done]],
                MAX_TOKENS,
                sampling=sampling,
                num_output_tokens=num_done,
            )
        )
        assert driver.run()["rest"] == whole[num_done:]


def test_a_hand_off_after_the_first_token_goes_on_as_one_engine_would(
    tiny_model: TinyModel,
) -> None:
    directory, prompt, sampling = tiny_model("llama"), PROMPTS[3], SETTINGS[1]
    with make_engine(directory) as alone:
        driver = Driver(alone)
        alone.sequences.submit(make_spec("whole", prompt, MAX_TOKENS, sampling=sampling))
        whole = driver.run()["whole"]
    with make_engine(directory) as sender, make_engine(directory) as receiver:
        grant = receiver.sequences.reserve(make_spec("r/1", prompt, MAX_TOKENS, sampling=sampling))
        prefill = Driver(sender)
        sender.sequences.submit(
            make_spec("r/1", prompt, MAX_TOKENS, sampling=sampling, prefill_only=True)
        )
        first = prefill.run()["r/1"]
        assert first == whole[:1]
        num_blocks = -(-len(prompt) // 16)
        assert grant.num_cached_blocks == 0
        num_layers = len(sender.fingerprint.layout.num_kv_heads)
        receiver.sequences.begin_fill("r/1")
        payload = sender.transfer.read_blocks("r/1", Span(0, num_layers, 0, num_blocks))
        receiver.transfer.write_blocks(
            "r/1", Span(0, num_layers, 0, num_blocks), memoryview(payload)
        )
        receiver.sequences.commit("r/1", first[0])
        sender.sequences.release("r/1")
        decode = Driver(receiver)
        assert decode.run()["r/1"] == whole[1:]
        assert_idle(sender)


def test_preempted_sequences_go_on_within_their_guide(tiny_model: TinyModel) -> None:
    directory = tiny_model("llama")
    with make_engine(directory) as engine:
        plain = _run_all(engine, PROMPTS)
    with make_engine(directory, num_blocks=40, max_model_len_tokens=500) as engine:
        assert _run_all(engine, PROMPTS) == plain
        assert engine.stats().counters["preemptions"] > 0


def test_min_tokens_gives_way_where_only_the_end_is_left(tiny_model: TinyModel) -> None:
    sampling = _sampling(guide=Guide.choice(["a", "b"]), min_tokens=10)
    with make_engine(tiny_model("llama")) as engine:
        driver = Driver(engine)
        engine.sequences.submit(make_spec("r", PROMPTS[0], 20, sampling=sampling))
        output = driver.run()["r"]
        assert len(output) == 2
        assert output[1] == EOS_TOKEN_ID


@pytest.mark.parametrize("guide", [Guide(GuideKind.REGEX, "(("), Guide(GuideKind.LARK, "x")])
def test_a_malformed_guide_is_refused_before_anything_is_taken(
    tiny_model: TinyModel, guide: Guide
) -> None:
    with make_engine(tiny_model("llama")) as engine:
        spec = make_spec("r", PROMPTS[0], 20, sampling=_sampling(guide=guide))
        for take in (engine.sequences.submit, engine.sequences.reserve):
            with pytest.raises(InvalidRequest, match="guide"):
                take(spec)
        assert engine.kv_counts()["free"] == 256
        assert not engine.step()


def test_a_guide_that_fails_ends_its_sequence_only(tiny_model: TinyModel) -> None:
    with make_engine(tiny_model("llama")) as engine:
        impossible = make_spec(
            "bad", [*PROMPTS[0], 1, 2], 20, sampling=_sampling(), num_output_tokens=2
        )
        engine.sequences.submit(impossible)
        engine.sequences.submit(make_spec("good", PROMPTS[1], MAX_TOKENS, sampling=_sampling()))
        events = []
        while engine.step():
            events += engine.drain_events()
        failed = [event for event in events if isinstance(event, Failed)]
        assert [event.seq_id for event in failed] == ["bad"]
        assert isinstance(failed[0].error, InvalidRequest)
        last = [event for event in events if isinstance(event, Tokens)][-1]
        assert (last.seq_id, last.finish_reason) == ("good", FinishReason.STOP)
        assert_idle(engine)


async def test_the_worker_compiles_beside_the_engine(tiny_model: TinyModel) -> None:
    config = EngineConfig(str(tiny_model("llama")), "tiny", dtype="float32", num_blocks=16)
    worker = await EngineWorker.start(config)
    try:
        await worker.prepare(None)
        await worker.prepare(GUIDE)
        assert GUIDE in worker.engine.grammars
        with pytest.raises(InvalidRequest, match="refused"):
            await worker.prepare(Guide(GuideKind.REGEX, "(("))
    finally:
        await worker.stop()
