"""deploy/Dockerfile: hadolint's rules, and the promises that hadolint does not know."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.support.repository import ROOT, SERVICES, parts

SCRIPTS = Path(sys.executable).parent
FILE = ROOT / "deploy" / "Dockerfile"


def _text() -> str:
    return FILE.read_text(encoding="utf-8")


def test_hadolint_is_content() -> None:
    result = subprocess.run(
        [SCRIPTS / "hadolint", FILE], capture_output=True, text=True, timeout=30, check=False
    )
    assert result.returncode == 0, result.stdout


def test_older_builders_can_read_it() -> None:
    assert not re.match(r"#\s*syntax", _text())
    assert "<<" not in _text()
    assert "--mount" not in _text()


def test_runs_unprivileged_with_a_health_check_and_gets_signals() -> None:
    final = _text().rpartition("\nFROM ")[2]
    user = re.search(r"^USER (\d+)", final, flags=re.MULTILINE)
    assert user is not None
    assert int(user[1]) > 0
    assert re.search(r"^HEALTHCHECK .*healthcheck\.py", final, flags=re.MULTILINE)
    assert re.search(r'^ENTRYPOINT \["sh", "-c", "exec ', final, flags=re.MULTILINE)


def test_only_json_is_logged_and_no_installer_is_left_in_the_image() -> None:
    final = _text().rpartition("\nFROM ")[2]
    assert re.search(r"\bGRPC_VERBOSITY=NONE\b", final)
    assert re.search(r"\bHF_HUB_DISABLE_PROGRESS_BARS=1\b", final)
    assert "venv --without-pip" in _text()


def test_every_service_can_be_built_in() -> None:
    default = re.search(r'^ARG SERVICES="([^"]*)"', _text(), flags=re.MULTILINE)
    assert default is not None
    assert set(default[1].split()) == set(SERVICES)


def test_copies_only_what_is_in_the_repository_and_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    sources = re.findall(r"^COPY (?!--from)(\S+) ", _text(), flags=re.MULTILINE)
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source in kept, f"{source} is in .dockerignore"


def test_shared_parts_that_a_service_needs_are_installed_with_it() -> None:
    """A distribution of ours that is missing from the build would be looked for in an index."""
    always = set(re.findall(r"\./(?:shared/)?(\w+)", re.search(r'parts="(.*?)"', _text())[1]))  # type: ignore[index]
    extra = {
        "gateway": {"client"},
        "prefill": {"handoff", "engine", "worker"},
        "decode": {"handoff", "engine", "worker"},
    }
    for part in parts():
        if part.name not in SERVICES:
            continue
        requirements = part.project["project"]["dependencies"]  # type: ignore[index]
        ours = set(re.findall(r"baton-(\w+)==", " ".join(requirements)))
        assert ours <= always | extra.get(part.name, set()), part.name
    for service, shared in extra.items():
        for name in shared:
            assert re.search(rf"\b{service}\b.*shared/{name}", _text()), service
