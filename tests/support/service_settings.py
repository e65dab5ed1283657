"""The settings class of each service, and the environment variables that it reads."""

from __future__ import annotations

import importlib

from baton.rpc.settings import ServiceSettings
from tests.support.repository import SERVICES


def settings_class(service: str) -> type[ServiceSettings]:
    """The one settings class of a service."""
    module = importlib.import_module(f"baton.{service}.settings")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, ServiceSettings)
        and value.__dict__.get("role") == service
    ]
    assert len(found) == 1, f"{service} has {len(found)} settings classes"
    return found[0]


def variables(service: str) -> set[str]:
    """Names of the environment variables that the service reads."""
    fields = [name.upper() for name in settings_class(service).model_fields]
    own = {f"BATON_{service.upper()}_{name}" for name in fields}
    return own | {f"BATON_{name}" for name in fields}


def all_fields() -> dict[str, set[str]]:
    """Field names by service."""
    return {service: set(settings_class(service).model_fields) for service in SERVICES}
