"""A setting exists only if something reads it, and says what it is."""

from __future__ import annotations

import ast

import pytest

from baton.rpc.settings import ServiceSettings
from tests.support.repository import SERVICES, TORCH_SERVICES, parts
from tests.support.service_settings import settings_class

MAX_OWN_SETTINGS = 30


def _attributes_read(part_names: set[str]) -> set[str]:
    return {
        node.attr
        for part in parts()
        if part.name in part_names
        for path in part.modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


@pytest.mark.parametrize("service", SERVICES)
def test_every_setting_is_read(service: str) -> None:
    read = _attributes_read({service, "rpc", *(["worker"] if service in TORCH_SERVICES else [])})
    assert set(settings_class(service).model_fields) - read == set()


@pytest.mark.parametrize("service", SERVICES)
def test_settings_are_few_frozen_and_explained(service: str) -> None:
    cls = settings_class(service)
    assert cls.model_config["frozen"] is True
    assert cls.model_config["extra"] == "forbid"
    assert [name for name, field in cls.model_fields.items() if not field.description] == []
    assert len(set(cls.model_fields) - set(ServiceSettings.model_fields)) <= MAX_OWN_SETTINGS
