"""A prompt is hashed once, and never while the engine's lock is held."""

from __future__ import annotations

import pytest

from baton.core import hashing
from baton.core.hashing import chain
from baton.engine.engine import Engine
from tests.model.conftest import TinyModel
from tests.model.harness import Driver, make_engine, make_prompts, make_spec

NUM_TOKENS = 100
NUM_BLOCKS = NUM_TOKENS // 16


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The blocks that were hashed."""
    blocks: list[tuple[int, ...]] = []

    def counted(parent: bytes, token_ids: tuple[int, ...]) -> bytes:
        blocks.append(tuple(token_ids))
        return chain(parent, token_ids)

    monkeypatch.setattr(hashing, "chain", counted)
    return blocks


def _forbid_while_locked(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = hashing.chain

    def unlocked(parent: bytes, token_ids: tuple[int, ...]) -> bytes:
        assert not engine._state.lock.locked()
        return counted(parent, token_ids)

    monkeypatch.setattr(hashing, "chain", unlocked)


def test_prefix_look_up_prefill_and_write_back_hash_a_prompt_once(
    tiny_model: TinyModel, hashed: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (prompt,) = make_prompts([NUM_TOKENS])
    with make_engine(tiny_model("llama"), max_num_batched_tokens=32, max_num_seqs=8) as engine:
        _forbid_while_locked(engine, monkeypatch)
        spec = make_spec("a", prompt, 4, prefill_only=True)
        assert engine.match_prefix(engine.block_hashes(spec)) == 0
        engine.sequences.submit(spec)
        Driver(engine).run()
        assert engine.match_prefix(engine.block_hashes(spec)) == NUM_BLOCKS
        engine.sequences.release("a")
    assert len(hashed) == NUM_BLOCKS
    assert hashed == [prompt[start : start + 16] for start in range(0, NUM_TOKENS - 15, 16)]


def test_a_reservation_and_its_write_back_hash_a_prompt_once(
    tiny_model: TinyModel, hashed: list[tuple[int, ...]]
) -> None:
    (prompt,) = make_prompts([NUM_TOKENS])
    with make_engine(tiny_model("llama")) as engine:
        spec = make_spec("a", prompt, 30)
        engine.sequences.reserve(spec)
        assert len(hashed) == NUM_BLOCKS
        engine.sequences.start_local("a")
        driver = Driver(engine)
        output = driver.run()["a"]
        hashed.clear()
        found = engine.block_hashes(spec, output[:-1])
        assert len(hashed) == len(found) - NUM_BLOCKS == 2
        assert engine.match_prefix(found) == len(found), "all that was computed"


def test_a_prompt_that_waits_is_not_looked_up_again_in_each_step(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other = make_prompts([NUM_TOKENS, NUM_TOKENS], seed=3)
    with make_engine(tiny_model("llama"), max_num_seqs=1) as engine:
        driver = Driver(engine)
        engine.sequences.submit(make_spec("warm", first, 1))
        driver.run()
        engine.sequences.submit(make_spec("runs", other, 20))
        driver.step()
        engine.sequences.submit(make_spec("waits", first, 1))
        pool, looked_up = engine._state.pool, []
        match = pool.match

        def counted(hashes: object) -> list[int]:
            names = list(hashes)  # type: ignore[call-overload]
            looked_up.extend(names)
            return match(names)

        monkeypatch.setattr(pool, "match", counted)
        for _ in range(10):
            driver.step()
        assert len(looked_up) == NUM_BLOCKS
        driver.run()
        assert engine.stats().counters["cached_tokens"] == NUM_BLOCKS * 16


def test_an_eviction_is_noticed_by_a_prompt_that_waits(tiny_model: TinyModel) -> None:
    prompts = make_prompts([NUM_TOKENS, 150], seed=4)
    with make_engine(tiny_model("llama"), max_num_seqs=1, num_blocks=13) as engine:
        driver = Driver(engine)
        engine.sequences.submit(make_spec("warm", prompts[0], 1))
        expected = driver.run()["warm"]
        engine.sequences.submit(make_spec("runs", prompts[1], 20))
        engine.sequences.submit(make_spec("waits", prompts[0], 1))
        assert driver.run()["waits"] == expected
