"""Adds the chunks of one stream up to a completion, and times them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from baton.client.retry import Retrier
from baton.client.types import Completion
from baton.core.errors import BatonError, Internal
from baton.core.output import Usage
from baton.core.request import Stage
from baton.wire.inference.chunks import Chunk, PlacementTaken
from baton.wire.inference.requests import GenerateRequest, ResumePoint

_MAX_ID_CHARS = 120
"""Leaves room for the number of the call in an id of 128."""


class Collector:
    """State of one answer as it comes in. Times are monotonic seconds."""

    def __init__(self, request: GenerateRequest, started_at_s: float, *, can_resume: bool) -> None:
        self.num_attempts = 0
        self._request = request
        self._can_resume = can_resume
        self._has_prompt_logprobs = False
        self._received_ids: list[int] = []
        self._num_received = 0
        self._num_chars = 0
        self._seed: int | None = None
        self._fingerprint = b""
        """Of what began the answer: nothing else may go on with it."""
        self._started_at_s = started_at_s
        self._first_at_s: float | None = None
        self._ended_at_s: float | None = None
        self._chunks: list[Chunk] = []
        self._last = Chunk()
        self._usage = Usage()
        self._stages: tuple[Stage, ...] = ()
        self._placement: PlacementTaken | None = None
        self._names = {"request_id": "", "model": "", "trace_id": ""}

    @property
    def is_whole(self) -> bool:
        """True when the last message is here."""
        return bool(self._last.finish_reason)

    @property
    def can_go_on(self) -> bool:
        """True when another call can give what is missing, and nothing else."""
        if not self._num_received:
            return not self._num_chars and not self._has_prompt_logprobs
        return (
            self._can_resume
            and self._seed is not None
            and len(self._received_ids) == self._num_received
        )

    def next_request(self) -> GenerateRequest:
        """The request of a further call: for the rest of the answer, once there is some."""
        request = self._request
        if not self._chunks:
            return request
        if self._seed is not None:
            request = replace(request, sampling=replace(request.sampling, seed=self._seed))
        if self._received_ids:
            point = ResumePoint(tuple(self._received_ids), self._num_chars, self._fingerprint)
            request = replace(request, resume=point)
        if request.request_id:
            # The server may still run the call that broke.
            request_id = f"{request.request_id[:_MAX_ID_CHARS]}.{self.num_attempts}"
            request = replace(request, request_id=request_id)
        return request

    def broke_off(self, token_ids: Sequence[int]) -> None:
        """A call ended early, with these output tokens received."""
        self._received_ids.extend(token_ids)

    def delay_s(self, error: BatonError, retrier: Retrier, ends_at_s: float) -> float | None:
        """Time to wait before another call; None when the answer is whole. Or raises the error."""
        now = time.monotonic()
        if self.is_whole:
            self.end(now)
            return None
        # An answer that has begun goes on where it broke off, or not at all.
        remaining_s = ends_at_s - now if self.can_go_on else 0.0
        delay_s = retrier.delay_s(error, self.num_attempts, remaining_s)
        if delay_s is None:
            raise error
        return delay_s

    def add(self, chunk: Chunk, now: float) -> Chunk:
        """Takes the next chunk in and returns it."""
        self._num_received += chunk.num_tokens
        self._num_chars += len(chunk.text)
        if chunk.seed is not None:
            self._seed = chunk.seed
        self._fingerprint = self._fingerprint or chunk.fingerprint
        if self._first_at_s is None and (chunk.text or chunk.num_tokens):
            self._first_at_s = now
        self._has_prompt_logprobs |= bool(chunk.prompt_logprobs)
        self._chunks.append(chunk)
        for name in self._names:
            self._names[name] = self._names[name] or getattr(chunk, name)
        self._usage = chunk.usage or self._usage
        self._stages = chunk.stages or self._stages
        self._placement = chunk.placement or self._placement
        self._last = chunk
        return chunk

    def end(self, now: float) -> None:
        """The stream ended well.

        Raises:
            Internal: it ended without a finish reason, so something is missing.
        """
        self._ended_at_s = now
        if not self._last.finish_reason:
            raise Internal("the server ended the stream without a finish reason")

    def completion(self, now: float) -> Completion:
        """What came so far; whole once the stream has ended."""
        ttft_s = None if self._first_at_s is None else self._first_at_s - self._started_at_s
        return Completion(
            text="".join(chunk.text for chunk in self._chunks),
            finish_reason=self._last.finish_reason,
            usage=self._usage,
            token_ids=tuple(one for chunk in self._chunks for one in chunk.token_ids),
            stop_reason=self._last.stop_reason,
            logprobs=tuple(one for chunk in self._chunks for one in chunk.logprobs),
            prompt_logprobs=tuple(one for chunk in self._chunks for one in chunk.prompt_logprobs),
            stages=self._stages,
            placement=self._placement,
            **self._names,
            ttft_s=ttft_s,
            elapsed_s=(self._ended_at_s or now) - self._started_at_s,
            num_attempts=self.num_attempts,
            seed=self._seed,
        )
