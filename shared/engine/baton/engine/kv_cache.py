"""The tensors that hold KV, and their bytes on the wire. `core.blocks` knows who owns a block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from baton.core.errors import InvalidRequest, KvLayoutMismatch
from baton.core.hashing import INT8_SCALE_BYTES, KvLayout
from baton.engine.pinned_copies import PinnedCopies

_DEFAULT_SHARE = 0.25
_DEFAULT_MAX_BYTES = 2 << 30
_DEFAULT_CUDA_SHARE = 0.4
"""So that two workers fit on one device, with room for what they compute with."""


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a layout's name."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The layout's name of a dtype."""
    return str(dtype).removeprefix("torch.")


class KvCache:
    """K and V of every layer, each `[num_blocks, block_size, num_kv_heads, head_dim]`.

    In int8 the last dimension is longer: it has the scales, see `kv_int8`.

    The engine thread writes the blocks that it computes. Transfer threads read and write whole
    blocks that no other thread writes meanwhile.
    """

    def __init__(self, layout: KvLayout, num_blocks: int, device: torch.device) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.device = device
        dtype = torch_dtype(layout.dtype)
        extra = INT8_SCALE_BYTES if layout.dtype == "int8" else 0

        def allocate() -> list[torch.Tensor]:
            return [
                _zeros((num_blocks, layout.block_size, heads, dim + extra), dtype, device)
                for heads, dim in zip(layout.num_kv_heads, layout.head_dim, strict=True)
            ]

        self._pinned = None if device.type == "cpu" else PinnedCopies(device)
        self.keys = allocate()
        self.values = allocate()
        # A copy of a few blocks takes numpy a third of the time that torch's operators need.
        self._rows = [
            part.view(num_blocks, -1).view(torch.uint8).numpy()
            for part in self._parts(0, layout.num_layers)
            if self._pinned is None
        ]

    @property
    def num_bytes(self) -> int:
        """Bytes of all blocks."""
        return self.layout.block_bytes * self.num_blocks

    def read(
        self,
        block_ids: Sequence[int],
        layer_start: int,
        layer_end: int,
        out: memoryview | None = None,
    ) -> memoryview:
        """Content of blocks: layer by layer, K then V, each `[len(block_ids), block_size, ...]`.

        It is put into `out`, or into new memory.

        Raises:
            KvLayoutMismatch: `out` has the wrong size; nothing was written.
        """
        num_bytes = self.layout.layers_block_bytes(layer_start, layer_end) * len(block_ids)
        if out is None:
            out = np.empty(num_bytes, dtype=np.uint8).data
        self._check_size(out, len(block_ids), layer_start, layer_end)
        if self._pinned is not None:
            content = torch.frombuffer(out, dtype=torch.uint8)
            content.copy_(self._pinned.read(self._parts(layer_start, layer_end), block_ids))
            return out
        for rows, target in self._cut(out, len(block_ids), layer_start, layer_end):
            np.take(rows, block_ids, axis=0, out=target, mode="clip")
        return out

    def write(
        self, block_ids: Sequence[int], layer_start: int, layer_end: int, payload: memoryview
    ) -> None:
        """Sets the content of blocks.

        Raises:
            KvLayoutMismatch: the payload has the wrong size; nothing was written.
        """
        self._check_size(payload, len(block_ids), layer_start, layer_end)
        if self._pinned is not None:
            self._pinned.write(self._parts(layer_start, layer_end), block_ids, payload)
            return
        index = np.asarray(block_ids)
        for rows, source in self._cut(payload, len(block_ids), layer_start, layer_end):
            rows[index] = source

    def write_whole(self, block_ids: Sequence[int], payloads: Sequence[memoryview]) -> None:
        """Sets the content of blocks, each from its own payload with all layers.

        Few operators for many blocks: a fourth of the time that a `write` for each takes.

        Raises:
            KvLayoutMismatch: a payload has the wrong size; nothing was written.
        """
        num_layers = self.layout.num_layers
        for payload in payloads:
            self._check_size(payload, 1, 0, num_layers)
        if not payloads:
            return
        parts = self._parts(0, num_layers)
        stacked = np.stack([np.frombuffer(payload, dtype=np.uint8) for payload in payloads])
        ends = np.cumsum([part[0].nbytes for part in parts])
        cuts = np.split(stacked, ends[:-1], axis=1)
        if self._pinned is not None:
            by_layer = np.concatenate([cut.reshape(-1) for cut in cuts])
            self._pinned.write(parts, block_ids, by_layer.data)
            return
        index = np.asarray(block_ids)
        for rows, cut in zip(self._rows, cuts, strict=True):
            rows[index] = cut

    def _cut(
        self, payload: memoryview, num_blocks: int, layer_start: int, layer_end: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Each tensor of the layers as rows of bytes, and where its blocks are in `payload`."""
        content = np.frombuffer(payload, dtype=np.uint8)
        offset = 0
        for rows in self._rows[2 * layer_start : 2 * layer_end]:
            end = offset + rows.shape[1] * num_blocks
            yield rows, content[offset:end].reshape(num_blocks, -1)
            offset = end

    def _parts(self, layer_start: int, layer_end: int) -> list[torch.Tensor]:
        """Tensors of the layers in the order of the wire."""
        layers = range(layer_start, layer_end)
        return [part for layer in layers for part in (self.keys[layer], self.values[layer])]

    def _check_size(
        self, payload: memoryview, num_blocks: int, layer_start: int, layer_end: int
    ) -> None:
        expected = self.layout.layers_block_bytes(layer_start, layer_end) * num_blocks
        if payload.nbytes != expected:
            raise KvLayoutMismatch(
                f"{num_blocks} blocks of layers {layer_start} to {layer_end} are "
                f"{expected} bytes, got {payload.nbytes}"
            )

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies whole blocks; only the engine thread may."""
        source = torch.tensor(sources, dtype=torch.int64, device=self.device)
        target = torch.tensor(targets, dtype=torch.int64, device=self.device)
        for part in (*self.keys, *self.values):
            part.index_copy_(0, target, part.index_select(0, source))


def choose_num_blocks(
    block_bytes: int,
    num_blocks: int | None,
    kv_bytes: int | None,
    device: torch.device,
    kv_share: float | None = None,
) -> int:
    """Blocks that the settings ask for, or that a share of the free memory holds.

    Raises:
        InvalidRequest: they do not fit into the free memory, or not even one does into `kv_bytes`.
    """
    free_bytes = _free_memory_bytes(device)
    if num_blocks is None:
        if kv_bytes is None:
            kv_bytes = _shared_bytes(free_bytes, kv_share, device)
        num_blocks = kv_bytes // block_bytes
        if num_blocks < 1:
            raise InvalidRequest(
                f"one KV block of this model takes {block_bytes} bytes, and {kv_bytes} are set "
                f"aside for KV; set kv_bytes to {block_bytes} or more"
            )
    if free_bytes is not None and num_blocks * block_bytes > free_bytes:
        raise InvalidRequest(
            f"{num_blocks} KV blocks take {_mib(num_blocks * block_bytes)} MiB and "
            f"{_mib(free_bytes)} MiB are free; at most {free_bytes // block_bytes} blocks fit: "
            f"lower num_blocks or kv_bytes"
        )
    return num_blocks


def _shared_bytes(free_bytes: int | None, kv_share: float | None, device: torch.device) -> int:
    if kv_share is not None:
        if free_bytes is None:
            raise InvalidRequest("kv_share: this system does not say what is free; set kv_bytes")
        return int(free_bytes * kv_share)
    if free_bytes is None:
        return _DEFAULT_MAX_BYTES
    if device.type == "cuda":
        return int(free_bytes * _DEFAULT_CUDA_SHARE)
    return min(_DEFAULT_MAX_BYTES, int(free_bytes * _DEFAULT_SHARE))


def _mib(num_bytes: int) -> int:
    return num_bytes >> 20


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros, not empty: masked positions are multiplied by 0, and 0 * NaN is NaN.

    On CPU the memory is the kernel's own zero pages, which take no time until they are written:
    torch.zeros writes them all, seconds per gigabyte on a busy machine.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)


def _free_memory_bytes(device: torch.device) -> int | None:
    """None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text("ascii").splitlines())
        limits.append(int(fields["MemAvailable"].split()[0]) << 10)
    cgroup = Path("/sys/fs/cgroup")
    if (cgroup / "memory.max").is_file():
        limit = (cgroup / "memory.max").read_text("ascii").strip()
        if limit.isdigit():
            used = int((cgroup / "memory.current").read_text("ascii"))
            # The kernel gives cached file pages back, among them those of the weights' files.
            stat = dict(
                line.split() for line in (cgroup / "memory.stat").read_text("ascii").splitlines()
            )
            limits.append(max(0, int(limit) - used + int(stat.get("inactive_file", 0))))
    return min(limits, default=None)
