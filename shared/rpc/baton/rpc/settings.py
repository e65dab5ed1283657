"""Settings of a service.

A value comes from a flag, or else from `BATON_<ROLE>_<FIELD>`, `BATON_<FIELD>`, or the default.
A service subclasses `ServiceSettings`, sets `role`, and adds fields, each with a docstring beside
it: that is its help text. Fields are plain values (str, int, float, bool, Path, Literal).
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from baton.wire.announcement import MAX_LEASE_S
from baton.wire.channel import TlsFiles

S = TypeVar("S", bound="ServiceSettings")
_WORKER_ID = re.compile(r"[A-Za-z0-9_-]{0,64}")
_NATS_URL = re.compile(r"(nats|tls|ws|wss)://\S+")
_CREDENTIALS = re.compile(r"//[^/@]*@")
_PEER = re.compile(r"([a-z]+)=(.+:\d+)")


class ServiceSettings(BaseSettings):
    """The settings of every service."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=()
    )
    role: ClassVar[str] = ""
    watches: ClassVar[frozenset[str] | None] = None
    """Roles whose members the service wants to know; None means all."""

    host: str = "127.0.0.1"
    """Interface that gRPC and metrics listen on."""
    port: int = Field(default=0, ge=0, le=65535)
    """Port of gRPC; 0 takes a free one."""
    metrics_port: int = Field(default=0, ge=0, le=65535)
    """Port of the Prometheus endpoint; 0 takes a free one."""
    health_port: int = Field(default=0, ge=0, le=65535)
    """Port that serves grpc.health.v1 alone, in plain text: for probes where TLS is on, since those
    of Kubernetes do not speak it; 0 for none."""
    advertise_host: str = ""
    """Host name or address that others reach this process at; empty takes `host`, or this host's
    own address where `host` means all interfaces."""
    nats_url: str = "nats://127.0.0.1:4222"
    """NATS server for membership and events; empty for none."""
    static_peers: str = ""
    """Services known beforehand, such as "decode=h1:7005,prefill=h2:7004"; they are asked for their
    status, so this works without NATS."""
    worker_id: str = ""
    """Id of this process, unique per boot; empty makes one."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe log lines to write."""
    trace_dir: Path | None = None
    """Folder for traces as JSON lines, one file per process; empty for none."""
    otlp_endpoint: str = ""
    """OTLP/gRPC collector for traces, such as "http://localhost:4317"; empty for none."""
    drain_grace_s: float = Field(default=30.0, ge=0.0, le=3600.0)
    """After SIGTERM, running work may take this long to end."""
    lease_s: float = Field(default=3.0, gt=0.0, le=MAX_LEASE_S)
    """Others start to doubt this process when it has not announced itself for so long."""
    announce_interval_s: float = Field(default=1.0, gt=0.0, le=60.0)
    """Time between announcements of state and load."""
    max_message_bytes: int = Field(default=4 * 1024 * 1024, ge=64 * 1024, le=1024 * 1024 * 1024)
    """Largest gRPC message accepted."""
    max_concurrent_rpcs: int = Field(default=4096, ge=1, le=1_000_000)
    """Calls served at once, those that wait for admission included; more are refused."""
    cores: str = ""
    """CPU cores that the process may use, such as "0,1"; empty for all."""
    tls_cert: str = ""
    """PEM file with this service's certificate; empty for plain text."""
    tls_key: str = ""
    """PEM file with its key."""
    tls_ca: str = ""
    """PEM file with the authority that peers' certificates must come from (mutual TLS)."""

    @field_validator("*", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any, info: Any) -> Any:
        field = cls.model_fields.get(info.field_name)
        return None if value == "" and field is not None and field.default is None else value

    @field_validator("worker_id")
    @classmethod
    def _check_worker_id(cls, value: str) -> str:
        if not _WORKER_ID.fullmatch(value):
            raise ValueError("must be at most 64 letters, digits, '_' or '-'")
        return value

    @field_validator("static_peers")
    @classmethod
    def _check_static_peers(cls, value: str) -> str:
        parse_peers(value)
        return value

    @field_validator("cores")
    @classmethod
    def _check_cores(cls, value: str) -> str:
        parse_cores(value)
        return value

    @field_validator("nats_url")
    @classmethod
    def _check_nats_url(cls, value: str) -> str:
        if not all(_NATS_URL.fullmatch(part.strip()) for part in value.split(",") if value):
            raise ValueError("must look like 'nats://host:port' (or tls://, ws://, wss://)")
        return value

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("tls_cert and tls_key must be given together")
        return self

    @property
    def tls(self) -> TlsFiles:
        """Certificates as given."""
        return TlsFiles(cert=self.tls_cert, key=self.tls_key, ca=self.tls_ca)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Highest first: given values, the role's variables, everybody's variables."""
        own = EnvSettingsSource(settings_cls, env_prefix=f"BATON_{cls.role.upper()}_")
        shared = EnvSettingsSource(settings_cls, env_prefix="BATON_")
        return (init_settings, own, shared) if cls.role else (init_settings, shared)


def parse_peers(text: str) -> list[tuple[str, str]]:
    """(role, address) pairs of "decode=h:p,prefill=h:p".

    Raises:
        ValueError: not of that form.
    """
    peers = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _PEER.fullmatch(part)
        if match is None:
            raise ValueError(f"must look like 'decode=host:port,prefill=host:port', got {part!r}")
        peers.append((match[1], match[2]))
    return peers


def parse_cores(text: str) -> tuple[int, ...]:
    """Core numbers of "0,1" or "0-3,6".

    Raises:
        ValueError: not of that form.
    """
    cores: list[int] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
        if match is None:
            raise ValueError(f"must look like '0,1' or '0-3', got {part!r}")
        cores.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(set(cores)))


def load_settings(cls: type[S], argv: Sequence[str]) -> S:
    """Settings from flags (`argv` without the program's name) and environment.

    `--help` and `--print-config` write their text and exit with status 0; a value that cannot work
    is explained on stderr, exit status 2.
    """
    parser = _parser(cls)
    flags = vars(parser.parse_args(argv))
    is_print = flags.pop("print_config")
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        settings = cls(**given)
    except ValidationError as error:
        lines = [_explain(cls, given, item) for item in error.errors(include_url=False)]
        parser.exit(2, "".join(f"{parser.prog}: {line}\n" for line in lines))
    if is_print:
        sys.stdout.write(describe(settings, given))
        parser.exit(0)
    return settings


def describe(settings: ServiceSettings, flags: dict[str, Any]) -> str:
    """One line per setting: its value and where that came from."""
    cls = type(settings)
    rows = [
        (name, _shown(getattr(settings, name)), _origin(cls, flags, name))
        for name in cls.model_fields
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "".join(
        f"{name:<{widths[0]}}  {value:<{widths[1]}}  {origin}\n" for name, value, origin in rows
    )


def _shown(value: object) -> str:
    return _CREDENTIALS.sub("//***@", str(value))


def _variables(cls: type[ServiceSettings], name: str) -> list[str]:
    own = [f"BATON_{cls.role.upper()}_{name.upper()}"] if cls.role else []
    return [*own, f"BATON_{name.upper()}"]


def _origin(cls: type[ServiceSettings], flags: dict[str, Any], name: str) -> str:
    if name in flags:
        return f"flag --{name.replace('_', '-')}"
    present = {key.upper() for key in os.environ}
    return next((f"env {key}" for key in _variables(cls, name) if key in present), "default")


def _explain(cls: type[ServiceSettings], flags: dict[str, Any], item: Any) -> str:
    name = str(item["loc"][0]) if item["loc"] else ""
    if name not in cls.model_fields:
        return str(item["msg"])
    if item["type"] == "missing":
        flag, variable = name.replace("_", "-"), f"BATON_{cls.role}_{name}".upper()
        return f"{name} is missing: give --{flag} or set {variable}"
    return f"{name} ({_origin(cls, flags, name)}): {item['msg']}, got {_shown(item['input'])!r}"


def _parser(cls: type[ServiceSettings]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m baton.{cls.role}",
        description=f"Runs Baton's {cls.role} service. A flag wins over an environment variable, "
        "and that over the default.",
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="write every setting's value and where it came from, then exit",
    )
    for name, field in cls.model_fields.items():
        default = "none" if field.default in {None, ""} else field.default
        ending = "required" if field.is_required() else f"default: {default}"
        meaning = " ".join((field.description or "").replace("%", "%%").split())
        is_bool = field.annotation is bool
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            default=None,
            help=f"{meaning}\nenv: {', '.join(_variables(cls, name))}; {ending}",
            **({"action": argparse.BooleanOptionalAction} if is_bool else {"metavar": "VALUE"}),
        )
    return parser
