"""Tensors of the Open Inference Protocol to plain values and back."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

from baton.core.errors import InvalidRequest

Scalar = bool | int | float | str | bytes
_NAMES = "BOOL INT8 INT16 INT32 INT64 UINT8 UINT16 UINT32 UINT64 FP32 FP64"
_FORMATS = MappingProxyType(dict(zip(_NAMES.split(), "?bhiqBHIQfd", strict=True)))
"""Letters of `struct`."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor with its values, flattened."""

    name: str
    datatype: str
    values: tuple[Scalar, ...]

    def scalar(self) -> Scalar:
        """Its only value; a text if it is of type BYTES.

        Raises:
            InvalidRequest: it has none or several, or is no UTF-8.
        """
        if len(self.values) != 1:
            raise InvalidRequest(f"{self.name} must hold exactly 1 value, got {len(self.values)}")
        [value] = self.values
        if not isinstance(value, bytes):
            return value
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"{self.name} is not UTF-8") from error


def from_raw(name: str, datatype: str, data: bytes) -> tuple[Scalar, ...]:
    """Values in the form of `raw_input_contents`.

    Raises:
        InvalidRequest: the datatype is not known, or the bytes do not fit it.
    """
    try:
        if datatype == "BYTES":
            return _split(data)
        letter = _FORMATS[datatype]
        count = len(data) // struct.calcsize(letter)
        return struct.unpack(f"<{count}{letter}", data)
    except KeyError as error:
        raise InvalidRequest(f"{name}: datatype {datatype!r} is not supported") from error
    except struct.error as error:
        raise InvalidRequest(f"{name}: {len(data)} bytes are no {datatype} values") from error


def to_raw(datatype: str, values: Sequence[Scalar]) -> bytes:
    """Values in the form of `raw_output_contents`."""
    if datatype == "BYTES":
        return b"".join(
            struct.pack("<I", len(value)) + value for value in values if isinstance(value, bytes)
        )
    return struct.pack(f"<{len(values)}{_FORMATS[datatype]}", *values)


def _split(data: bytes) -> tuple[bytes, ...]:
    """Elements that each follow their length."""
    values: list[bytes] = []
    offset = 0
    while offset < len(data):
        (size,) = struct.unpack_from("<I", data, offset)
        offset += 4
        if offset + size > len(data):
            raise struct.error("cut off")
        values.append(data[offset : offset + size])
        offset += size
    return tuple(values)
