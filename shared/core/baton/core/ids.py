"""Ids: made from randomness that the caller passes in, and checked where they come from outside."""

from __future__ import annotations

import re
from random import Random

from baton.core.errors import InvalidRequest

MAX_REQUEST_ID_CHARS = 128
_VISIBLE_ASCII = re.compile(r"[!-~]+")


def make_id(prefix: str, rng: Random) -> str:
    """`prefix` and 16 hex digits, such as ``req-5f0c…``."""
    return f"{prefix}-{rng.getrandbits(64):016x}"


def check_request_id(request_id: str) -> str:
    """Returns a caller's request id unchanged.

    Raises:
        InvalidRequest: it is too long or holds anything but visible ASCII.
    """
    if len(request_id) > MAX_REQUEST_ID_CHARS or not _VISIBLE_ASCII.fullmatch(request_id):
        raise InvalidRequest(
            f"request_id must be 1 to {MAX_REQUEST_ID_CHARS} visible ASCII characters"
        )
    return request_id
