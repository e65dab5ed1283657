from __future__ import annotations

from pathlib import Path

import pytest
import torch

from baton.core.errors import InvalidRequest, KvLayoutMismatch
from baton.core.hashing import KvLayout
from baton.engine import kv_cache
from baton.engine.kv_cache import KvCache, choose_num_blocks
from baton.engine.pinned_copies import PinnedCopies

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_blocks_survive_the_way_to_another_cache(dtype: str) -> None:
    layout = KvLayout.one_group(4, dtype, (2, 1), (8, 16))
    source, target = KvCache(layout, 6, CPU), KvCache(layout, 6, CPU)
    for part in (*source.keys, *source.values):
        part.copy_(torch.randn(part.shape))
    for layers in ((0, 1), (1, 2)):
        payload = source.read([4, 1], *layers)
        assert len(payload) == 2 * layout.layers_block_bytes(*layers)
        target.write([0, 5], *layers, memoryview(payload))
    for mine, theirs in zip(source.keys + source.values, target.keys + target.values, strict=True):
        assert torch.equal(mine[[4, 1]], theirs[[0, 5]])
        assert not theirs[1:5].any()


def test_the_wire_order_is_layer_then_k_then_v() -> None:
    cache = KvCache(KvLayout.one_group(1, "float32", (1, 1), (1, 1)), 3, CPU)
    for number, part in enumerate((cache.keys[0], cache.values[0], cache.keys[1], cache.values[1])):
        part.view(-1).copy_(torch.tensor([0.0, 1.0, 2.0]) + 10 * number)
    numbers = torch.frombuffer(cache.read([2, 1], 0, 2), dtype=torch.float32)
    assert numbers.tolist() == [2, 1, 12, 11, 22, 21, 32, 31]


@pytest.mark.parametrize("is_staged", [False, True])
def test_whole_blocks_are_written_at_once(is_staged: bool) -> None:
    layout = KvLayout.one_group(4, "bfloat16", (2, 1), (8, 16))
    source, target = KvCache(layout, 6, CPU), KvCache(layout, 6, CPU)
    if is_staged:
        target._pinned = PinnedCopies(CPU)
    for part in (*source.keys, *source.values):
        part.copy_(torch.randn(part.shape))
    payloads = [source.read([block], 0, 2) for block in (4, 1, 2)]
    target.write_whole([0, 5, 3], payloads)
    for mine, theirs in zip(source.keys + source.values, target.keys + target.values, strict=True):
        assert torch.equal(mine[[4, 1, 2]], theirs[[0, 5, 3]])
        assert not theirs[[1, 2, 4]].any()
    with pytest.raises(KvLayoutMismatch):
        target.write_whole([1, 2], [payloads[0], payloads[1][:-1]])
    assert not any(part[1].any() for part in target.keys)


def test_a_payload_of_the_wrong_size_writes_nothing() -> None:
    cache = KvCache(KvLayout.one_group(4, "float32", (1,), (8,)), 2, CPU)
    payload = memoryview(b"\x01" * (cache.layout.block_bytes - 1))
    with pytest.raises(KvLayoutMismatch, match="256 bytes, got 255"):
        cache.write([0], 0, 1, payload)
    assert not cache.keys[0].any()


def test_the_number_of_blocks() -> None:
    assert choose_num_blocks(100, 7, None, CPU) == 7
    assert choose_num_blocks(100, None, 1050, CPU) == 10
    block_bytes = 1 << 20
    assert 1 <= choose_num_blocks(block_bytes, None, None, CPU) <= 2048


def test_a_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    free_bytes = 100 << 30
    monkeypatch.setattr(kv_cache, "_free_memory_bytes", lambda _: free_bytes)
    cuda = torch.device("cuda:0")
    block_bytes = 1 << 20
    assert choose_num_blocks(block_bytes, None, None, cuda, 0.5) == 50 << 10
    assert choose_num_blocks(block_bytes, None, None, CPU, 0.5) == 50 << 10
    assert choose_num_blocks(block_bytes, None, None, cuda) == 40 << 10, "room for two workers"
    assert choose_num_blocks(block_bytes, None, None, CPU) == 2 << 10
    monkeypatch.setattr(kv_cache, "_free_memory_bytes", lambda _: None)
    with pytest.raises(InvalidRequest, match="does not say what is free; set kv_bytes"):
        choose_num_blocks(block_bytes, None, None, CPU, 0.5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_staged_copies_are_those_of_a_cpu(dtype: str) -> None:
    """What a device's cache does, on CPU memory: only streams and pinned memory are missing."""
    layout = KvLayout.one_group(4, dtype, (2, 1), (8, 16))
    plain, staged = KvCache(layout, 6, CPU), KvCache(layout, 6, CPU)
    staged._pinned = PinnedCopies(CPU)
    for part in plain._parts(0, 2):
        part.copy_(torch.randn(part.shape))
    for layers in ((0, 2), (1, 2)):
        payload = plain.read([5, 0, 3], *layers)
        staged.write([1, 2, 4], *layers, payload.toreadonly())
        assert bytes(staged.read([1, 2, 4], *layers)) == bytes(payload)
        out = memoryview(bytearray(payload.nbytes))
        assert staged.read([1, 2, 4], *layers, out) is out
        assert bytes(out) == bytes(payload)
    for mine, theirs in zip(plain._parts(0, 2), staged._parts(0, 2), strict=True):
        assert torch.equal(mine[[5, 0, 3]], theirs[[1, 2, 4]])
        assert not theirs[[0, 3, 5]].any()
    with pytest.raises(KvLayoutMismatch):
        staged.write([1], 0, 1, memoryview(b"1"))
    whole = [plain.read([block], 0, 2).toreadonly() for block in (4, 2)]
    staged.write_whole([0, 3], whole)
    assert [bytes(staged.read([block], 0, 2)) for block in (0, 3)] == [bytes(one) for one in whole]


def test_what_does_not_fit_is_refused_with_numbers() -> None:
    with pytest.raises(InvalidRequest, match="takes 100 bytes, and 99 are set aside"):
        choose_num_blocks(100, None, 99, CPU)
    with pytest.raises(
        InvalidRequest, match=r"1073741824 KV blocks take 1073741824 MiB and \d+ MiB"
    ):
        choose_num_blocks(1 << 20, 1 << 30, None, CPU)
    with pytest.raises(InvalidRequest, match=r"at most \d+ blocks fit"):
        choose_num_blocks(1 << 20, None, 1 << 50, CPU)


def test_blocks_take_no_memory_before_they_are_written() -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * 4096

    if not Path("/proc/self/statm").is_file():
        pytest.skip("no /proc")
    before = resident_bytes()
    cache = KvCache(KvLayout.one_group(16, "float32", (4,), (64,)), 16384, CPU)
    assert cache.num_bytes == 512 << 20
    assert resident_bytes() - before < 64 << 20
    cache.keys[0][5] = 1.0
    assert not cache.keys[0][4].any()
    assert not cache.keys[0][6].any()
