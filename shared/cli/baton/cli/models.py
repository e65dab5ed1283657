"""Finds the model to serve: the bundled demo pair, or a local directory."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from baton.cli.user_errors import UserError

DEMO_VARIABLE = "BATON_DEMO_MODEL"
DEMO_KV_BYTES = 128 * 1024 * 1024
"""Per worker: plenty for a model of this size, and allocated at once."""
_IN_REPOSITORY = Path("deploy/models/demo")
_DRAFT_SUFFIX = "-draft"


class NoModel(UserError):
    """A model was not found."""


@dataclass(frozen=True, slots=True)
class ModelPair:
    """A target model's directory and its draft's."""

    name: str
    target: Path
    draft: Path | None


def demo_pair() -> ModelPair:
    """The bundled pair: where $BATON_DEMO_MODEL says, else in this repository.

    The draft is in the directory beside the target's whose name ends in "-draft".

    Raises:
        NoModel: it is not there.
    """
    if given := os.environ.get(DEMO_VARIABLE):
        return _pair_at(Path(given))
    for directory in Path(__file__).resolve().parents:
        if (directory / _IN_REPOSITORY).is_dir():
            return _pair_at(directory / _IN_REPOSITORY)
    raise NoModel(
        f"the bundled demo model was not found ({_IN_REPOSITORY} of the repository): name a model"
        f" with --model PATH, or set {DEMO_VARIABLE} to the demo model's directory"
    )


def is_demo(model_path: str) -> bool:
    """True for the bundled demo model."""
    try:
        return Path(model_path) == demo_pair().target
    except NoModel:
        return False


def model_directory(path: Path) -> Path:
    """The absolute path of a model directory in Hugging Face format.

    Raises:
        NoModel: it is none.
    """
    directory = path.expanduser().absolute()
    if not (directory / "config.json").is_file():
        raise NoModel(
            f"{directory} is no model directory: it must hold config.json, the weights as"
            " safetensors, and tokenizer.json"
        )
    return directory


def choose_models(model: str, draft: str) -> ModelPair:
    """What `--model` and `--draft` mean: empty takes the demo pair, "none" is no draft.

    Raises:
        NoModel: a directory is missing or holds no model.
    """
    if model:
        target = model_directory(Path(model))
        # Commas separate the models of a tokenizer.
        pair = ModelPair(target.name.replace(",", "-"), target, None)
    else:
        pair = demo_pair()
    if draft:
        return replace(pair, draft=None if draft == "none" else model_directory(Path(draft)))
    return pair


def _pair_at(path: Path) -> ModelPair:
    target = model_directory(path)
    draft = target.with_name(target.name + _DRAFT_SUFFIX)
    has_draft = (draft / "config.json").is_file()
    return ModelPair(target.name, target, draft if has_draft else None)
