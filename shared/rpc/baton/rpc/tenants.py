"""Who may call: API keys, the tenants that they belong to, and how often each may come."""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from baton.core.errors import QueueFull, Unauthenticated
from baton.core.rate_limit import TokenBucket

NAME_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"
MIN_KEY_CHARS = 8
_NAME = re.compile(NAME_PATTERN)
_SCHEME = "bearer "


class RateLimited(QueueFull):
    """A tenant has sent too many requests; `retry_after_s` says when to come back."""


class TenantEntry(BaseModel):
    """A tenant in the file of tenants."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=NAME_PATTERN)
    keys: list[str] = Field(min_length=1)
    requests_per_s: float | None = Field(default=None, ge=0.0)
    """0 sets no limit; None takes the default."""
    burst: int | None = Field(default=None, ge=1)


class TenantFile(BaseModel):
    """The file of tenants."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tenants: list[TenantEntry]


class Tenants:
    """Tells whose a request is, and whether it may come now. Without tenants, all may.

    Keys are kept as digests only, and all are compared in constant time.
    """

    def __init__(self, entries: list[TenantEntry], requests_per_s: float, burst: int) -> None:
        """`requests_per_s` (0: no limit) and `burst` are for tenants without their own.

        Raises:
            ValueError: a key or a name is there twice, or a key is too short.
        """
        self._owners: dict[bytes, str] = {}
        self._buckets: dict[str, TokenBucket] = {}
        names = [entry.name for entry in entries]
        if len(set(names)) < len(names):
            raise ValueError("a tenant is listed twice")
        for entry in entries:
            for key in entry.keys:
                self._add_key(key, entry.name)
            rate = requests_per_s if entry.requests_per_s is None else entry.requests_per_s
            if rate:
                self._buckets[entry.name] = TokenBucket(rate, entry.burst or burst)

    def _add_key(self, key: str, tenant: str) -> None:
        digest = _digest(key)
        if len(key) < MIN_KEY_CHARS or digest in self._owners:
            raise ValueError(
                f"a key of the tenant {tenant!r} has fewer than {MIN_KEY_CHARS} characters "
                "or is listed twice"
            )
        self._owners[digest] = tenant

    def admit(self, authorization: str, now: float) -> str:
        """The tenant of a request with this header, which counts from now on; "" without tenants.

        Raises:
            Unauthenticated: the key is missing or not known.
            RateLimited: the tenant has sent too many requests.
        """
        tenant = self.identify(authorization)
        self.count(tenant, now)
        return tenant

    def count(self, tenant: str, now: float) -> None:
        """Counts one request of a tenant.

        Raises:
            RateLimited: the tenant has sent too many requests.
        """
        bucket = self._buckets.get(tenant)
        delay_s = bucket.take(now) if bucket is not None else 0.0
        if delay_s:
            text = f"the rate limit of the tenant {tenant!r} is reached"
            raise RateLimited(text, retry_after_s=delay_s)

    def identify(self, authorization: str) -> str:
        """The tenant whose key the header holds; "" without tenants. Counts nothing.

        Raises:
            Unauthenticated: the key is missing or not known.
        """
        if not self._owners:
            return ""
        if authorization[: len(_SCHEME)].lower() != _SCHEME:
            raise Unauthenticated("send an API key: 'Authorization: Bearer KEY'")
        given = _digest(authorization[len(_SCHEME) :].strip())
        found = ""
        for digest, tenant in self._owners.items():
            if hmac.compare_digest(digest, given):
                found = tenant  # no early end: the time tells nothing
        if not found:
            raise Unauthenticated("the API key is not known here")
        return found


def read_entries(api_keys: str, file: Path | None) -> list[TenantEntry]:
    """Tenants of a setting such as "key1=acme,key2=globex", and of a file.

    Raises:
        ValueError: one is not of its form; the message holds no key.
    """
    keys: dict[str, list[str]] = {}
    for part in filter(None, (part.strip() for part in api_keys.split(","))):
        key, _, name = part.rpartition("=")
        if not key or not _NAME.fullmatch(name):
            raise ValueError("api_keys must look like 'KEY=tenant,KEY=tenant'")
        keys.setdefault(name, []).append(key)
    listed = _read_file(file) if file is not None else []
    return [TenantEntry(name=name, keys=own) for name, own in keys.items()] + listed


def _read_file(file: Path) -> list[TenantEntry]:
    try:
        return TenantFile.model_validate_json(file.read_bytes()).tenants
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from error
    except ValidationError as error:
        first: Mapping[str, object] = dict(error.errors(include_input=False)[0])
        raise ValueError(f"{file}: {first['loc']}: {first['msg']}") from None


def _digest(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogatepass")).digest()
