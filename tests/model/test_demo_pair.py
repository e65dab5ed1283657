"""The bundled pair is what its model card says, on a sample of the held-out files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

MODELS = Path(__file__).parents[2] / "deploy" / "models"
TARGET, DRAFT = MODELS / "demo", MODELS / "demo-draft"
MAX_PAIR_BYTES = 40_000_000
MIN_HELDOUT_FILES = 5


@pytest.fixture(scope="module")
def figures() -> dict[str, float]:
    """Run the committed evaluation on the first held-out files, in a process with one thread."""
    command = [sys.executable, str(MODELS / "recipe" / "evaluate.py"), "--max-files", "8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_enough_heldout_files_are_here_unchanged(figures: dict[str, float]) -> None:
    listed = json.loads((MODELS / "recipe" / "heldout.json").read_text(encoding="utf-8"))["files"]
    assert figures["num_files"] >= MIN_HELDOUT_FILES
    assert figures["num_files_left_out"] <= len(listed) - MIN_HELDOUT_FILES


def test_target_packs_heldout_code_better_than_xz(figures: dict[str, float]) -> None:
    assert figures["target_bits_per_byte"] < figures["xz_9_concatenated_bits_per_byte"]
    assert figures["target_bits_per_byte"] < figures["xz_9_each_file_bits_per_byte"]


def test_target_accepts_most_draft_tokens(figures: dict[str, float]) -> None:
    assert figures["agreement_on_heldout_text"] >= 0.55
    assert figures["agreement_on_greedy_text"] >= 0.55


def test_target_predicts_better_than_draft(figures: dict[str, float]) -> None:
    assert figures["target_bits_per_byte"] < figures["draft_bits_per_byte"]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_pair_shares_its_tokenizer_byte_for_byte(name: str) -> None:
    assert (TARGET / name).read_bytes() == (DRAFT / name).read_bytes()


def test_pair_is_small_enough_for_the_repository() -> None:
    files = [path for directory in (TARGET, DRAFT) for path in directory.iterdir()]
    assert sum(path.stat().st_size for path in files) <= MAX_PAIR_BYTES


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n        return x\r\n\t\n",
        "héllo 日本語 🎉‍👩 \u0000\u200b",
        "    \n \t  x  ",
        "12345.6e-7",
    ],
)
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(TARGET / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("directory", [TARGET, DRAFT])
def test_special_tokens_and_limits_agree_with_the_configuration(directory: Path) -> None:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    generation = json.loads((directory / "generation_config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["vocab_size"] == tokenizer.get_vocab_size()
    assert config["eos_token_id"] == tokenizer.token_to_id("<|endoftext|>")
    assert generation["eos_token_id"] == config["eos_token_id"]
    assert config["max_position_embeddings"] == 2048
