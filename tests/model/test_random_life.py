"""Random commands while the engine computes: the accounting holds, and nothing is left behind."""

from __future__ import annotations

import contextlib
import queue
import random
import threading
from dataclasses import replace

import pytest

from baton.core.errors import BatonError
from baton.core.handoff.frames import Span
from baton.core.sampling import SamplingParams
from baton.core.sequence import SequenceSpec
from baton.engine.engine import Engine
from baton.engine.events import Failed, Tokens
from tests.model.conftest import TinyModel
from tests.model.harness import VOCAB_SIZE, assert_idle, make_engine, make_spec


class _Client:
    """Sends random commands, legal and not; every refusal must be a typed error."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine = engine
        self.rng = random.Random(seed)
        self.names: list[str] = []
        self.prompts: dict[str, tuple[int, ...]] = {}
        self.num_done = 0

    def act(self) -> None:
        commands = [
            self.submit,
            self.submit,
            self.reserve,
            self.fork,
            self.fill,
            self.commit,
            self.local,
            self.release,
        ]
        self.num_done += 1
        try:
            self.rng.choice(commands)()
        except BatonError:
            return

    def submit(self) -> None:
        self.engine.sequences.submit(self._spec())

    def reserve(self) -> None:
        self.engine.sequences.reserve(self._spec())

    def fork(self) -> None:
        origin = self._some()
        spec = replace(self._spec(), token_ids=self.prompts.get(origin, (1,)), prefill_only=False)
        self.prompts[spec.seq_id] = spec.token_ids
        self.engine.sequences.reserve(spec, fork_of=origin)

    def fill(self) -> None:
        name = self._some()
        self.engine.sequences.begin_fill(name)
        layout = self.engine.fingerprint.layout
        self.engine.transfer.write_blocks(
            name, Span(0, 2, 0, 1), memoryview(bytes(2 * layout.block_bytes // 3))
        )

    def commit(self) -> None:
        self.engine.sequences.commit(self._some(), self.rng.randrange(VOCAB_SIZE))

    def local(self) -> None:
        self.engine.sequences.start_local(self._some())

    def release(self) -> None:
        name = self._some()
        self.engine.sequences.release(name, quarantine=self.rng.random() < 0.5)
        if self.rng.random() < 0.5:
            self.engine.sequences.end_quarantine(name)

    def _some(self) -> str:
        return self.rng.choice(self.names[-16:]) if self.names else "nobody"

    def _spec(self) -> SequenceSpec:
        name = f"{id(self)}/{self.num_done}"
        self.names.append(name)
        # Few distinct prompts, so that prefixes are shared.
        prompt = [self.rng.randrange(3)] * self.rng.choice([1, 16, 30, 33, 64])
        self.prompts[name] = tuple(prompt)
        sampling = SamplingParams(
            temperature=self.rng.choice([0.0, 1.0]), seed=5, stop_token_ids=(1, 2, 3)
        )
        return make_spec(
            name,
            prompt,
            self.rng.randrange(1, 60),
            sampling=sampling,
            prefill_only=self.rng.random() < 0.15,
            priority=self.rng.randrange(2),
        )


@pytest.mark.parametrize("speculation", [False, True])
def test_nothing_is_lost_or_held(tiny_model: TinyModel, speculation: bool) -> None:
    directory = tiny_model("llama")
    draft = str(tiny_model("llama", seed=9)) if speculation else None
    with make_engine(
        directory,
        num_blocks=24,
        max_num_seqs=6,
        max_num_batched_tokens=40,
        max_num_waiting=20,
        draft_model_path=draft,
        speculation=speculation,
    ) as engine:
        clients = [_Client(engine, seed) for seed in (1, 2)]
        # Commands come while a step computes, and all over the run.
        # Few may wait, or all of them would come before the first step when threads switch late.
        permits: queue.Queue[None] = queue.Queue(maxsize=2)

        def send(client: _Client) -> None:
            for _ in range(120):
                permits.get(timeout=10)
                client.act()
                engine.check()

        threads = [threading.Thread(target=send, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            with contextlib.suppress(queue.Full):
                permits.put_nowait(None)
            engine.step()
            engine.check()
        for thread in threads:
            thread.join()
        for client in clients:
            for name in client.names:
                engine.sequences.release(name)
                engine.sequences.end_quarantine(name)
        assert not engine.step()
        events = engine.drain_events()
        assert not any(isinstance(event, Failed) for event in events)
        ended = [e.seq_id for e in events if isinstance(e, Tokens) and e.finish_reason is not None]
        assert len(ended) == len(set(ended)), "one end each"
        assert_idle(engine)
        counters = engine.stats().counters
        assert counters["output_tokens"] > 50
        assert counters["forks"] > 0
        assert counters["cached_tokens"] > 0
        assert engine.stats().num_waiting == engine.stats().num_running == 0
