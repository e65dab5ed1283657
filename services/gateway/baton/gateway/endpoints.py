"""What the gateway knows of an endpoint: its row in the one table of routes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum, auto

from pydantic import BaseModel
from starlette.types import ASGIApp


class Access(Enum):
    """Who may call an endpoint."""

    OPEN = auto()
    """Everyone."""
    KEY = auto()
    """Holders of an API key, where keys are configured; the call does not count in its rate."""
    RATE_LIMITED = auto()
    """Holders of an API key, within the rate of its tenant."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One path and method; routing, access, OpenAPI document, spans and metrics derive from it."""

    method: str
    path: str
    handler: Callable[..., Awaitable[ASGIApp]]
    """Takes the request, and its body where there is a model of it. Its docstring is the summary
    in the OpenAPI document."""
    access: Access
    body: type[BaseModel] | None = None
    """Validates the body of a POST request."""
