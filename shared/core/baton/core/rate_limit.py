"""How often something may happen."""

from __future__ import annotations


class TokenBucket:
    """Lets `rate_per_s` through on average, and at most `burst` at once. Not thread-safe.

    Raises:
        ValueError: the rate or the burst is too small to let anything through.
    """

    def __init__(self, rate_per_s: float, burst: int) -> None:
        if not rate_per_s > 0.0 or burst < 1:
            raise ValueError("a rate must be positive and a burst at least 1")
        self._rate_per_s = rate_per_s
        self._burst = burst
        self._tokens = float(burst)
        self._at_s: float | None = None

    def take(self, now: float) -> float:
        """Takes one token and returns 0, or takes none and returns the seconds until there is one.

        `now` is monotonic; a time before an earlier one counts as that.
        """
        if self._at_s is not None:
            passed_s = max(0.0, now - self._at_s)
            self._tokens = min(float(self._burst), self._tokens + passed_s * self._rate_per_s)
        self._at_s = now if self._at_s is None else max(now, self._at_s)
        if self._tokens < 1.0:
            return (1.0 - self._tokens) / self._rate_per_s
        self._tokens -= 1.0
        return 0.0
