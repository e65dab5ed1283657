from __future__ import annotations

import pytest

from baton.core import hashing
from baton.core.hashing import (
    HASH_BYTES,
    BlockHashes,
    KvGroup,
    KvLayout,
    block_hashes,
    root_hash,
    tokens_hash,
)

SIZE = 4
TOKENS = list(range(11))


def _hashes(tokens: list[int], salt: str = "", fingerprint: bytes = b"model") -> list[bytes]:
    return list(block_hashes(root_hash(fingerprint, salt), tokens, SIZE))


def test_full_blocks_have_hashes_and_equal_prefixes_equal_ones() -> None:
    hashes = _hashes(TOKENS)
    assert [len(one) for one in hashes] == [HASH_BYTES] * 2
    assert _hashes([*TOKENS[:8], 99, 98, 97, 96])[:2] == hashes
    assert _hashes(TOKENS[:3]) == []


def test_hashes_of_a_growing_sequence_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed, computed = BlockHashes(), []
    chain = hashing.chain
    monkeypatch.setattr(
        hashing, "chain", lambda parent, ids: computed.append(ids) or chain(parent, ids)
    )
    for num_tokens in (3, 8, 8, 11):
        found = list(hashed.of(b"model", "", TOKENS[:num_tokens], SIZE))
        assert len(computed) == num_tokens // SIZE
    assert found == _hashes(TOKENS)
    assert list(hashed.of(b"model", "salt", TOKENS, SIZE)) == _hashes(TOKENS, "salt")


def test_a_blocks_hash_covers_all_tokens_before_it() -> None:
    changed = _hashes([99, *TOKENS[1:]])
    assert all(one != other for one, other in zip(changed, _hashes(TOKENS), strict=True))
    first, second = _hashes([1, 2, 3, 4] * 2)
    assert first != second, "the same tokens at another place"


def test_models_and_tenants_share_nothing() -> None:
    found = [_hashes(TOKENS), _hashes(TOKENS, salt="b"), _hashes(TOKENS, fingerprint=b"other")]
    assert len({one for hashes in found for one in hashes}) == 6


def test_a_sequences_hash_depends_on_order_and_length() -> None:
    found = {tokens_hash(tokens) for tokens in ([1, 2], [2, 1], [1, 2, 0], [258])}
    assert len(found) == 4


def test_a_layout_counts_the_layers_of_all_its_groups() -> None:
    whole = KvLayout.one_group(4, "bfloat16", (2, 1, 3), (8, 16, 4))
    cut = KvLayout(4, "bfloat16", (KvGroup((2, 1), (8, 16)), KvGroup((3,), (4,))))
    assert cut.num_layers == whole.num_layers == 3
    assert cut.block_bytes == whole.block_bytes
    assert cut.layers_block_bytes(1, 3) == whole.layers_block_bytes(1, 3)
    assert cut != whole
