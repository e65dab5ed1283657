"""Requests: what was asked, what came out so far, and the record that stays for operators."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, replace
from itertools import islice
from random import Random

from baton.core.clock import Clock
from baton.core.errors import DeadlineExceeded, InvalidRequest, PromptTooLong, RequestNotFound
from baton.core.hashing import BlockHashes, Fingerprint
from baton.core.ids import MAX_REQUEST_ID_CHARS
from baton.core.output import TokenBatch, Usage
from baton.core.placement import Placement
from baton.core.request import RequestState
from baton.core.sampling import SamplingParams
from baton.scheduler.request_timeline import RequestTimeline
from baton.wire.inference.chunks import PlacementTaken
from baton.wire.inference.records import RequestRecord
from baton.wire.inference.requests import GenerateRequest
from baton.wire.orders import AttemptOrder

_SEED_BITS = 63
MAX_RUNNING = 256
"""Running requests that one list shows."""
RequestKey = tuple[str, str]
"""Tenant and request id: two tenants may use one id at the same time."""


@dataclass(frozen=True, slots=True)
class AcceptedRequest:
    """What was asked. Complete once the prompt is tokenized."""

    job: GenerateRequest
    worker_request_id: str
    """Id towards workers, unique over all schedulers; the caller's id is only a label."""
    model: str
    timeout_s: float
    deadline_s: float
    """On the scheduler's clock."""
    sampling: SamplingParams
    """The caller's settings; `completed` fills in seed and max_tokens."""
    prompt_ids: tuple[int, ...] = ()

    @property
    def key(self) -> RequestKey:
        """What the scheduler finds the request by."""
        return tenant_of(self.job.cache_salt), self.job.request_id

    def completed(self, limit: int, rng: Random) -> AcceptedRequest:
        """The tokenized request with a seed and the most tokens that it may produce.

        `limit` is how many tokens of prompt and output the model takes; 0 when no worker says.

        Raises:
            PromptTooLong: prompt and output do not fit the limit.
            InvalidRequest: the output that it resumes has all its tokens.
        """
        seed = self.job.sampling.seed
        max_tokens = self._max_tokens(limit) if limit else self.job.sampling.max_tokens
        if max_tokens is not None and len(self.job.received_ids) >= max_tokens:
            raise InvalidRequest("resume has max_tokens tokens: nothing is left to produce")
        seed = rng.getrandbits(_SEED_BITS) if seed is None else seed
        return replace(self, sampling=replace(self.job.sampling, max_tokens=max_tokens, seed=seed))

    def _max_tokens(self, limit: int) -> int:
        wanted = self.job.sampling.max_tokens
        num_prompt = len(self.prompt_ids)
        room = limit - num_prompt
        if room < 1:
            raise PromptTooLong(
                f"the prompt has {num_prompt} tokens and model {self.model!r} takes {limit},"
                f" output included; shorten the prompt by at least {1 - room} tokens"
            )
        if wanted is not None and wanted > room:
            raise PromptTooLong(
                f"the prompt's {num_prompt} tokens and max_tokens {wanted} exceed the {limit}"
                f" that model {self.model!r} takes; lower max_tokens to at most {room}"
            )
        return room if wanted is None else wanted


def tenant_of(cache_salt: str) -> str:
    """The tenant in front of a salt; "" where there are no tenants. See `front.salted`."""
    tenant, colon, _ = cache_salt.partition(":")
    return tenant if colon else ""


def worker_request_id(request_id: str, rng: Random) -> str:
    """A request's id towards workers, which all schedulers and tenants share.

    Random, so that requests whose callers chose the same id never end each other's attempts; the
    caller's id follows it as a label for the workers' logs.
    """
    return f"{rng.getrandbits(64):016x}.{request_id}"[:MAX_REQUEST_ID_CHARS]


