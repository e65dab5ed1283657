"""Hypothesis strategies for any protobuf message: every field, known and unknown values."""

from __future__ import annotations

from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

_MAX_DEPTH = 4
_MAX_ITEMS = 4
_F = FieldDescriptor
_BITS = {
    _F.CPPTYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    _F.CPPTYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    _F.CPPTYPE_UINT32: (0, (1 << 32) - 1),
    _F.CPPTYPE_UINT64: (0, (1 << 64) - 1),
    _F.CPPTYPE_ENUM: (-(1 << 31), (1 << 31) - 1),
}


def messages(descriptor: Descriptor, depth: int = 0) -> st.SearchStrategy[Message]:
    """Messages of a type, each field set or not."""
    fields = [f for f in descriptor.fields if depth < _MAX_DEPTH or f.message_type is None]
    chosen = (
        st.lists(st.sampled_from(fields), unique_by=lambda f: f.name) if fields else st.just([])
    )
    return chosen.flatmap(
        lambda fields: st.builds(
            lambda values: _built(descriptor, values),
            st.fixed_dictionaries({field.name: _value(field, depth) for field in fields}),
        )
    )


def _built(descriptor: Descriptor, values: dict[str, Any]) -> Message:
    return message_factory.GetMessageClass(descriptor)(**values)


def _value(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        by_name = field.message_type.fields_by_name
        key, value = (_single(by_name[name], depth) for name in ("key", "value"))
        return st.dictionaries(key, value, max_size=_MAX_ITEMS)
    one = _single(field, depth)
    return st.lists(one, max_size=_MAX_ITEMS) if field.is_repeated else one


def _single(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    kind = field.cpp_type
    if kind == _F.CPPTYPE_MESSAGE:
        return messages(field.message_type, depth + 1)
    if kind == _F.CPPTYPE_STRING:
        if field.type == _F.TYPE_BYTES:
            return st.binary(max_size=40)
        return st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
    if kind == _F.CPPTYPE_BOOL:
        return st.booleans()
    if kind in {_F.CPPTYPE_FLOAT, _F.CPPTYPE_DOUBLE}:
        return st.floats(width=32)
    low, high = _BITS[kind]
    return st.one_of(st.integers(max(low, -2), 300), st.integers(low, high))
