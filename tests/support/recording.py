"""What a CUDA graph does, on any device: repeats operators on the memory that they had.

Python runs once, while the operators are recorded. A replay calls them again with the same tensors
and puts the results where they were then, so whatever Python would have decided anew is frozen.
Work that a graph cannot hold, because it waits for the device or brings in content of the host, is
refused as CUDA refuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from baton.engine import backends, graphs
from tests.support import varlen

_aten = torch.ops.aten
# In inference mode operators that are made of others arrive as they are.
REFUSED = {
    _aten._local_scalar_dense,
    _aten.allclose,
    _aten.equal,
    _aten.is_nonzero,
    _aten.item,
    _aten.lift_fresh,
    _aten.masked_select,
    _aten.nonzero,
    _aten.unique_consecutive,
    _aten._unique2,
}
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_}


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], None]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        has_mask = func.overloadpacket in _INDEXING and any(
            tensor.dtype in {torch.bool, torch.uint8} for tensor in _tensors(args[1])
        )
        if has_mask or func.overloadpacket in REFUSED:
            raise RuntimeError(f"{func} is not permitted while a graph is captured")
        result = func(*args, **kwargs)
        # Not by the schema: that of `to` says alias where there is a copy.
        given = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        fresh = {
            index: tensor
            for index, tensor in enumerate(_tensors(result))
            if _storage(tensor) not in given
        }
        if fresh or func._schema.is_mutable:

            def repeat() -> None:
                again = _tensors(func(*args, **kwargs))
                for index, tensor in fresh.items():
                    tensor.copy_(again[index])

            self.calls.append(repeat)
        return result


def _tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    # Packed weights have no storage, and nothing aliases them.
    return id(tensor) if tensor.is_mkldnn else tensor.untyped_storage()._cdata


class RecordingCapture:
    """Stands in for baton.engine.graphs.CudaCapture."""

    def __init__(self) -> None:
        self.num_captured = 0
        self.num_replayed = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        with _Recorder() as recorder:
            work()
        self.num_captured += 1

        def replay() -> None:
            self.num_replayed += 1
            for call in recorder.calls:
                call()

        return replay


@contextmanager
def recorded_decoding() -> Iterator[RecordingCapture]:
    """Engines made meanwhile attend with varlen in plain operators, and record decode steps."""
    recording = RecordingCapture()
    with (
        patch.object(backends, "find_kernel", lambda *_: varlen.operator),
        patch.object(graphs, "find_capture", lambda _: recording),
    ):
        yield recording
