"""The contract's rules, the freshness of its stubs, and the enums that the core mirrors."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from baton.core.errors import BatonError, ErrorReason
from baton.core.sampling import DraftSource, FinishReason
from baton.v1 import common_pb2
from tests.support.repository import ROOT

PROTOS = ROOT / "protos"
SNAKE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
PASCAL = re.compile(r"([A-Z][a-z0-9]*)+")
SCREAMING = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*")
File = descriptor_pb2.FileDescriptorProto
Message = descriptor_pb2.DescriptorProto

# Numbers of fields in descriptor.proto, of which the paths of source locations are made.
FILE_MESSAGE, FILE_ENUM, FILE_SERVICE = 4, 5, 6
MESSAGE_FIELD, MESSAGE_NESTED, MESSAGE_ENUM, MESSAGE_ONEOF = 2, 3, 4, 8
ENUM_VALUE, SERVICE_METHOD = 2, 2


def _describe(files: list[str], include: list[Path], out: Path) -> list[File]:
    # In a process of its own: protoc and NIXL, which other tests load, cannot be in one.
    command = [
        *(sys.executable, "-m", "grpc_tools.protoc"),
        *(f"--proto_path={folder}" for folder in include),
        f"--descriptor_set_out={out}",
        "--include_source_info",
    ]
    subprocess.run([*command, *files], check=True, timeout=50)
    return list(descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file)


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> list[File]:
    names = sorted(str(path.relative_to(PROTOS)) for path in (PROTOS / "baton").rglob("*.proto"))
    assert names
    return _describe(names, [PROTOS], tmp_path_factory.mktemp("protos") / "all.binpb")


def _enum_problems(enum: descriptor_pb2.EnumDescriptorProto) -> Iterator[str]:
    prefix = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", enum.name).upper() + "_"
    if not PASCAL.fullmatch(enum.name):
        yield f"enum {enum.name} is not PascalCase"
    if enum.value[0].number != 0 or enum.value[0].name != f"{prefix}UNSPECIFIED":
        yield f"enum {enum.name} must begin with {prefix}UNSPECIFIED = 0"
    for value in enum.value:
        if not value.name.startswith(prefix) or not SCREAMING.fullmatch(value.name):
            yield f"enum value {value.name} must be UPPER_SNAKE and begin with {prefix}"


def _message_problems(message: Message) -> Iterator[str]:
    if not PASCAL.fullmatch(message.name):
        yield f"message {message.name} is not PascalCase"
    for name in [*(f.name for f in message.field), *(o.name for o in message.oneof_decl)]:
        if not SNAKE.fullmatch(name.removeprefix("_")):
            yield f"field {message.name}.{name} is not lower_snake_case"
    for nested in message.nested_type:
        if not nested.options.map_entry:
            yield from _message_problems(nested)
    for enum in message.enum_type:
        yield from _enum_problems(enum)


def style_problems(file: File) -> Iterator[str]:
    """Breaches of buf's STANDARD rules that a single file can show."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)*\.v[1-9][0-9]*", file.package):
        yield f"package {file.package!r} has no version"
    if str(Path(file.name).parent) != file.package.replace(".", "/"):
        yield f"{file.name} is not in the folder of its package {file.package}"
    if not SNAKE.fullmatch(Path(file.name).stem):
        yield f"{file.name} is not lower_snake_case.proto"
    if len(file.service) > 1:
        yield f"{file.name} has more than one service"
    for service in file.service:
        if not service.name.endswith("Service"):
            yield f"service {service.name} must end in Service"
    for message in file.message_type:
        yield from _message_problems(message)
    for enum in file.enum_type:
        yield from _enum_problems(enum)


def rpc_problems(files: list[File]) -> Iterator[str]:
    """RPC names and their request and response messages: matching, and used only once."""
    used: dict[str, str] = {}
    for file in files:
        for service in file.service:
            for method in service.method:
                if not PASCAL.fullmatch(method.name):
                    yield f"rpc {method.name} is not PascalCase"
                for kind, full_name in (
                    ("Request", method.input_type),
                    ("Response", method.output_type),
                ):
                    if full_name != f".{file.package}.{method.name}{kind}":
                        yield f"{service.name}.{method.name}: {full_name} for a {kind}"
                    where = f"{service.name}.{method.name}"
                    if used.setdefault(full_name, where) != where:
                        yield f"{full_name} serves {where} and {used[full_name]}"


def _enum_paths(
    enum: descriptor_pb2.EnumDescriptorProto, path: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], str]]:
    yield path, enum.name
    for index, value in enumerate(enum.value):
        yield (*path, ENUM_VALUE, index), value.name


