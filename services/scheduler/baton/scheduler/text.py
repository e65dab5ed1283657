"""Token ids to text through the tokenizers: one multiplexed call per tokenizer.

A call that breaks loses the outputs' state at the tokenizer, not here: each output keeps its token
ids and replays them to another tokenizer, or to the same one over a new call, and skips the text
that it has returned already. So a dying tokenizer costs a moment and no character.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextvars import Context
from dataclasses import replace
from itertools import count

from baton.core.clock import Clock
from baton.core.errors import BatonError, NoWorker, QueueFull, Stalled
from baton.rpc.tasks import Tasks
from baton.wire.tokenizer import OpenText, TextCall, TextPiece, TextReply

MAX_PENDING_PIECES = 4096
_MIN_TRIES = 3
_RETRY_DELAY_S = 0.1
OpenCall = Callable[[str], TextCall]
"""Starts a StreamText call to an address."""
PickTokenizer = Callable[[str, frozenset[str]], str]
"""Address of a tokenizer that knows the model, others than those named if possible."""
OnLost = Callable[[str], None]
"""Gets the address of a tokenizer whose call broke, or that does not answer."""


class TextLink:
    """One call to one tokenizer, shared by many outputs; dead for good once it broke.

    A separate task writes the pieces, so that a cancelled request never leaves one half
    sent: answers are matched to pieces by order alone.
    """

    def __init__(self, address: str, call: TextCall) -> None:
        self.address = address
        self.is_broken = False
        self._call = call
        self._pending: deque[tuple[int, asyncio.Future[TextReply]]] = deque()
        self._unsent: asyncio.Queue[TextPiece] = asyncio.Queue(MAX_PENDING_PIECES)
        spawn = Tasks("text link").spawn
        # An empty context: the call outlives the request that happens to open it, and must not
        # hang in that request's trace.
        self._tasks = [
            spawn(self._run(self._read()), "read", context=Context()),
            spawn(self._run(self._write()), "write", context=Context()),
        ]

    def send(self, piece: TextPiece) -> asyncio.Future[TextReply]:
        """Sends a piece; the future gets its answer, or NoWorker when the call breaks.

        Raises:
            QueueFull: too many pieces wait for this tokenizer.
            NoWorker: the call is broken.
        """
        if self.is_broken:
            raise NoWorker(f"the call to the tokenizer at {self.address} broke")
        if len(self._pending) >= MAX_PENDING_PIECES:
            raise QueueFull("too many tokens wait to be turned into text", retry_after_s=1.0)
        answer: asyncio.Future[TextReply] = asyncio.get_running_loop().create_future()
        self._pending.append((piece.stream_id, answer))
        self._unsent.put_nowait(piece)
        return answer

    async def close(self) -> None:
        """Ends the call."""
        self._break()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, work: Coroutine[None, None, None]) -> None:
        try:
            await work
        except BatonError:
            return
        finally:
            self._break()

    async def _write(self) -> None:
        while True:
            await self._call.write(await self._unsent.get())

    async def _read(self) -> None:
        while (reply := await self._call.read()) is not None and self._pending:
            stream_id, answer = self._pending.popleft()
            if answer.done():
                continue
            if reply.stream_id != stream_id:
                answer.set_exception(NoWorker(f"the tokenizer at {self.address} lost count"))
                return
            answer.set_result(reply)

    def _break(self) -> None:
        if self.is_broken:
            return
        self.is_broken = True
        self._call.cancel()
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        for _, answer in self._pending:
            if not answer.done():
                answer.set_exception(NoWorker(f"the tokenizer at {self.address} went away"))
                answer.exception()  # Read here: the caller may have gone.
        self._pending.clear()


class TextRelay:
    """The links to all tokenizers, opened when needed and opened again when they break."""

    def __init__(
        self, open_call: OpenCall, pick: PickTokenizer, on_lost: OnLost, clock: Clock
    ) -> None:
        self.clock = clock
        self._open_call = open_call
        self._pick = pick
        self.on_lost = on_lost
        self._links: dict[str, TextLink] = {}
        self.stream_ids = count(1)
        """Unique over all calls."""

    def open(self, how: OpenText, timeout_s: float) -> TextOutput:
        """A new output. Nothing is sent before its first tokens."""
        return TextOutput(self, how, timeout_s)

    def link(self, model: str, avoid: frozenset[str]) -> TextLink:
        """A live link to a tokenizer of the model.

        Raises:
            NoWorker: no tokenizer is up.
        """
        address = self._pick(model, avoid)
        link = self._links.get(address)
        if link is None or link.is_broken:
            link = TextLink(address, Context().run(self._open_call, address))
            self._links = {key: old for key, old in self._links.items() if not old.is_broken}
            self._links[address] = link
        return link

    def forget(self, link: TextLink, stream_id: int) -> None:
        """Frees an output's state at the tokenizer. Does not wait."""
        # A call without room for that piece will soon break; the tokenizer then drops the state.
        with contextlib.suppress(NoWorker, QueueFull):
            link.send(TextPiece(stream_id=stream_id, is_last=True)).add_done_callback(_ignore)

    async def close(self) -> None:
        """Ends all calls."""
        for link in self._links.values():
            await link.close()
        self._links.clear()


