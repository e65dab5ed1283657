"""Chained hashes of KV blocks, and the identity of what computed them.

A block's hash covers the model's fingerprint, the tenant's salt and every token up to the block's
end, so equal hashes mean equal KV (Source: vLLM's automatic prefix caching). BLAKE2b with 16 bytes:
a collision cannot be built by a tenant who chooses prompts.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

HASH_BYTES = 16
INT8_SCALE_BYTES = 2
"""Behind each vector of int8 KV: its scale."""
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@dataclass(frozen=True, slots=True)
class KvGroup:
    """Layers whose KV shares one block table."""

    num_kv_heads: tuple[int, ...]
    """Per layer."""
    head_dim: tuple[int, ...]
    """Per layer."""


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Shape of a worker's KV cache."""

    block_size: int
    """Tokens per block."""
    dtype: str
    """"float32", "bfloat16" or "float16", or "int8" with a scale for each token and head."""
    groups: tuple[KvGroup, ...]
    """One today, of all layers; windows, latent and recurrent state will need several."""
    num_kv_heads: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """Per layer, group by group."""
    head_dim: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """Per layer, group by group."""

    @classmethod
    def one_group(
        cls,
        block_size: int,
        dtype: str,
        num_kv_heads: tuple[int, ...],
        head_dim: tuple[int, ...],
    ) -> KvLayout:
        """The layout of a model whose layers share one block table. Mirrors baton.v1.KvLayout."""
        return cls(block_size, dtype, (KvGroup(num_kv_heads, head_dim),))

    def __post_init__(self) -> None:
        # Once: these are read for each chunk of a push.
        for name in ("num_kv_heads", "head_dim"):
            values = tuple(value for group in self.groups for value in getattr(group, name))
            object.__setattr__(self, name, values)

    @property
    def num_layers(self) -> int:
        """Layers with KV."""
        return len(self.num_kv_heads)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, K and V."""
        return self.layers_block_bytes(0, self.num_layers)

    def layers_block_bytes(self, layer_start: int, layer_end: int) -> int:
        """Bytes of one block over layers `[layer_start, layer_end)`, K and V."""
        item_bytes = _ITEM_BYTES[self.dtype]
        extra_bytes = INT8_SCALE_BYTES if self.dtype == "int8" else 0
        token_bytes = sum(
            heads * (dim * item_bytes + extra_bytes)
            for heads, dim in zip(
                self.num_kv_heads[layer_start:layer_end],
                self.head_dim[layer_start:layer_end],
                strict=True,
            )
        )
        return 2 * token_bytes * self.block_size


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What must be equal for KV of one worker to be usable by another.

    Mirrors baton.v1.ModelFingerprint.
    """

    model: str
    config_hash: str
    weights_hash: str
    tokenizer_hash: str
    layout: KvLayout

    def _parts(self) -> dict[str, object]:
        """What decides the KV of equal tokens. The order and each text are part of the digest."""
        return {
            "config": self.config_hash,
            "weights": self.weights_hash,
            "tokenizer": self.tokenizer_hash,
            "block_size": self.layout.block_size,
            "dtype": self.layout.dtype,
            "num_kv_heads": self.layout.num_kv_heads,
            "head_dim": self.layout.head_dim,
        }

    def differences(self, other: Fingerprint) -> list[str]:
        """Readable differences, empty when the two can exchange KV."""
        mine = {"model": self.model, **self._parts()}
        theirs = {"model": other.model, **other._parts()}
        differing = [name for name in mine if mine[name] != theirs[name]]
        return [f"{name}: {mine[name]} != {theirs[name]}" for name in differing]

    def digest(self) -> bytes:
        """Root of every block hash chain of this model."""
        text = "\x00".join(map(str, self._parts().values()))
        return blake2b(text.encode(), digest_size=HASH_BYTES).digest()


def root_hash(fingerprint_digest: bytes, cache_salt: str) -> bytes:
    """Parent of the first block: separates models and tenants."""
    return blake2b(fingerprint_digest + cache_salt.encode(), digest_size=HASH_BYTES).digest()


def chain(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash of a full block whose predecessor has hash `parent`."""
    return blake2b(parent + array("I", token_ids).tobytes(), digest_size=HASH_BYTES).digest()


def block_hashes(
    root: bytes, token_ids: Sequence[int], block_size: int, known: Sequence[bytes] = ()
) -> Iterator[bytes]:
    """Hashes of the full blocks of `token_ids`, first block first.

    `known` are those of its first blocks: the result begins behind them.
    """
    parent = known[-1] if known else root
    for start in range(len(known) * block_size, len(token_ids) - block_size + 1, block_size):
        parent = chain(parent, token_ids[start : start + block_size])
        yield parent


class BlockHashes:
    """The hashes of one growing token sequence, each computed once per model and salt."""

    def __init__(self) -> None:
        self._found: dict[bytes, list[bytes]] = {}

    def of(
        self, digest: bytes, cache_salt: str, token_ids: Sequence[int], block_size: int
    ) -> Sequence[bytes]:
        """Hashes of the full blocks; `token_ids` begin with those of the last call."""
        root = root_hash(digest, cache_salt)
        hashes = self._found.setdefault(root, [])
        hashes += list(block_hashes(root, token_ids, block_size, known=hashes))
        return hashes


def tokens_hash(token_ids: Sequence[int]) -> bytes:
    """Hash of a token sequence: what a hand-off's manifest compares."""
    return blake2b(array("I", token_ids).tobytes(), digest_size=HASH_BYTES).digest()
