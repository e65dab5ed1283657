"""What is refused, and why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from baton.core.errors import InvalidRequest, ModelNotFound, PromptTooLong, QueueFull, Unsupported
from baton.core.sampling import SamplingParams
from baton.engine.config import EngineConfig
from baton.engine.engine import Engine
from tests.model.conftest import TinyModel
from tests.model.harness import GREEDY, make_engine, make_spec
from tests.support.tiny_models import make_tiny_model


def _engine(directory: Path, **settings: object) -> Engine:
    return Engine(EngineConfig(str(directory), "tiny", num_blocks=4, **settings))  # type: ignore[arg-type]


def _write_config(directory: Path, **config: object) -> None:
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (directory / "model.safetensors").write_bytes(b"")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="does not exist"):
        _engine(tmp_path / "nowhere")
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        _engine(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(ModelNotFound, match=r"no .*safetensors"):
        _engine(tmp_path)


def test_random_weights_need_no_files(tmp_path: Path, tiny_model: TinyModel) -> None:
    config = (tiny_model("llama") / "config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    settings = {"random_weights": True, "dtype": "bfloat16"}
    with make_engine(tmp_path, **settings) as engine:
        module = engine._runner.model.module
        assert module.dtype is torch.bfloat16
        assert all(parameter.std() > 0 for parameter in module.parameters() if parameter.dim() > 1)
        engine.sequences.submit(make_spec("0", (1, 2, 3), 4))
        while engine.step():
            pass


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "mamba"}, "state-space"),
        ({"model_type": "bloom"}, "does not attend through transformers' AttentionInterface"),
        ({"model_type": "vit"}, "no causal language model"),
        ({"model_type": "whisper"}, "encoder-decoder"),
        ({"model_type": "rwkv"}, "state-space or recurrent"),
        ({"model_type": "jamba"}, "state-space or recurrent"),
        ({"model_type": "recurrent_gemma"}, "state-space or recurrent"),
        ({"model_type": "qwen3_next"}, "state-space or recurrent|linear_attention"),
        ({"model_type": "minimax"}, "layers of type linear_attention"),
        ({"model_type": "deepseek_v32"}, "layers of type indexed_attention"),
        (
            {"model_type": "llama4_text", "num_hidden_layers": 4},
            "layers of type chunked_attention",
        ),
    ],
)
def test_other_architectures_are_refused_with_the_reason(
    tmp_path: Path, config: dict[str, object], reason: str
) -> None:
    _write_config(tmp_path, **config)
    with pytest.raises(Unsupported, match=reason):
        _engine(tmp_path)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("bert", "attends in a way that a paged KV cache does not serve: its logits differ"),
        ("diffllama", "attends twice"),
    ],
)
def test_what_only_running_it_shows_is_refused_too(
    tiny_model: TinyModel, kind: str, reason: str
) -> None:
    with pytest.raises(Unsupported, match=reason):
        _engine(tiny_model(kind))


def test_a_draft_with_another_tokenizer_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    draft = make_tiny_model("llama", tmp_path)
    (draft / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(Unsupported, match="another tokenizer"):
        _engine(tiny_model("llama"), draft_model_path=str(draft))


def test_a_context_beyond_the_models_is_refused(tiny_model: TinyModel) -> None:
    with pytest.raises(InvalidRequest, match="exceeds the model's 2048"):
        _engine(tiny_model("llama"), max_model_len_tokens=4096)


def test_fingerprints_tell_models_apart(tiny_model: TinyModel) -> None:
    with (
        make_engine(tiny_model("llama")) as one,
        make_engine(tiny_model("llama", seed=9)) as other,
        make_engine(tiny_model("llama"), dtype="bfloat16") as rounded,
    ):
        assert one.fingerprint.layout.num_layers == 3
        (difference,) = one.fingerprint.differences(other.fingerprint)
        assert difference.startswith("weights")
        (difference,) = one.fingerprint.differences(rounded.fingerprint)
        assert difference == "dtype: float32 != bfloat16"
        assert one.eos_token_ids == {256}
        assert rounded.fingerprint.layout.dtype == "bfloat16"


def test_requests_that_can_never_run_are_refused(tiny_model: TinyModel) -> None:
    with make_engine(tiny_model("llama"), num_blocks=4, max_num_waiting=2) as engine:
        assert engine.max_model_len_tokens == 64
        assert engine.sequences.resolve_max_tokens(60, GREEDY) == 4
        with pytest.raises(PromptTooLong, match="shorten"):
            engine.sequences.resolve_max_tokens(64, GREEDY)
        with pytest.raises(PromptTooLong, match="at most 4"):
            engine.sequences.resolve_max_tokens(60, SamplingParams(max_tokens=5))
        with pytest.raises(PromptTooLong):
            engine.sequences.submit(make_spec("a", [1] * 60, 5))
        with pytest.raises(InvalidRequest, match="empty"):
            engine.sequences.submit(make_spec("a", [], 5))
        with pytest.raises(InvalidRequest, match=r"\[0, 320\), got 1 to 320"):
            engine.sequences.check_tokens(make_spec("a", [1, 320], 1))
        with pytest.raises(InvalidRequest, match="seed"):
            engine.sequences.submit(make_spec("a", [1], 5, sampling=SamplingParams()))
        engine.sequences.submit(make_spec("a", [1], 5))
        with pytest.raises(InvalidRequest, match="exists already"):
            engine.sequences.submit(make_spec("a", [1], 5))
        engine.sequences.submit(make_spec("b", [1], 5))
        with pytest.raises(QueueFull) as caught:
            engine.sequences.submit(make_spec("c", [1], 5))
        assert caught.value.retry_after_s


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss"])
def test_bfloat16_runs(tiny_model: TinyModel, kind: str) -> None:
    with make_engine(tiny_model(kind), dtype="bfloat16") as engine:
        engine.sequences.submit(make_spec("a", list(range(40)), 8))
        while engine.step():
            pass
        assert engine.stats().counters["output_tokens"] == 8
    assert torch.get_default_dtype() == torch.float32
