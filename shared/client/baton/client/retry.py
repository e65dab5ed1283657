"""When to try a refused call again: a bound per call, a budget per client, jitter, retry-after."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from random import Random

from baton.core.errors import BatonError
from baton.wire.errors import RETRYABLE


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Bounds on trying again after a refusal; `max_attempts=1` never does."""

    max_attempts: int = 4
    initial_backoff_s: float = 0.1
    max_backoff_s: float = 5.0
    budget: float = 10.0
    """Retries that may be spent at once; every success earns a tenth of one back."""


class Retrier:
    """Decides for one client, over all its calls. Thread-safe.

    The budget keeps a client from multiplying the load of a server that refuses everything
    (Source: gRFC A6, retry throttling).
    """

    def __init__(self, policy: RetryPolicy, rng: Random) -> None:
        self._policy = policy
        self._rng = rng
        self._budget = policy.budget
        self._lock = threading.Lock()

    @property
    def may_retry(self) -> bool:
        """False when no call is ever tried again."""
        return self._policy.max_attempts > 1

    def delay_s(self, error: BatonError, attempt: int, remaining_s: float) -> float | None:
        """Time to wait before the next attempt, or None when the error is final.

        Args:
            error: what the attempt failed with.
            attempt: number of attempts made, from 1.
            remaining_s: time left to the call's deadline.
        """
        if error.reason not in RETRYABLE or attempt >= self._policy.max_attempts:
            return None
        with self._lock:
            ceiling = min(
                self._policy.max_backoff_s, self._policy.initial_backoff_s * 2 ** (attempt - 1)
            )
            delay = (error.retry_after_s or 0.0) + self._rng.uniform(0.0, ceiling)
            if delay >= remaining_s or self._budget < 1.0:
                return None
            self._budget -= 1.0
        return delay

    def succeeded(self) -> None:
        """A call got its first message."""
        with self._lock:
            self._budget = min(self._policy.budget, self._budget + 0.1)
