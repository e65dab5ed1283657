"""Distil the draft: it learns the whole next-token distribution of a trained target.

Works like `train.py`: a budget in minutes, checkpoint and export in the work directory, resumable.
"""

import argparse
from pathlib import Path

import torch
from loop import Loop, Settings
from models import build, draft_config
from stream import load_documents
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaForCausalLM

COPIED_LAYERS = (0, 3)
"""The draft starts from these layers of the target: of the pairs tried, the closest to it."""


def start_from_target(draft: LlamaForCausalLM, target: LlamaForCausalLM) -> None:
    """Start the draft as a cut-down target: two of its layers, with half of their neurons.

    The draft then needs minutes, not hours, to learn what the target would say.
    """
    wanted = draft.state_dict()
    given = {name: weight.float() for name, weight in target.state_dict().items()}
    for mine, theirs in enumerate(COPIED_LAYERS):
        prefix = f"model.layers.{theirs}."
        layer = {
            name.removeprefix(prefix): weight
            for name, weight in given.items()
            if name.startswith(prefix)
        }
        gate, up, down = (layer[f"mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        strength = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
        kept = strength.topk(draft.config.intermediate_size).indices.sort().values
        layer["mlp.gate_proj.weight"], layer["mlp.up_proj.weight"] = gate[kept], up[kept]
        layer["mlp.down_proj.weight"] = down[:, kept]
        wanted |= {f"model.layers.{mine}.{name}": weight for name, weight in layer.items()}
    wanted |= {name: given[name] for name in wanted if ".layers." not in name}
    draft.load_state_dict(wanted)


def main() -> None:
    """Distil for the given number of minutes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path, help="directory with the target and its tokenizer")
    parser.add_argument("work_dir", type=Path, help="directory for checkpoint and export")
    parser.add_argument("--budget-minutes", type=float, default=15, help="default: %(default)s")
    parser.add_argument("--no-compile", action="store_true", help="run without torch.compile")
    arguments = parser.parse_args()
    target = AutoModelForCausalLM.from_pretrained(arguments.target, dtype=torch.bfloat16)
    draft = build(draft_config(), seed=1)
    start_from_target(draft, target)

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = target(input_ids=batch, use_cache=False).logits.flatten(0, 1).float()
        given = draft(input_ids=batch, use_cache=False).logits.flatten(0, 1).float()
        return functional.kl_div(
            functional.log_softmax(given, dim=-1),
            functional.log_softmax(wanted, dim=-1),
            reduction="batchmean",
            log_target=True,
        )

    settings = Settings(
        budget_s=arguments.budget_minutes * 60,
        work_dir=arguments.work_dir,
        compile=not arguments.no_compile,
        muon_rate=2e-3,
        adam_rate=1e-3,
    )
    Loop(draft, loss_of, load_documents(arguments.target), settings).run()


if __name__ == "__main__":
    main()
