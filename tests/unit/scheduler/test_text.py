"""Text over one multiplexed call that may break at any time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from baton.core.errors import InvalidRequest, NoWorker
from baton.scheduler.text import TextRelay
from baton.wire.clock import SystemClock
from baton.wire.tokenizer import OpenText, TextPiece, TextReply
from tests.support.eventually import eventually

HOW = OpenText("m")


class FakeCall:
    """A tokenizer whose tokens are code points and which holds back the last character."""

    def __init__(self) -> None:
        self.seen: dict[int, str] = {}
        self.sent: dict[int, int] = {}
        self.pieces: list[TextPiece] = []
        self.replies: asyncio.Queue[TextReply | None] = asyncio.Queue()
        self.is_silent = False
        self.is_cancelled = False
        self.break_in = -1

    async def write(self, piece: TextPiece) -> None:
        self.pieces.append(piece)
        if self.break_in == 0:
            self.replies.put_nowait(None)
            return
        self.break_in -= 1
        if not self.is_silent:
            self.replies.put_nowait(self._step(piece))

    def _step(self, piece: TextPiece) -> TextReply:
        if piece.open is not None:
            self.seen[piece.stream_id], self.sent[piece.stream_id] = "", 0
        if piece.open and piece.open.model == "refused":
            return TextReply(piece.stream_id, "", error=InvalidRequest("no"))
        if piece.stream_id not in self.seen:
            return TextReply(piece.stream_id, "")
        whole = self.seen[piece.stream_id] + "".join(map(chr, piece.token_ids))
        certain = len(whole) if piece.is_last else max(0, len(whole) - 1)
        text = whole[self.sent[piece.stream_id] : certain]
        self.seen[piece.stream_id], self.sent[piece.stream_id] = whole, certain
        if piece.is_last:
            del self.seen[piece.stream_id]
        return TextReply(piece.stream_id, text, num_tokens=len(piece.token_ids))

    async def read(self) -> TextReply | None:
        return await self.replies.get()

    def cancel(self) -> None:
        self.is_cancelled = True


class Bench:
    def __init__(self) -> None:
        self.calls: list[FakeCall] = []
        self.next_calls: list[FakeCall] = []
        self.addresses = ["a", "b"]
        self.lost: list[str] = []
        self.relay = TextRelay(self._open, self._pick, self.lost.append, SystemClock())

    def _open(self, address: str) -> FakeCall:  # type: ignore[return]
        call = self.next_calls.pop(0) if self.next_calls else FakeCall()
        self.calls.append(call)
        return call

    def _pick(self, model: str, avoid: frozenset[str]) -> str:
        left = [address for address in self.addresses if address not in avoid]
        if not self.addresses:
            raise NoWorker("no tokenizer")
        return (left or self.addresses)[0]


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    yield bench
    await bench.relay.close()
    assert all(call.is_cancelled for call in bench.calls)


async def test_outputs_share_one_call(bench: Bench) -> None:
    outputs = [bench.relay.open(HOW, 5.0) for _ in range(10)]

    async def say(index: int) -> str:
        text = ""
        for character in f"text {index}":
            text += (await outputs[index].add([ord(character)])).text
        return text + (await outputs[index].add([], is_last=True)).text

    texts = await asyncio.gather(*(say(index) for index in range(10)))
    assert texts == [f"text {index}" for index in range(10)]
    assert len(bench.calls) == 1


@pytest.mark.parametrize("break_in", range(6))
async def test_broken_call_is_replaced_and_no_character_lost_or_repeated(
    bench: Bench, break_in: int
) -> None:
    call = FakeCall()
    call.break_in = break_in
    bench.next_calls.append(call)
    output = bench.relay.open(HOW, 5.0)
    text, num_tokens = "", 0
    for character in "hello":
        reply = await output.add([ord(character)])
        text += reply.text
        num_tokens += reply.num_tokens
    text += (await output.add([], is_last=True)).text
    assert (text, num_tokens) == ("hello", 5)
    assert len(bench.calls) == 2
    assert bench.lost == ["a"]
    assert [piece.open is not None for piece in bench.calls[1].pieces].count(True) == 1


async def test_silent_tokenizer_is_given_up_for_another(bench: Bench) -> None:
    silent = FakeCall()
    silent.is_silent = True
    bench.next_calls.append(silent)
    output = bench.relay.open(HOW, 0.05)
    assert (await output.add([65, 66])).text == "A"
    assert len(bench.calls) == 2


async def test_lost_output_is_replayed(bench: Bench) -> None:
    output = bench.relay.open(HOW, 5.0)
    await output.add([65, 66])
    bench.calls[0].seen.clear()
    bench.addresses = ["b"]
    assert (await output.add([67])).text == "B"
    assert (await output.add([], is_last=True)).text == "C"


async def test_refused_output_is_not_tried_again(bench: Bench) -> None:
    output = bench.relay.open(OpenText("refused"), 5.0)
    with pytest.raises(InvalidRequest):
        await output.add([65])
    assert len(bench.calls) == 1


async def test_without_tokenizers_there_is_no_text(bench: Bench) -> None:
    bench.addresses = []
    with pytest.raises(NoWorker):
        await bench.relay.open(HOW, 0.2).add([65])


async def test_output_waits_a_while_for_a_tokenizer_to_come_back(bench: Bench) -> None:
    output = bench.relay.open(HOW, 5.0)
    await output.add([65, 66])
    await bench.relay.close()
    bench.addresses = []
    adding = asyncio.create_task(output.add([67]))
    await eventually(lambda: bench.lost)
    assert not adding.done()
    bench.addresses = ["c"]
    assert (await adding).text == "B"


async def test_closed_output_is_forgotten_at_the_tokenizer(bench: Bench) -> None:
    output = bench.relay.open(HOW, 5.0)
    await output.add([65])
    output.close()
    output.close()
    await eventually(lambda: not bench.calls[0].seen)
    assert len(bench.calls[0].pieces) == 2


async def test_cancelled_wait_leaves_the_call_in_order_for_others(bench: Bench) -> None:
    call = FakeCall()
    call.is_silent = True
    bench.next_calls.append(call)
    first, second = bench.relay.open(HOW, 5.0), bench.relay.open(HOW, 5.0)
    waiting = asyncio.create_task(first.add([65, 66]))
    await eventually(lambda: call.pieces)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    first.close()
    other = asyncio.create_task(second.add([67, 68]))
    await eventually(lambda: len(call.pieces) == 3)
    for piece in call.pieces:
        call.replies.put_nowait(call._step(piece))
    assert (await other).text == "C"
    assert len(bench.calls) == 1