class RequestOutput:
    """What went to the caller so far, over all attempts: a fail-over continues from it."""

    def __init__(self, job: GenerateRequest) -> None:
        self.ids: list[int] = list(job.received_ids)
        self.digest = job.resume.fingerprint if job.resume else b""
        """Fingerprint of what computes the output; empty before that is known."""
        self.cached_tokens = 0
        """Of the prompt, that some worker had in its cache."""
        self.draft_tokens = 0
        self.accepted_tokens = 0
        self.finish_reason = ""
        """Such as "stop"; empty before the end."""

    @property
    def pinned_digest(self) -> bytes:
        """Fingerprint that the next attempt's workers must have; empty for any."""
        return self.digest if self.ids else b""

    def begin(self, fingerprint: Fingerprint | None) -> None:
        """Notes what the next attempt computes with; an output that began keeps its digest."""
        if fingerprint is not None and not self.pinned_digest:
            self.digest = fingerprint.digest()

    def found_cached(self, num_tokens: int) -> None:
        """Notes how much of the prompt a worker had in its cache."""
        self.cached_tokens = max(self.cached_tokens, num_tokens)

    def count_drafts(self, batch: TokenBatch) -> None:
        """Adds up what speculation did for a batch."""
        self.draft_tokens += batch.draft_tokens
        self.accepted_tokens += batch.accepted_tokens

    def usage(self, num_prompt_tokens: int) -> Usage:
        """What the request used up to now."""
        return Usage(
            prompt_tokens=num_prompt_tokens,
            completion_tokens=len(self.ids),
            cached_tokens=min(self.cached_tokens, num_prompt_tokens),
            draft_tokens=self.draft_tokens,
            accepted_tokens=self.accepted_tokens,
        )


class PromptKv:
    """Where the KV of a request's prompt is, for requests that fork it."""

    def __init__(self) -> None:
        self.worker_id = ""
        """The decode worker that has it; empty while there is none."""
        self.settled = asyncio.Event()
        """Set when the KV is at `worker_id`, or when no worker will have it."""

    def computed_at(self, worker_id: str) -> None:
        """Lets requests that share the prompt go to this decode worker."""
        self.worker_id = worker_id
        self.settled.set()


class LiveRequest:
    """One accepted request and everything that changes while it runs."""

    def __init__(self, asked: AcceptedRequest, clock: Clock) -> None:
        self.asked = asked
        self.clock = clock
        self.task = asyncio.current_task()
        """Serves the caller's RPC; cancelled when a drain's grace is over."""
        self.state = RequestState(self.request_id, clock.now())
        self.output = RequestOutput(asked.job)
        self.timeline = RequestTimeline(clock)
        self.prompt_kv = PromptKv()
        self.block_hashes = BlockHashes()
        self.placement: PlacementTaken | None = None
        self.trace_id = ""

    @property
    def request_id(self) -> str:
        """The caller's id of the request."""
        return self.asked.job.request_id

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and of the output so far."""
        return len(self.asked.prompt_ids) + len(self.output.ids)

    def is_late(self, slack_s: float = 0.0) -> bool:
        """True once the deadline has passed, or is less than `slack_s` away."""
        return self.clock.now() >= self.asked.deadline_s - slack_s

    @property
    def is_complete(self) -> bool:
        """True if the output has max_tokens tokens, with or without a finish reason."""
        limit = self.asked.sampling.max_tokens
        return limit is not None and len(self.output.ids) >= limit

    def remaining_s(self) -> float:
        """Time left.

        Raises:
            DeadlineExceeded: no time is left.
        """
        left_s = self.asked.deadline_s - self.clock.now()
        if left_s <= 0:
            raise self.late()
        return left_s

    def late(self) -> DeadlineExceeded:
        """The error of a request whose time is over."""
        return DeadlineExceeded(
            f"the request did not finish within {self.asked.timeout_s:.1f} s; it had produced"
            f" {len(self.output.ids)} tokens"
        )

    def order(self, placement: Placement, *, fork_of: str = "") -> AttemptOrder:
        """What the present attempt asks of its workers.

        `fork_of` is the id towards workers of a request whose KV of the same prompt is shared.
        """
        return AttemptOrder(
            request_id=self.asked.worker_request_id,
            attempt=self.state.attempt,
            token_ids=(*self.asked.prompt_ids, *self.output.ids),
            num_output_tokens=len(self.output.ids),
            sampling=self.asked.sampling,
            fingerprint=placement.decode.status.fingerprint,
            priority=self.asked.job.priority,
            cache_salt=self.asked.job.cache_salt,
            fork_of=fork_of,
        )


@dataclass(frozen=True, slots=True)
class _Remembered:
    """A record, with the fields that callers do not see."""

    record: RequestRecord
    cache_salt: str
    """Begins with the tenant whose request it is."""
    arrived_at_s: float
    """On the scheduler's clock."""


