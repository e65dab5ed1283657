"""Put a trained model and its tokenizer into place, each file replaced at once."""

import argparse
import shutil
from pathlib import Path

PUBLISHED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
)


def publish(sources: list[Path], destination: Path) -> None:
    """Copy each published file from the first source that has it."""
    destination.mkdir(parents=True, exist_ok=True)
    for name in PUBLISHED:
        source = next(path / name for path in sources if (path / name).exists())
        part = destination / f"{name}.part"
        shutil.copyfile(source, part)
        part.replace(destination / name)


def main() -> None:
    """Publish one model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="work directory of train.py or distill.py")
    parser.add_argument("tokenizer", type=Path, help="directory with tokenizer.json")
    parser.add_argument("destination", type=Path, help="directory to serve from")
    arguments = parser.parse_args()
    publish([arguments.model, arguments.tokenizer], arguments.destination)


if __name__ == "__main__":
    main()
