"""Mixture-of-experts layers whose experts are linear layers, open to be packed or quantized.

transformers keeps a layer's experts in three-dimensional tensors and describes their layout by its
experts interface. This file knows nothing else of them. Experts without that interface stay as they
are, and so do those that turn out to compute something else.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

_INTERFACE = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_apply_gate")
"""What transformers' decorator `use_experts_implementation` gives a class."""
_MAX_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Largest relative difference of a rewritten layer."""
_NUM_TRIED_TOKENS = 8


class ExpertLinears(nn.Module):
    """Computes what transformers' `experts` does, by two linear layers for each expert.

    Their weights are views of its tensors: there is no second copy, and a tensor is let go when the
    last of its views is replaced.
    """

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self._names = _projections(experts)
        # Named as in transformers, so that the names in a checkpoint say what a layer is.
        for name in self._names:
            self.add_module(name, _linears(experts, name))
        self._activate = experts._apply_gate if experts.has_gate else experts.act_fn

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[num_tokens, hidden] to the same, by the experts chosen for each token.

        `top_k_index` and `top_k_weights` are [num_tokens, experts per token].
        """
        num_tokens, top_k = top_k_index.shape
        if not num_tokens:
            return hidden_states
        chosen = top_k_index.reshape(-1)
        if num_tokens == 1:
            # Sorting would take as long as a small layer.
            outputs = self._compute(chosen.tolist(), [hidden_states] * top_k)
        else:
            order = chosen.argsort(stable=True)
            counts = chosen.bincount().tolist()
            hit = [index for index, count in enumerate(counts) if count]
            rows = hidden_states[order // top_k].split_with_sizes([counts[index] for index in hit])
            by_expert = self._compute(hit, rows)
            outputs = torch.empty_like(by_expert)
            outputs[order] = by_expert
        weighted = outputs.view(num_tokens, top_k, -1) * top_k_weights[..., None]
        return weighted.sum(1).to(hidden_states.dtype)

    def _compute(self, hit: Sequence[int], rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """The rows of each expert that was hit; all of them, one after the other."""
        first, last = (list(getattr(self, name)) for name in self._names)
        sums = [first[index](part) for index, part in zip(hit, rows, strict=True)]
        inner = self._activate(torch.cat(sums)).split_with_sizes([len(part) for part in rows])
        return torch.cat([last[index](part) for index, part in zip(hit, inner, strict=True)])


def open_experts(module: nn.Module, saved: Collection[str] | None = None) -> int:
    """Turns a model's experts into linear layers in place, before these are packed or quantized.

    Each class of experts is tried once on random input, and left alone if the output differs.
    Without weights to try, the layer names in `saved`, a checkpoint's, show which were opened.

    Returns:
        Groups of experts opened.
    """
    verdicts: dict[type[nn.Module], bool] = {}
    num_opened = 0
    for path, experts in list(module.named_modules()):
        if not any(weight.dim() == 3 for weight in experts.parameters(recurse=False)):
            continue
        kind = type(experts)
        if saved is not None:
            verdicts[kind] = _is_described(experts) and f"{path}.down_proj.0" in saved
        elif kind not in verdicts:
            verdicts[kind] = _can_open(experts)
            if not verdicts[kind]:
                logger.info("%s is not what the experts interface says: left alone", kind.__name__)
        if verdicts[kind]:
            module.set_submodule(path, ExpertLinears(experts))
            # The object with the activation stays in use: it must not hold on to the weights.
            for name in _projections(experts):
                delattr(experts, name)
            num_opened += 1
    return num_opened


def _projections(experts: Any) -> tuple[str, str]:
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def _linears(experts: Any, name: str) -> nn.ModuleList:
    weights = getattr(experts, name).detach()
    biases = getattr(experts, f"{name}_bias").detach() if experts.has_bias else None
    linears = nn.ModuleList()
    for index, weight in enumerate(weights.mT if experts.is_transposed else weights):
        # Without storage: its parameters are set right below.
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if biases is not None:
            linear.bias = nn.Parameter(biases[index], requires_grad=False)
        linears.append(linear)
    return linears


def _is_described(experts: Any) -> bool:
    has_interface = all(hasattr(experts, name) for name in _INTERFACE)
    return has_interface and not experts.has_post_expert_norm


def _can_open(experts: Any) -> bool:
    if not _is_described(experts):
        return False
    weight = experts.down_proj
    num_experts, size = len(weight), weight.shape[2 if experts.is_transposed else 1]
    generator = torch.Generator().manual_seed(0)
    shape = _NUM_TRIED_TOKENS, min(2, num_experts)
    inputs = torch.randn(_NUM_TRIED_TOKENS, size, generator=generator)
    chosen = torch.randint(num_experts, shape, generator=generator)
    shares = torch.rand(shape, generator=generator)
    arguments = inputs.to(weight), chosen.to(weight.device), shares.to(weight)
    with torch.inference_mode():
        expected = experts(*arguments).float()
        difference = (ExpertLinears(experts)(*arguments).float() - expected).norm()
    return bool(difference <= _MAX_ERROR[weight.dtype] * expected.norm())
