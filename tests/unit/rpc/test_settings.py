"""Settings: where values come from, and what a person is told about them."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field, ValidationError

from baton.rpc.settings import ServiceSettings, load_settings, parse_cores, parse_peers


class DemoSettings(ServiceSettings):
    """A service's settings."""

    role: ClassVar[str] = "demo"

    size_blocks: int = Field(default=8, ge=1)
    """Blocks to keep, up to 100 %."""
    speculation: bool = False
    """Use the draft model."""


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [key for key in os.environ if key.startswith("BATON_")]:
        monkeypatch.delenv(name)


def test_flag_wins_over_own_variable_over_shared_one_over_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert load_settings(DemoSettings, []).port == 0
    monkeypatch.setenv("BATON_PORT", "1")
    assert load_settings(DemoSettings, []).port == 1
    monkeypatch.setenv("BATON_DEMO_PORT", "2")
    assert load_settings(DemoSettings, []).port == 2
    assert load_settings(DemoSettings, ["--port", "3"]).port == 3
    monkeypatch.setenv("BATON_OTHER_PORT", "4")
    assert load_settings(DemoSettings, []).port == 2


def test_booleans_have_two_flags() -> None:
    assert load_settings(DemoSettings, ["--speculation"]).speculation
    assert not load_settings(DemoSettings, ["--no-speculation"]).speculation


def test_empty_text_is_none_where_none_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_TRACE_DIR", "")
    monkeypatch.setenv("BATON_NATS_URL", "")
    settings = load_settings(DemoSettings, [])
    assert settings.trace_dir is None
    assert not settings.nats_url
    assert load_settings(DemoSettings, ["--trace-dir", "/x"]).trace_dir == Path("/x")


def test_help_shows_flag_variables_default_and_meaning_of_every_setting(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        load_settings(DemoSettings, ["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name, field in DemoSettings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        assert f"env: BATON_DEMO_{name.upper()}, BATON_{name.upper()}; default: " in text
        assert field.description, f"{name} has no docstring"
        assert " ".join(field.description.split()) in text
    assert "default: 8" in text
    assert "up to 100 %" in text


def test_help_names_the_settings_without_a_default(capsys: pytest.CaptureFixture[str]) -> None:
    class NeedySettings(DemoSettings):
        """Settings that have no default."""

        folder: str

    with pytest.raises(SystemExit):
        load_settings(NeedySettings, ["--help"])
    text = capsys.readouterr().out
    assert "BATON_FOLDER; required" in text
    assert "Undefined" not in text


def test_print_config_shows_values_and_where_they_came_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BATON_HOST", "0.0.0.0")
    monkeypatch.setenv("BATON_DEMO_SIZE_BLOCKS", "4")
    monkeypatch.setenv("BATON_NATS_URL", "nats://joe:hunter2@broker:4222")
    with pytest.raises(SystemExit) as caught:
        load_settings(DemoSettings, ["--print-config", "--port", "7"])
    assert caught.value.code == 0
    output = capsys.readouterr().out
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in output.splitlines()}
    assert rows["host"] == ["0.0.0.0", "env BATON_HOST"]
    assert rows["size_blocks"] == ["4", "env BATON_DEMO_SIZE_BLOCKS"]
    assert rows["port"] == ["7", "flag --port"]
    assert rows["lease_s"] == ["3.0", "default"]
    assert set(rows) == set(DemoSettings.model_fields)
    assert "hunter2" not in output


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--port", "99999"], "port (flag --port)"),
        (["--port", "x"], "port (flag --port)"),
        (["--size-blocks", "0"], "size_blocks (flag --size-blocks)"),
        (["--cores", "a"], "cores (flag --cores)"),
        (["--static-peers", "decode:1"], "static_peers (flag --static-peers)"),
        (["--worker-id", "a.b"], "worker_id (flag --worker-id)"),
        (["--nats-url", "http://x"], "nats_url (flag --nats-url)"),
        (["--tls-cert", "cert.pem"], "tls_cert and tls_key"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_bad_values_are_explained(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        load_settings(DemoSettings, argv)
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err


def test_a_bad_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BATON_DEMO_PORT", "tcp://10.0.0.1:80")
    with pytest.raises(SystemExit):
        load_settings(DemoSettings, [])
    assert "port (env BATON_DEMO_PORT)" in capsys.readouterr().err


class NeedySettings(ServiceSettings):
    """A service with a setting that nobody can guess."""

    role: ClassVar[str] = "needy"

    model_path: Path
    """Folder of the model."""


def test_a_missing_value_says_how_to_give_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_settings(NeedySettings, [])
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert "--model-path" in told
    assert "BATON_NEEDY_MODEL_PATH" in told


def test_settings_are_frozen_and_closed() -> None:
    settings = DemoSettings()
    with pytest.raises(ValidationError):
        settings.port = 1  # type: ignore[misc]
    with pytest.raises(ValidationError):
        DemoSettings(no_such=1)  # type: ignore[call-arg]


def test_peers_and_cores_parse() -> None:
    assert parse_peers("decode=h1:1, prefill=h2:2,") == [("decode", "h1:1"), ("prefill", "h2:2")]
    assert parse_peers("") == []
    assert parse_cores("0-2,5") == (0, 1, 2, 5)
    assert parse_cores("") == ()
