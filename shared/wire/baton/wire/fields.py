"""Values to messages and back, where their fields have the same names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache, partial
from types import MappingProxyType
from typing import Any, TypeVar, cast

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError, Message

from baton.core.errors import InvalidRequest
from baton.wire.timing import duration_from_pb, duration_to_pb

MessageT = TypeVar("MessageT", bound=Message)
ValueT = TypeVar("ValueT")
_Pair = tuple[str, str, Callable[[Any], Any]]
"""A field of what is made, the field that it is made of, and how."""


def as_message(kind: type[MessageT], value: Any, **given: Any) -> MessageT:
    """A message with the value's fields; `given` are the message's other fields.

    The value's `lease_s` fills the message's Duration `lease`. None leaves a field absent.

    Raises:
        TypeError: neither sets a field outside a oneof: a mistake in the code.
    """
    source = cast("Any", type(value))
    for name, attribute, convert in _written(kind.DESCRIPTOR, source, tuple(given)):
        found = getattr(value, attribute)
        if found is not None:
            given[name] = convert(found)
    return kind(**given)


def as_value(kind: type[ValueT], message: Message, **given: Any) -> ValueT:
    """A value with the message's fields; `given` are the value's other fields.

    Repeated fields become tuples, and the Duration `lease` becomes `lease_s`. An absent optional
    number leaves the value's default.

    Raises:
        InvalidRequest: a duration is out of range.
        TypeError: neither sets a field of the value: a mistake in the code.
    """
    target = cast("Any", kind)
    for attribute, name, convert in _read(target, message.DESCRIPTOR, tuple(given)):
        if convert is not _optional or message.HasField(name):
            given[attribute] = convert(getattr(message, name))
    return kind(**given)


def parsed(kind: type[MessageT], data: bytes | memoryview, field: str) -> MessageT:
    """The message that `data` holds.

    Raises:
        InvalidRequest: it holds none.
    """
    try:
        return kind.FromString(bytes(data))
    except DecodeError as error:
        raise InvalidRequest(f"{field} must be a {kind.DESCRIPTOR.full_name}") from error


@cache
def _written(kind: Descriptor, value: type, given: tuple[str, ...]) -> tuple[_Pair, ...]:
    names = {field.name for field in fields(value)}
    pairs = []
    for field in kind.fields:
        if field.name in given or (field.containing_oneof and not _is_optional(field)):
            continue
        attribute = f"{field.name}_s" if _is_duration(field) else field.name
        if attribute not in names:
            raise TypeError(f"{value.__name__} has nothing for {field.full_name}")
        convert = duration_to_pb if _is_duration(field) else _same
        pairs.append((field.name, attribute, convert))
    return tuple(pairs)


@cache
def _read(kind: type, message: Descriptor, given: tuple[str, ...]) -> tuple[_Pair, ...]:
    found = message.fields_by_name
    pairs = []
    for attribute in (field.name for field in fields(kind)):
        if attribute in given:
            continue
        field = found.get(attribute) or found.get(attribute.removesuffix("_s"))
        convert = _reader(field) if field else None
        if field is None or convert is None:
            raise TypeError(f"{message.name} has nothing for {kind.__name__}.{attribute}")
        pairs.append((attribute, field.name, convert))
    return tuple(pairs)


def _reader(field: Any) -> Callable[[Any], Any] | None:
    """How to read a field; None when only the conversation itself can say."""
    if _is_duration(field):
        return partial(duration_from_pb, field=field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return _read_map
    if field.message_type is not None or field.enum_type is not None:
        return None
    if field.is_repeated:
        return tuple
    return _optional if _is_optional(field) else _same


def _is_duration(field: Any) -> bool:
    kind = field.message_type
    return kind is not None and kind.full_name == "google.protobuf.Duration"


def _is_optional(field: Any) -> bool:
    """A scalar that may be absent; protobuf makes up a oneof for each."""
    oneof = field.containing_oneof
    return oneof is not None and bool(oneof.name == f"_{field.name}")


def _read_map(entries: Mapping[Any, Any]) -> Mapping[Any, Any]:
    return MappingProxyType(dict(entries))


def _same(value: Any) -> Any:
    return value


def _optional(value: Any) -> Any:
    return value
