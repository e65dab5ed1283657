"""Model fingerprints, KV layouts and block hashes on the wire."""

from __future__ import annotations

from collections.abc import Iterable

from baton.core.errors import InvalidRequest, Unsupported
from baton.core.hashing import HASH_BYTES, Fingerprint, KvLayout
from baton.v1 import common_pb2
from baton.wire.fields import as_message, as_value

_MAX_LAYERS = 4096
_DTYPES = ("float32", "bfloat16", "float16", "int8")


def fingerprint_to_pb(fingerprint: Fingerprint) -> common_pb2.ModelFingerprint:
    """The wire's form."""
    layout = layout_to_pb(fingerprint.layout)
    return as_message(common_pb2.ModelFingerprint, fingerprint, layout=layout)


def fingerprint_from_pb(pb: common_pb2.ModelFingerprint) -> Fingerprint:
    """A model's identity.

    Raises:
        InvalidRequest: the layout cannot be one.
    """
    return as_value(Fingerprint, pb, layout=layout_from_pb(pb.layout))


def layout_to_pb(layout: KvLayout) -> common_pb2.KvLayout:
    """The wire's form.

    Raises:
        Unsupported: the layout has several groups, which the message cannot say.
    """
    if len(layout.groups) != 1:
        raise Unsupported(f"a KV layout has one group on the wire, not {len(layout.groups)}")
    return common_pb2.KvLayout(
        block_size=layout.block_size,
        dtype=layout.dtype,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
    )


def layout_from_pb(pb: common_pb2.KvLayout) -> KvLayout:
    """A KV cache's shape.

    Raises:
        InvalidRequest: it cannot be one.
    """
    if pb.dtype not in _DTYPES:
        raise InvalidRequest(f"layout.dtype must be one of {', '.join(_DTYPES)}")
    in_range("layout.block_size", pb.block_size, 1, 4096)
    in_range("layout.num_kv_heads' length", len(pb.num_kv_heads), 1, _MAX_LAYERS)
    if len(pb.num_kv_heads) != len(pb.head_dim):
        raise InvalidRequest("layout.num_kv_heads and layout.head_dim must be equally long")
    for heads, dim in zip(pb.num_kv_heads, pb.head_dim, strict=True):
        in_range("layout.num_kv_heads", heads, 1, 65_536)
        in_range("layout.head_dim", dim, 1, 65_536)
    return KvLayout.one_group(pb.block_size, pb.dtype, tuple(pb.num_kv_heads), tuple(pb.head_dim))


def in_range(field: str, value: int, low: int, high: int) -> None:
    """Checks an integer.

    Raises:
        InvalidRequest: it is not in `[low, high]`.
    """
    if not low <= value <= high:
        raise InvalidRequest(f"{field} must be in [{low}, {high}], got {value}")


def hashes_from_pb(field: str, hashes: Iterable[bytes]) -> tuple[bytes, ...]:
    """Block hashes.

    Raises:
        InvalidRequest: one has a wrong size.
    """
    checked = tuple(hashes)
    if any(len(value) != HASH_BYTES for value in checked):
        raise InvalidRequest(f"{field} must hold hashes of {HASH_BYTES} bytes each")
    return checked
