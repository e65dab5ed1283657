"""Quantized models, on loading and from checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from baton.core.errors import InvalidRequest, Unsupported
from baton.engine.engine import Engine
from baton.engine.quantize import Quantization
from baton.engine.quantize_model import write_checkpoint
from tests.model.conftest import TinyModel
from tests.model.harness import Driver, make_engine, make_prompts, make_spec

SCHEMES = ("int8", "int8-dynamic", "int4")
PROMPTS = make_prompts([5, 40, 90])


def _write(model: Path, out: Path, scheme: str, *, has_lm_head: bool = False) -> Path:
    quantization = Quantization(scheme, group_size=32, has_lm_head=has_lm_head)
    write_checkpoint(str(model), str(out), quantization, lambda _fraction, _text: None)
    return out


def generate(engine: Engine, num_tokens: int) -> dict[str, list[int]]:
    """Greedy tokens of PROMPTS."""
    for index, prompt in enumerate(PROMPTS):
        engine.sequences.submit(make_spec(f"{index}/0", prompt, num_tokens))
    return Driver(engine).run()


def _settings(scheme: str) -> dict[str, object]:
    return {"quantization": scheme, "quantization_group_size": 32}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "mixtral", "gpt_oss"])
def test_a_checkpoint_gives_the_same_tokens_as_quantizing_on_loading(
    tiny_model: TinyModel, tmp_path: Path, kind: str, scheme: str
) -> None:
    plain = tiny_model(kind)
    saved = _write(plain, tmp_path / "out", scheme)
    with make_engine(plain) as engine:
        unrounded = generate(engine, 24)
        fingerprint = engine.fingerprint
    with make_engine(plain, **_settings(scheme)) as engine:
        on_loading = generate(engine, 24)
        assert fingerprint.weights_hash != engine.fingerprint.weights_hash
        assert fingerprint.differences(engine.fingerprint)
    with make_engine(saved) as engine:
        assert generate(engine, 24) == on_loading
        assert fingerprint.differences(engine.fingerprint)
    if scheme == "int4":
        assert on_loading != unrounded


def test_tied_and_untied_output_layers(tmp_path: Path, tiny_model: TinyModel) -> None:
    tied = _tie(tiny_model("llama"), tmp_path / "tied")
    for index, source in enumerate((tied, tiny_model("llama"))):
        saved = _write(source, tmp_path / str(index), "int8", has_lm_head=True)
        with make_engine(saved) as engine:
            from_disk = generate(engine, 8)
        with make_engine(source, quantization="int8", quantize_lm_head=True) as engine:
            assert generate(engine, 8) == from_disk


def _tie(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config["tie_word_embeddings"] = True
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return target


def test_a_checkpoint_is_smaller_and_holds_the_tokenizer(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    plain = tiny_model("llama")
    saved = _write(plain, tmp_path / "out", "int8")

    def num_bytes(directory: Path) -> int:
        return sum(path.stat().st_size for path in directory.glob("*.safetensors"))

    assert num_bytes(saved) < 0.55 * num_bytes(plain)
    assert (saved / "tokenizer.json").read_bytes() == (plain / "tokenizer.json").read_bytes()
    assert not list(saved.glob("*.index.json"))


def test_what_cannot_be_quantized_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    plain = tiny_model("llama")
    saved = _write(plain, tmp_path / "out", "int8")
    with pytest.raises(InvalidRequest, match="exists and is not empty"):
        _write(plain, saved, "int8")
    with pytest.raises(Unsupported, match="is quantized already"):
        _write(saved, tmp_path / "again", "int4")
    with (
        pytest.raises(Unsupported, match="quantized to int8: quantize the plain model otherwise"),
        make_engine(saved, quantization="int4"),
    ):
        pass
    with (
        pytest.raises(Unsupported, match="needs a CUDA device"),
        make_engine(plain, quantization="fp8", dtype="bfloat16"),
    ):
        pass
    with (
        pytest.raises(InvalidRequest, match="quantization must be one of"),
        make_engine(plain, quantization="int2"),
    ):
        pass


def test_a_damaged_checkpoint_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    saved = _write(tiny_model("llama"), tmp_path / "out", "int8")
    config = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = 2
    (saved / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(Unsupported, match="does not fit"), make_engine(saved):
        pass
