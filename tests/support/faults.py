"""Faults made on purpose, so that tests can show what the other side does about them."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, fields, replace

from baton.core.errors import BatonError, InvalidRequest
from baton.core.handoff.frames import Committed, Credit, KvChunk, Manifest, Opening, PushFrame
from baton.handoff.push_stream import PushStream

FROM_REQUEST_ID = "from_request_id"
"""In place of faults: they are those that a request's id names after MARK, on its first attempt."""
MARK = "~"
_SECONDS = re.compile(r"\d{1,4}(\.\d{1,6})?")


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong with a prompt. Chunks are counted from 0."""

    corrupt_chunk: int | None = None
    """Flip a bit of this chunk, after its checksum was taken."""
    drop_chunk: int | None = None
    """Leave this chunk out."""
    duplicate_chunk: int | None = None
    """Send this chunk twice."""
    reorder_chunk: int | None = None
    """Send this chunk after the frame that follows it."""
    stall_after_chunk: int | None = None
    """Send nothing more after this chunk, and keep the stream open."""
    drop_manifest: bool = False
    """End the stream without a manifest."""
    wrong_epoch: bool = False
    """Send chunks with an epoch that is not current."""
    delay_start_s: float = 0.0
    """Wait before the prompt is queued."""
    delay_chunk_s: float = 0.0
    """Notice so late that blocks were computed."""
    silent_s: float = 0.0
    """Wait before the first chunk without a sign of life."""
    times: int | None = None
    """Prompts that go wrong, the first ones of the process; None means all."""


NO_FAULTS = Faults()


def parse_faults(text: str) -> Faults:
    """Faults of "corrupt_chunk=1,times=1".

    Raises:
        ValueError: a name is not known, or a number is missing or negative.
    """
    flags = {item.name for item in fields(Faults) if isinstance(item.default, bool)}
    delays = {item.name for item in fields(Faults) if isinstance(item.default, float)}
    numbers = {item.name for item in fields(Faults)} - flags - delays
    given: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = part.partition("=")
        if name in flags and not value:
            given[name] = True
        elif name in numbers and value.isascii() and value.isdigit():
            given[name] = int(value)
        elif name in delays and _SECONDS.fullmatch(value):
            given[name] = float(value)
        else:
            names = ", ".join([
                *sorted(f"{name}=N" for name in numbers),
                *sorted(f"{name}=S" for name in delays),
                *sorted(flags),
            ])
            raise ValueError(f"must be {FROM_REQUEST_ID}, or made of {names}; got {part!r}")
    return Faults(**given)  # type: ignore[arg-type]


class FaultPlan:
    """Hands out each prompt's faults."""

    def __init__(self, text: str) -> None:
        """Takes faults, or FROM_REQUEST_ID.

        Raises:
            ValueError: it is not made of faults.
        """
        self._is_from_request_id = text.strip() == FROM_REQUEST_ID
        self._faults = NO_FAULTS if self._is_from_request_id else parse_faults(text)
        self._num_left = self._faults.times

    @property
    def is_on(self) -> bool:
        """True when any prompt will, or may, go wrong."""
        return self._is_from_request_id or self._faults != NO_FAULTS

    def next(self, request_id: str, attempt: int) -> Faults:
        """Faults of the next prompt.

        Raises:
            InvalidRequest: the request names faults that there are not.
        """
        if self._is_from_request_id:
            return _named(request_id) if attempt == 1 else NO_FAULTS
        if self._num_left is None:
            return self._faults
        if self._num_left <= 0:
            return NO_FAULTS
        self._num_left -= 1
        return self._faults


def _named(request_id: str) -> Faults:
    try:
        return parse_faults(request_id.partition(MARK)[2])
    except ValueError as error:
        raise InvalidRequest(f"faults in the request_id: {error}") from None


class FaultyStream(PushStream):
    """A push whose frames go wrong between the sender and the stream that carries them."""

    def __init__(self, stream: PushStream, faults: Faults) -> None:
        self._inner = stream
        self._faults = faults
        self._late: tuple[KvChunk, memoryview] | None = None
        self._is_over = asyncio.Event()

    async def open(self, opening: Opening) -> None:
        """Sends the first frame."""
        await self._inner.open(opening)

    @property
    def transport(self) -> str:  # type: ignore[override]
        """Name of what carries the bytes of chunks."""
        return self._inner.transport

    @property
    def max_chunk_bytes(self) -> int:
        """Most bytes that a chunk should have."""
        return self._inner.max_chunk_bytes

    def room(self, sequence: int, num_bytes: int) -> memoryview:
        """Memory to put a chunk into."""
        return self._inner.room(sequence, num_bytes)

    async def chunk(self, chunk: KvChunk, payload: memoryview) -> None:
        """Sends a chunk, or does something worse with it."""
        faults, sequence = self._faults, chunk.sequence
        if faults.silent_s and sequence == 0:
            await asyncio.sleep(faults.silent_s)
        if faults.wrong_epoch:
            chunk = replace(chunk, epoch=chunk.epoch + 1)
        if sequence == faults.corrupt_chunk:
            payload[0] ^= 1
        if sequence == faults.reorder_chunk:
            self._late = (chunk, payload)
        elif sequence != faults.drop_chunk:
            await self._inner.chunk(chunk, payload)
            await self._send_late()
        if sequence == faults.duplicate_chunk:
            await self._inner.chunk(chunk, payload)
        if sequence == faults.stall_after_chunk:
            await self._is_over.wait()

    async def send(self, frame: PushFrame) -> None:
        """Sends a frame, or leaves out the manifest."""
        if not (isinstance(frame, Manifest) and self._faults.drop_manifest):
            await self._inner.send(frame)
        if isinstance(frame, Manifest):
            await self._send_late()

    async def end(self) -> None:
        """Sends nothing more."""
        await self._inner.end()

    async def read(self) -> Credit | Committed:
        """The receiver's next answer."""
        try:
            return await self._inner.read()
        except BatonError:
            self._is_over.set()
            raise

    def cancel(self) -> None:
        """Ends the call."""
        self._inner.cancel()

    async def _send_late(self) -> None:
        late, self._late = self._late, None
        if late is not None:
            await self._inner.chunk(*late)
