"""Inputs of the Open Inference Protocol: tensors as plain values, and the request they make."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from baton.core.errors import InvalidRequest
from baton.core.prompt import Prompt
from baton.core.sampling import SamplingParams
from baton.wire.inference.requests import checked_salt

Scalar = bool | int | float | str | bytes
_NAMES = "BOOL INT8 INT16 INT32 INT64 UINT8 UINT16 UINT32 UINT64 FP32 FP64"
_FORMATS = MappingProxyType(dict(zip(_NAMES.split(), "?bhiqBHIQfd", strict=True)))
"""Letters of `struct`."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor with its values, flattened."""

    name: str
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


TEXT_INPUT, TOKEN_INPUT = "text_input", "input_ids"
_FLOATS = "temperature top_p min_p repetition_penalty frequency_penalty presence_penalty"
PARAMETERS: Mapping[str, type] = MappingProxyType({
    **dict.fromkeys(("max_tokens", "min_tokens", "top_k", "seed"), int),
    **dict.fromkeys(_FLOATS.split(), float),
    **dict.fromkeys(("stop", "cache_salt"), str),
    **dict.fromkeys(("ignore_eos", "stream", "keep_special_tokens"), bool),
})
"""Names and types, as parameters or as tensors with one value."""
DATATYPES: Mapping[type, str] = MappingProxyType({
    int: "INT64",
    float: "FP32",
    str: "BYTES",
    bool: "BOOL",
})
EMPTY_FINAL = "triton_enable_empty_final_response"
TIMEOUT = "timeout"
"""Time that the request may take, in microseconds; 0 sets no limit."""
_OF_TRITON = frozenset({TIMEOUT, EMPTY_FINAL})
_BESIDE_SAMPLING = frozenset({"stream", "cache_salt", "keep_special_tokens"})


@dataclass(frozen=True, slots=True)
class Wish:
    """A request's prompt and options."""

    prompt: Prompt
    sampling: SamplingParams
    is_stream: bool
    has_empty_final: bool
    cache_salt: str
    keep_special_tokens: bool
    timeout_s: float | None


def read_wish(tensors: Mapping[str, Tensor], parameters: Mapping[str, Scalar]) -> Wish:
    """What is asked for.

    Raises:
        InvalidRequest: something is missing, not known, or of a wrong type or range.
    """
    prompt = _prompt(tensors)
    given: dict[str, Any] = {
        name: tensor.scalar()
        for name, tensor in tensors.items()
        if name not in {TEXT_INPUT, TOKEN_INPUT}
    }
    given |= {name: value for name, value in parameters.items() if name not in _OF_TRITON}
    checked: dict[str, Any] = {name: _checked(name, value) for name, value in given.items()}
    fields = {name: value for name, value in checked.items() if name not in _BESIDE_SAMPLING}
    if "stop" in fields:
        fields["stop"] = (fields["stop"],)
    timeout_us = parameters.get(TIMEOUT, 0)
    if type(timeout_us) is not int or timeout_us < 0:
        raise InvalidRequest(f"{TIMEOUT} must be a number of microseconds, got {timeout_us!r}")
    if not 0 <= checked.get("seed", 0) < 1 << 64:
        raise InvalidRequest(f"seed must be in [0, 2**64 - 1], got {checked['seed']}")
    return Wish(
        prompt=prompt,
        sampling=SamplingParams(**fields).check(),
        is_stream=checked.get("stream", False),
        has_empty_final=bool(parameters.get(EMPTY_FINAL, False)),
        cache_salt=checked_salt(checked.get("cache_salt", "")),
        keep_special_tokens=checked.get("keep_special_tokens", False),
        timeout_s=timeout_us / 1e6 if timeout_us else None,
    )


def _prompt(tensors: Mapping[str, Tensor]) -> Prompt:
    text, tokens = tensors.get(TEXT_INPUT), tensors.get(TOKEN_INPUT)
    if (text is None) == (tokens is None):
        raise InvalidRequest(f"give exactly one of the tensors {TEXT_INPUT} and {TOKEN_INPUT}")
    if text is not None:
        value = text.scalar()
        if not isinstance(value, str) or not value:
            raise InvalidRequest(f"{TEXT_INPUT} must be of type BYTES and not empty")
        return value
    values = tokens.values if tokens is not None else ()
    ids = tuple(value for value in values if type(value) is int and 0 <= value < 1 << 32)
    if not ids or len(ids) < len(values):
        raise InvalidRequest(f"{TOKEN_INPUT} must hold token ids, at least one")
    return ids


def _checked(name: str, value: Scalar) -> Scalar:
    kind = PARAMETERS.get(name)
    if kind is None:
        known = ", ".join(sorted(PARAMETERS))
        raise InvalidRequest(f"{name!r} is neither an input nor a parameter; there are: {known}")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise InvalidRequest(f"{name} must be of type {kind.__name__}, got {type(value).__name__}")
    return value
