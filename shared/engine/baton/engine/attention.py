"""Paged attention, plugged into transformers' models.

A model's attention layers call `PagedAttention`, registered under our own name. It writes the
new K and V into the pool and lets a backend attend.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch.nn.functional import pad
from transformers import AttentionInterface

from baton.core.errors import Unsupported
from baton.engine.kv_cache import KvCache
from baton.engine.kv_int8 import pack
from baton.engine.ragged import AttentionBatch


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What a layer asks for besides softmax(QK)V."""

    scaling: float
    window: int | None = None
    """A token sees itself and the `window - 1` before it."""
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    """One extra logit per query head, [num_heads]."""


class AttentionBackend(Protocol):
    """How attention is computed on a device."""

    name: ClassVar[str]

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        batch: AttentionBatch,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Attends over the pool.

        Args:
            query: [num_tokens, num_heads, head_dim].
            keys: [num_blocks, block_size, num_kv_heads, head_dim]; holds the new tokens' too. May
                be int8 as `kv_int8` packs it.
            values: as `keys`.
            batch: whose tokens they are.
            options: what the layer asks for.

        Returns:
            [num_tokens, num_heads, head_dim].
        """


@dataclass(frozen=True, slots=True)
class LayerShape:
    """KV of one layer, as the layer itself passed it."""

    num_kv_heads: int
    head_dim: int
    has_softcap: bool = False
    has_sinks: bool = False

    def why_head_does_not_fit(self, largest: int, multiple: int) -> str | None:
        """Why a kernel for heads of some sizes cannot attend here; None when it can."""
        if self.head_dim <= largest and self.head_dim % multiple == 0:
            return None
        return (
            f"it takes heads of at most {largest} in multiples of {multiple}, not {self.head_dim}"
        )


class PagedAttention:
    """The function that a model's attention layers call.

    Without a pool it records what the layers pass and returns zeros: that is how a model's KV
    layout is found, whatever its config calls it.
    """

    def __init__(self) -> None:
        self.name = f"baton_{id(self):x}"
        self.shapes: dict[int, LayerShape] = {}
        self.backends: Mapping[int, AttentionBackend] = {}
        """How each layer attends."""
        self._kv: KvCache | None = None
        self._batch: AttentionBatch | None = None
        self._on_written: Callable[[int], None] | None = None
        # No mask function goes with it: transformers then makes no mask at all.
        AttentionInterface.register(self.name, self)

    def num_layers_by_backend(self) -> Mapping[str, int]:
        """Layers by the name of the backend that they attend with."""
        return Counter(backend.name for backend in self.backends.values())

    def attach(self, kv: KvCache) -> None:
        """Sets the pool that the layers write to."""
        self._kv = kv

    def detach(self) -> None:
        """Drops the pool, since transformers' registry keeps this object for ever."""
        self._kv = None
        self._batch = None

    def use(self, batch: AttentionBatch, on_written: Callable[[int], None] | None = None) -> None:
        """Sets the batch that the next forward computes.

        `on_written` is called with each layer whose K and V of the batch are in the pool.
        """
        self._batch = batch
        self._on_written = on_written

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,  # noqa: ARG002
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Called by transformers with [1, heads, num_tokens, head_dim]; returns the transpose."""
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int):
            raise Unsupported(f"{type(module).__name__} does not say which layer it is")
        if self._kv is None or self._batch is None:
            self._record(layer, key, value, kwargs)
            return query.new_zeros(*query.shape[:3], value.shape[3]).transpose(1, 2), None
        value_dim = value.shape[3]
        if value_dim < key.shape[3]:
            # Multi-head latent attention: the pool and its kernels know one size.
            value = pad(value, (0, key.shape[3] - value_dim))
        keys, values = self._kv.keys[layer], self._kv.values[layer]
        for pool, new in ((keys, key), (values, value)):
            vectors = new[0].transpose(0, 1)
            if pool.dtype is torch.int8:
                vectors = pack(vectors)
            pool.view(-1, *pool.shape[2:]).index_copy_(0, self._batch.slots, vectors)
        if self._on_written is not None:
            self._on_written(layer)
        options = AttentionOptions(
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            window=kwargs.get("sliding_window"),
            softcap=kwargs.get("softcap"),
            sinks=kwargs.get("s_aux"),
        )
        backend = self.backends[layer]
        output = backend.attend(query[0].transpose(0, 1), keys, values, self._batch, options)
        return output[..., :value_dim].unsqueeze(0), None

    def _record(
        self, layer: int, key: torch.Tensor, value: torch.Tensor, kwargs: Mapping[str, Any]
    ) -> None:
        if key.shape[:3] != value.shape[:3] or key.shape[3] < value.shape[3]:
            raise Unsupported(
                f"layer {layer} has keys of shape {tuple(key.shape)} and values of shape "
                f"{tuple(value.shape)}; values may only be narrower than keys"
            )
        if layer in self.shapes:
            raise Unsupported(f"layer {layer} attends twice; one KV cache per layer is needed")
        self.shapes[layer] = LayerShape(
            num_kv_heads=key.shape[1],
            head_dim=key.shape[3],
            has_softcap=kwargs.get("softcap") is not None,
            has_sinks=kwargs.get("s_aux") is not None,
        )
