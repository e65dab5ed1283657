"""Adds the messages of one stream up to a completion, and times them."""

from __future__ import annotations

from baton.client.messages import chunk_from
from baton.client.types import Chunk, Completion, Logprob, Placement, Stage, Usage
from baton.core.errors import Internal
from baton.v1 import inference_pb2


class Collector:
    """State of one answer as it comes in. Times are monotonic seconds."""

    def __init__(self, started_at_s: float) -> None:
        self.num_attempts = 0
        self.has_messages = False
        self._started_at_s = started_at_s
        self._first_at_s: float | None = None
        self._ended_at_s: float | None = None
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[Logprob] = []
        self._prompt_logprobs: tuple[Logprob, ...] = ()
        self._last = Chunk()
        self._usage = Usage()
        self._stages: tuple[Stage, ...] = ()
        self._placement: Placement | None = None
        self._names = {"request_id": "", "model": "", "trace_id": ""}

    def add(self, message: inference_pb2.GenerateResponse, now: float) -> Chunk:
        """Takes the next message in and returns it as a chunk."""
        chunk = chunk_from(message)
        self.has_messages = True
        if self._first_at_s is None and (chunk.text or chunk.num_tokens):
            self._first_at_s = now
        self._texts.append(chunk.text)
        self._token_ids.extend(chunk.token_ids)
        self._logprobs.extend(chunk.logprobs)
        self._prompt_logprobs += chunk.prompt_logprobs
        for name in self._names:
            self._names[name] = getattr(chunk, name) or self._names[name]
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
            text="".join(self._texts),
            finish_reason=self._last.finish_reason,
            usage=self._usage,
            token_ids=tuple(self._token_ids),
            stop_reason=self._last.stop_reason,
            logprobs=tuple(self._logprobs),
            prompt_logprobs=self._prompt_logprobs,
            stages=self._stages,
            placement=self._placement,
            **self._names,
            ttft_s=ttft_s,
            elapsed_s=(self._ended_at_s or now) - self._started_at_s,
            num_attempts=self.num_attempts,
        )
