"""Train the target on the standard library's source.

Needs the tokenizer that `tokenizer.py` wrote. The work directory gets a checkpoint now and then,
and with it the model in Hugging Face format; the same command continues an interrupted run.
"""

import argparse
from pathlib import Path

import torch
from loop import Loop, Settings
from models import build, target_config
from stream import load_documents
from torch.nn import functional


def main() -> None:
    """Train for the given number of minutes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", type=Path, help="directory with tokenizer.json")
    parser.add_argument("work_dir", type=Path, help="directory for checkpoint and export")
    parser.add_argument("--budget-minutes", type=float, default=55, help="default: %(default)s")
    parser.add_argument("--no-compile", action="store_true", help="run without torch.compile")
    arguments = parser.parse_args()
    model = build(target_config(), seed=0)

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=batch, use_cache=False).logits
        given, wanted = logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
        return functional.cross_entropy(given.float(), wanted)

    settings = Settings(
        budget_s=arguments.budget_minutes * 60,
        work_dir=arguments.work_dir,
        compile=not arguments.no_compile,
    )
    Loop(model, loss_of, load_documents(arguments.tokenizer), settings).run()


if __name__ == "__main__":
    main()