def _ignore(answer: asyncio.Future[TextReply]) -> None:
    """Reads the error of an answer without a reader, so that asyncio does not log it."""
    if not answer.cancelled():
        answer.exception()


class TextOutput:
    """One output's text. Used by one task."""

    def __init__(self, relay: TextRelay, how: OpenText, timeout_s: float) -> None:
        self._relay = relay
        self._clock = relay.clock
        self._how = how
        self._timeout_s = timeout_s
        self._token_ids: list[int] = []
        self._num_chars = 0
        """Characters returned so far."""
        self._link: TextLink | None = None
        self._stream_id = 0
        self._is_open = False

    def resume(self, token_ids: Sequence[int], num_chars: int) -> None:
        """Continues an output whose tokens, and so many characters of text, have been returned."""
        self._token_ids = list(token_ids)
        self._num_chars = num_chars

    async def add(
        self, token_ids: Sequence[int], *, describe: Sequence[int] = (), is_last: bool = False
    ) -> TextReply:
        """Text that became certain with these tokens; all that is left when `is_last`.

        Raises:
            NoWorker, Stalled: no tokenizer answered.
            BatonError: the tokenizer refused the output.
        """
        avoid: set[str] = set()
        give_up_s = self._clock.now() + self._timeout_s
        for attempt in count(1):
            try:
                reply = await self._try(token_ids, describe, avoid, is_last=is_last)
            except (NoWorker, Stalled) as error:
                self._lose_link(avoid)
                is_late = self._clock.now() >= give_up_s
                if is_late and attempt >= _MIN_TRIES:
                    raise NoWorker("no tokenizer could be reached", retry_after_s=1.0) from error
                # The first one is repeated at once; later there may be none to ask, for a moment.
                await self._clock.sleep(_RETRY_DELAY_S if attempt > 1 else 0.0)
            else:
                break
        self._token_ids.extend(token_ids)
        self._num_chars += len(reply.text)
        self._is_open = not (is_last or reply.stop)
        return reply

    def close(self) -> None:
        """Frees the state at the tokenizer, if any is left. Does not wait."""
        if self._link is not None and self._is_open:
            self._relay.forget(self._link, self._stream_id)
        self._is_open = False
        self._link = None

    def _lose_link(self, avoid: set[str]) -> None:
        if self._link is not None:
            avoid.add(self._link.address)
            self._relay.on_lost(self._link.address)
        self._link = None
        self._is_open = False

    async def _try(
        self,
        token_ids: Sequence[int],
        describe: Sequence[int],
        avoid: set[str],
        *,
        is_last: bool,
    ) -> TextReply:
        is_new = self._link is None or self._link.is_broken
        replayed = self._token_ids if is_new else []
        if self._link is None or is_new:
            self._link = self._relay.link(self._how.model, frozenset(avoid))
            self._stream_id = next(self._relay.stream_ids)
        self._is_open = True
        piece = TextPiece(
            stream_id=self._stream_id,
            token_ids=(*replayed, *token_ids),
            open=self._how if is_new else None,
            is_last=is_last,
            describe_token_ids=tuple(describe),
        )
        reply = await self._ask(self._link, piece)
        if reply.error is not None:
            self._is_open = False
            raise reply.error
        if not reply.stop and reply.num_tokens != len(piece.token_ids):
            raise NoWorker(f"the tokenizer at {self._link.address} lost this output")
        if is_new:
            # The replay returns all text again, from the start.
            return replace(
                reply,
                text=reply.text[self._num_chars :],
                num_tokens=reply.num_tokens - len(replayed),
            )
        return reply

    async def _ask(self, link: TextLink, piece: TextPiece) -> TextReply:
        try:
            async with self._clock.timeout(self._timeout_s):
                return await link.send(piece)
        except TimeoutError as error:
            self._relay.forget(link, piece.stream_id)
            raise Stalled(
                f"the tokenizer at {link.address} did not answer within {self._timeout_s:.1f} s"
            ) from error
