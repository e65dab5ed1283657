"""KV that can be read before the step that computes it ends."""

from __future__ import annotations

import pytest

from baton.core.handoff.frames import Span
from baton.engine.engine import Engine
from baton.engine.events import BlocksReady, EngineEvent, LayersReady, Tokens
from tests.model.conftest import TinyModel
from tests.model.harness import assert_idle, make_engine, make_prompts, make_spec

SIZE = 16


class Listener:
    """Reads what is announced at the moment of the announcement."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.events: list[EngineEvent] = []
        self.early: list[tuple[str, Span, bytes]] = []
        engine.deliver_with(self.take)

    def take(self) -> None:
        """Called within a step, and after each."""
        for event in self.engine.drain_events():
            self.events.append(event)
            if isinstance(event, LayersReady):
                span = Span(0, event.layer_end, 0, event.num_blocks)
                content = self.engine.transfer.read_blocks(event.seq_id, span)
                self.early.append((event.seq_id, span, content))

    def run(self) -> None:
        while self.engine.step():
            self.take()


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mixtral"])
def test_layers_are_final_when_they_are_announced(tiny_model: TinyModel, kind: str) -> None:
    with make_engine(tiny_model(kind), max_num_batched_tokens=64, layer_group_bytes=1) as engine:
        listener = Listener(engine)
        prompts = dict(zip("abc", make_prompts((150, 20, 3), seed=5), strict=True))
        for name, prompt in prompts.items():
            engine.sequences.submit(make_spec(name, prompt, 8, prefill_only=True))
        listener.run()
        assert {name for name, _, _ in listener.early} == set(prompts)
        num_layers = engine.fingerprint.layout.num_layers
        for name, span, content in listener.early:
            assert engine.transfer.read_blocks(name, span) == content
            assert span.num_blocks <= -(-len(prompts[name]) // SIZE)
        for name, prompt in prompts.items():
            own = [event for event in listener.events if event.seq_id == name]
            first = next(i for i, event in enumerate(own) if isinstance(event, Tokens))
            told = [event for event in own[:first] if isinstance(event, LayersReady)]
            last = [event for event in told if event.num_blocks == -(-len(prompt) // SIZE)]
            assert [event.layer_end for event in last][-num_layers:] == [*range(1, num_layers + 1)]
            engine.sequences.release(name)
        assert_idle(engine)


def test_small_steps_and_decoding_are_announced_at_their_end(tiny_model: TinyModel) -> None:
    with make_engine(tiny_model("llama"), layer_group_bytes=1 << 20) as engine:
        listener = Listener(engine)
        (prompt,) = make_prompts((40,), seed=6)
        engine.sequences.submit(make_spec("a", prompt, 8, prefill_only=True))
        engine.sequences.submit(make_spec("b", prompt, 8))
        listener.run()
        assert listener.early == []
        assert [e.num_blocks for e in listener.events if isinstance(e, BlocksReady)] == [3]
        engine.sequences.release("a")


def test_what_is_released_within_a_step_is_not_announced(tiny_model: TinyModel) -> None:
    with make_engine(tiny_model("llama"), layer_group_bytes=1) as engine:
        told: list[EngineEvent] = []

        def release_at_the_first() -> None:
            told.extend(engine.drain_events())
            engine.sequences.release("a")

        engine.deliver_with(release_at_the_first)
        (prompt,) = make_prompts((40,), seed=7)
        engine.sequences.submit(make_spec("a", prompt, 8, prefill_only=True))
        engine.step()
        assert [event.layer_end for event in told if isinstance(event, LayersReady)] == [1]
        assert engine.drain_events() == []
        assert_idle(engine)


def test_no_event_follows_a_release(tiny_model: TinyModel) -> None:
    (prompt,) = make_prompts((20,), seed=7)
    with make_engine(tiny_model("llama")) as engine:
        for name in "ab":
            engine.sequences.submit(make_spec(name, prompt, 8))
        engine.step()
        engine.sequences.release("a")
        assert {event.seq_id for event in engine.drain_events()} == {"b"}
        engine.sequences.release("b")
        assert_idle(engine)
