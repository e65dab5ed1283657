"""Prefill on one engine, decode on another: the tokens of a single one."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from baton.core.errors import InvalidRequest, KvCacheFull, KvLayoutMismatch, RequestNotFound
from baton.core.handoff.frames import Span
from baton.core.sampling import FinishReason, SamplingParams
from baton.engine.engine import Engine
from baton.engine.events import Tokens
from tests.model.conftest import TinyModel
from tests.model.harness import (
    GREEDY,
    Driver,
    assert_idle,
    make_engine,
    make_prompts,
    make_spec,
    references,
)

NUM_TOKENS = 16


def hand_over(
    source: Engine,
    target: Engine,
    name: str,
    prompt: tuple[int, ...],
    *,
    sampling: SamplingParams = GREEDY,
) -> int:
    """Prefill on `source`, KV in two chunks of layers to `target`; returns the first token."""
    grant = target.sequences.reserve(make_spec(name, prompt, NUM_TOKENS, sampling=sampling))
    source.sequences.submit(
        make_spec(name, prompt, NUM_TOKENS, sampling=sampling, prefill_only=True)
    )
    driver = Driver(source)
    (first,) = driver.run()[name]
    ready = driver.blocks_ready(name)
    num_blocks = -(-len(prompt) // 16)
    assert ready[-1] == num_blocks
    assert all(a <= b for a, b in pairwise(ready))
    target.sequences.begin_fill(name)
    num_layers = target.fingerprint.layout.num_layers
    for layers in ((0, 1), (1, num_layers)):
        span = Span(*layers, grant.num_cached_blocks, num_blocks - grant.num_cached_blocks)
        payload = source.transfer.read_blocks(name, span)
        target.transfer.write_blocks(name, span, memoryview(payload))
    target.sequences.commit(name, first)
    assert source.sequences.release(name) == num_blocks
    return first


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "mixtral"])
@pytest.mark.parametrize("speculation", [False, True])
def test_decoding_elsewhere_changes_nothing(
    tiny_model: TinyModel, kind: str, speculation: bool
) -> None:
    directory = tiny_model(kind)
    prompts = make_prompts((1, 15, 16, 17, 32, 33, 150), seed=21)
    expected = references(directory, prompts, NUM_TOKENS)
    draft = str(directory) if speculation else None
    with (
        make_engine(directory, max_num_batched_tokens=64) as source,
        make_engine(directory, draft_model_path=draft, speculation=speculation) as target,
    ):
        assert source.fingerprint == target.fingerprint
        driver = Driver(target)
        firsts = {}
        for index, prompt in enumerate(prompts):
            firsts[str(index)] = hand_over(source, target, str(index), prompt)
            driver.step()
        outputs = driver.run()
        assert [[firsts[name], *outputs[name]] for name in firsts] == expected
        indexes = [event.token_index for event in driver.events if isinstance(event, Tokens)]
        assert min(indexes) == 1, "the first token is the source's to send"
        assert_idle(source)
        assert_idle(target)


def test_sampled_tokens_do_not_depend_on_where_they_are_made(tiny_model: TinyModel) -> None:
    directory = tiny_model("llama")
    (prompt,) = make_prompts((40,), seed=22)
    sampling = SamplingParams(
        temperature=0.9, seed=7, ignore_eos=True, frequency_penalty=0.7, top_p=0.9
    )
    with make_engine(directory) as source, make_engine(directory) as target:
        source.sequences.submit(make_spec("alone", prompt, NUM_TOKENS, sampling=sampling))
        alone = Driver(source).run()["alone"]
        first = hand_over(source, target, "moved", prompt, sampling=sampling)
        moved = [first, *Driver(target).run()["moved"]]
        assert moved == alone
        # A fail-over after six tokens: prompt and output so far are computed anew.
        resumed = make_spec(
            "resumed",
            [*prompt, *alone[:6]],
            NUM_TOKENS,
            sampling=sampling,
            num_output_tokens=6,
        )
        driver = Driver(target)
        target.sequences.submit(resumed)
        assert driver.run()["resumed"] == alone[6:]
        assert driver.reasons["resumed"] is FinishReason.LENGTH
        (index, *_) = [event.token_index for event in driver.events if isinstance(event, Tokens)]
        assert index == 6


def test_cached_blocks_are_not_sent_again(tiny_model: TinyModel) -> None:
    directory = tiny_model("llama")
    (prompt,) = make_prompts((70,), seed=23)
    (expected,) = references(directory, [prompt], NUM_TOKENS)
    with make_engine(directory) as source, make_engine(directory) as target:
        for name in ("a", "b"):
            first = hand_over(source, target, name, prompt)
            assert [first, *Driver(target).run()[name]] == expected
        grant = target.sequences.reserve(make_spec("c", prompt, NUM_TOKENS))
        assert grant.num_cached_blocks == 4
        assert target.kv_counts()["reserved"] == grant.num_blocks - 4
        target.sequences.release("c")
        assert_idle(target)


def test_a_reservation_can_be_computed_locally(tiny_model: TinyModel) -> None:
    directory = tiny_model("llama")
    (prompt,) = make_prompts((70,), seed=24)
    (expected,) = references(directory, [prompt], NUM_TOKENS)
    with make_engine(directory) as engine:
        engine.sequences.reserve(make_spec("a", prompt, NUM_TOKENS))
        driver = Driver(engine)
        assert not driver.step(), "a reservation alone computes nothing"
        engine.sequences.start_local("a")
        assert driver.run()["a"] == expected
        assert_idle(engine)


def test_kept_copies_can_be_read_until_they_are_released(tiny_model: TinyModel) -> None:
    (prompt,) = make_prompts((40,), seed=25)
    with make_engine(tiny_model("llama")) as engine:
        engine.sequences.submit(make_spec("a", prompt, 4, prefill_only=True))
        driver = Driver(engine)
        driver.run()
        assert engine.kv_counts()["held"] == 3
        assert engine.stats().num_held == 1
        first = engine.transfer.read_blocks("a", Span(0, 3, 0, 3))
        assert first == engine.transfer.read_blocks("a", Span(0, 3, 0, 3))
        assert len(first) == 3 * engine.fingerprint.layout.block_bytes
        assert engine.sequences.release("a") == 3
        assert engine.sequences.release("a") == 0
        with pytest.raises(RequestNotFound):
            engine.transfer.read_blocks("a", Span(0, 3, 0, 3))
        assert engine.kv_counts() | {"held": 0, "cached": 2} == engine.kv_counts()


def test_blocks_move_through_a_store(tiny_model: TinyModel) -> None:
    directory = tiny_model("qwen2")
    (prompt,) = make_prompts((70,), seed=26)
    (expected,) = references(directory, [prompt], NUM_TOKENS)
    with make_engine(directory) as source, make_engine(directory) as target:
        source.sequences.submit(make_spec("a", prompt, NUM_TOKENS))
        Driver(source).run()
        hashes = source.block_hashes(make_spec("", prompt, 1))
        assert hashes == target.block_hashes(make_spec("", prompt, 1))
        exported = source.transfer.export_blocks([*hashes, b"unknown"])
        assert [block_hash for block_hash, _ in exported] == hashes
        payloads = [memoryview(payload) for _, payload in exported]
        with pytest.raises(KvLayoutMismatch):
            target.transfer.import_blocks(hashes[:1], [payloads[0][:-1]])
        assert target.transfer.import_blocks(hashes, payloads) == 4
        assert target.transfer.import_blocks(hashes, payloads) == 4
        assert target.kv_counts()["cached"] == 4
        (change,) = target.drain_kv_events()
        assert change.sequence == 1
        assert set(change.stored) == set(hashes)
        assert target.kv_snapshot() == (1, hashes)
        target.sequences.submit(make_spec("a", prompt, NUM_TOKENS))
        assert Driver(target).run()["a"] == expected
        assert target.stats().counters["cached_tokens"] == 64


def test_a_refused_reservation_takes_nothing(tiny_model: TinyModel) -> None:
    prompts = make_prompts((50, 50), seed=27)
    with make_engine(tiny_model("llama"), num_blocks=6) as engine:
        engine.sequences.reserve(make_spec("a", prompts[0], 4))
        with pytest.raises(KvCacheFull) as caught:
            engine.sequences.reserve(make_spec("b", prompts[1], 4))
        assert caught.value.retry_after_s
        assert engine.sequences.release("b") == 0
        assert engine.sequences.release("a") == 4
        assert_idle(engine)


def test_aborted_transfers_are_quarantined(tiny_model: TinyModel) -> None:
    directory: Path = tiny_model("llama")
    (prompt,) = make_prompts((40,), seed=28)
    with make_engine(directory) as engine:
        engine.sequences.reserve(make_spec("a", prompt, 4))
        payload = memoryview(bytes(engine.fingerprint.layout.block_bytes))
        with pytest.raises(InvalidRequest, match="not filling"):
            engine.transfer.write_blocks("a", Span(0, 3, 0, 1), payload)
        engine.sequences.begin_fill("a")
        engine.transfer.write_blocks("a", Span(0, 3, 0, 1), payload)
        with pytest.raises(KvLayoutMismatch):
            engine.transfer.write_blocks("a", Span(0, 3, 0, 2), payload)
        with pytest.raises(InvalidRequest, match="3 blocks"):
            engine.transfer.write_blocks("a", Span(0, 3, 2, 2), payload)
        assert engine.sequences.release("a", quarantine=True) == 3
        assert engine.kv_counts()["quarantined"] == 3
        with pytest.raises(RequestNotFound):
            engine.transfer.write_blocks("a", Span(0, 3, 0, 1), payload)
        engine.sequences.end_quarantine("a")
        engine.sequences.end_quarantine("a")
        assert_idle(engine)


def test_a_first_token_that_ends_the_output_ends_it_at_the_commit(tiny_model: TinyModel) -> None:
    (prompt,) = make_prompts((20,), seed=29)
    with make_engine(tiny_model("llama")) as engine:
        engine.sequences.reserve(make_spec("a", prompt, 1))
        engine.sequences.begin_fill("a")
        engine.sequences.commit("a", 5)
        (event,) = engine.drain_events()
        assert isinstance(event, Tokens)
        assert (event.token_ids, event.finish_reason) == ((), FinishReason.LENGTH)
        assert_idle(engine)


def test_an_import_evicts_none_of_the_blocks_that_it_follows(tiny_model: TinyModel) -> None:
    directory = tiny_model("llama")
    (prompt,) = make_prompts([100], seed=9)
    spec = make_spec("a", prompt, 1)
    with make_engine(directory) as source, make_engine(directory, num_blocks=4) as target:
        source.sequences.submit(spec)
        Driver(source).run()
        hashes = source.block_hashes(spec)
        payloads = [payload for _, payload in source.transfer.export_blocks(hashes)]
        assert target.transfer.import_blocks(hashes[:2], payloads[:2]) == 2
        assert target.transfer.import_blocks(hashes[2:6], payloads[2:6], hashes[:2]) == 2
        assert target.match_prefix(hashes) == 4
        gone = [b"unknown" + bytes(9)]
        assert target.transfer.import_blocks(hashes[4:5], payloads[4:5], gone) == 0