def _message_paths(
    message: Message, path: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], str]]:
    yield path, message.name
    for index, field in enumerate(message.field):
        yield (*path, MESSAGE_FIELD, index), f"{message.name}.{field.name}"
    # protoc makes a oneof of its own for every `optional` field.
    optional = {field.oneof_index for field in message.field if field.proto3_optional}
    for index, oneof in enumerate(message.oneof_decl):
        if index not in optional:
            yield (*path, MESSAGE_ONEOF, index), f"{message.name}.{oneof.name}"
    for index, nested in enumerate(message.nested_type):
        if not nested.options.map_entry:
            yield from _message_paths(nested, (*path, MESSAGE_NESTED, index))
    for index, enum in enumerate(message.enum_type):
        yield from _enum_paths(enum, (*path, MESSAGE_ENUM, index))


def _paths(file: File) -> Iterator[tuple[tuple[int, ...], str]]:
    for index, message in enumerate(file.message_type):
        yield from _message_paths(message, (FILE_MESSAGE, index))
    for index, enum in enumerate(file.enum_type):
        yield from _enum_paths(enum, (FILE_ENUM, index))
    for index, service in enumerate(file.service):
        yield (FILE_SERVICE, index), service.name
        for number, method in enumerate(service.method):
            yield (FILE_SERVICE, index, SERVICE_METHOD, number), f"{service.name}.{method.name}"


def uncommented(file: File) -> list[str]:
    """Elements without a comment right above them."""
    commented = {
        tuple(location.path)
        for location in file.source_code_info.location
        if location.leading_comments.strip()
    }
    return [name for path, name in _paths(file) if path not in commented]


def test_contract_keeps_the_style_rules(described: list[File]) -> None:
    # The names of the Open Inference Protocol are not ours to choose.
    described = [file for file in described if file.package != "inference"]
    assert [problem for file in described for problem in style_problems(file)] == []
    assert list(rpc_problems(described)) == []


def test_every_element_has_a_comment(described: list[File]) -> None:
    assert {file.name: names for file in described if (names := uncommented(file))} == {}


def test_each_service_has_its_own_file(described: list[File]) -> None:
    services = sorted(service.name for file in described for service in file.service)
    assert services == [
        "CacheService",
        "ControlService",
        "DecodeService",
        "GRPCInferenceService",
        "InferenceService",
        "KvTransferService",
        "PrefillService",
        "TokenizerService",
    ]


def test_the_rules_find_what_they_forbid(tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "Bad.proto").write_text(
        'syntax = "proto3"; package worse;\n'
        "service Thing { rpc do_it(Empty) returns (Empty); }\n"
        "service OtherService {}\n"
        "message Empty { string camelCase = 1; }\n"
        "enum Colour { RED = 0; }\n",
        encoding="utf-8",
    )
    (file,) = _describe(["bad/Bad.proto"], [tmp_path], tmp_path / "bad.binpb")
    found = " ".join([*style_problems(file), *rpc_problems([file])])
    for expected in (
        "has no version",
        "not in the folder",
        "not lower_snake_case.proto",
        "more than one service",
        "Thing must end in Service",
        "rpc do_it is not PascalCase",
        ".worse.Empty for a Request",
        "Empty.camelCase",
        "COLOUR_UNSPECIFIED",
    ):
        assert expected in found
    assert set(uncommented(file)) >= {"Thing", "Empty", "Empty.camelCase", "Colour", "RED"}


def test_stubs_are_fresh(tmp_path: Path) -> None:
    subprocess.run([sys.executable, PROTOS / "gen.py", "--out", tmp_path], check=True, timeout=50)
    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.py*")}
    committed = {path.relative_to(PROTOS) for path in (PROTOS / "baton").rglob("*_pb2*.py*")}
    committed = {path for path in committed if "__pycache__" not in path.parts}
    assert made == committed
    stale = [
        str(path)
        for path in sorted(made)
        if (tmp_path / path).read_bytes() != (PROTOS / path).read_bytes()
    ]
    assert stale == [], "run `make protos`"


@pytest.mark.parametrize(
    ("mirror", "message"),
    [
        (ErrorReason, common_pb2.ErrorReason),
        (FinishReason, common_pb2.FinishReason),
        (DraftSource, common_pb2.DraftSource),
    ],
)
def test_core_enums_mirror_the_contract(mirror: type, message: object) -> None:
    prefixes = {ErrorReason: "ERROR_REASON_", FinishReason: "FINISH_REASON_"}
    prefix = prefixes.get(mirror, "DRAFT_SOURCE_")
    wire = {
        name.removeprefix(prefix): number
        for name, number in message.items()  # type: ignore[attr-defined]
        if number != 0
    }
    assert {member.name: member.value for member in mirror} == wire


def test_every_reason_has_exactly_one_error_class() -> None:
    reasons = [cls.reason for cls in BatonError.__subclasses__()]
    assert len(reasons) == len(set(reasons))
    assert set(reasons) == set(ErrorReason)