class RecentRequests:
    """Records of requests that run, and of the last `limit` that ended; never their texts."""

    def __init__(self, limit: int, clock: Clock) -> None:
        self._limit = limit
        self._clock = clock
        self._running: OrderedDict[RequestKey, LiveRequest] = OrderedDict()
        self._ended: OrderedDict[RequestKey, _Remembered] = OrderedDict()

    def started(self, live: LiveRequest) -> None:
        """A request was accepted."""
        self._running[live.asked.key] = live

    def ended(self, live: LiveRequest, outcome: str) -> None:
        """It ended: nothing of it is kept but its record."""
        self._running.pop(live.asked.key, None)
        if not self._limit:
            return
        self._ended.pop(live.asked.key, None)  # an id may be used again
        self._ended[live.asked.key] = self._entry(live, outcome)
        if len(self._ended) > self._limit:
            self._ended.popitem(last=False)

    def latest(self, limit: int = 0, mark: str = "") -> list[RequestRecord]:
        """The requests, the one that arrived last first; at most `limit`, 0 for all.

        Only those whose salts begin with `mark`, and without their tracks.
        """
        running = (
            live
            for live in reversed(self._running.values())
            if live.asked.job.cache_salt.startswith(mark)
        )
        found = [self._entry(live, "") for live in islice(running, MAX_RUNNING)]
        found += [entry for entry in self._ended.values() if entry.cache_salt.startswith(mark)]
        found.sort(key=lambda entry: entry.arrived_at_s, reverse=True)
        chosen = found[:limit] if limit else found
        return [replace(self._aged(entry), tracks=()) for entry in chosen]

    def get(self, request_id: str, mark: str = "") -> RequestRecord:
        """One of them.

        Raises:
            RequestNotFound: it is not remembered, or its salt does not begin with `mark`.
        """
        running = [live for key, live in self._running.items() if key[1] == request_id]
        found = [self._entry(live, "") for live in reversed(running)]
        found += [entry for key, entry in reversed(self._ended.items()) if key[1] == request_id]
        for entry in found:
            if entry.cache_salt.startswith(mark):
                return self._aged(entry)
        raise RequestNotFound(
            f"request {request_id!r} is not among the last {self._limit} that ended here"
        )

    def _aged(self, entry: _Remembered) -> RequestRecord:
        return replace(entry.record, age_s=self._clock.now() - entry.arrived_at_s)

    def _entry(self, live: LiveRequest, outcome: str) -> _Remembered:
        asked, output, stages = live.asked, live.output, live.timeline.stages
        record = RequestRecord(
            request_id=live.request_id,
            trace_id=live.trace_id,
            model=asked.model,
            state=live.state.status.value,
            outcome=outcome,
            age_s=0.0,
            elapsed_s=live.timeline.now_s(),
            ttft_s=stages.ttft_s,
            prompt_tokens=len(asked.prompt_ids),
            output_tokens=len(output.ids),
            draft_tokens=output.draft_tokens,
            accepted_tokens=output.accepted_tokens,
            placement=live.placement,
            stages=tuple(stages.stages),
            tracks=live.timeline.tracks,
        )
        return _Remembered(record, asked.job.cache_salt, stages.arrived_at_s)
