"""What a worker is told reaches its engine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from baton.decode.settings import DecodeSettings
from baton.prefill.settings import PrefillSettings
from baton.worker.settings import WorkerSettings

SHARED = {
    "model_name": "a-name",
    "device": "cuda:1",
    "dtype": "bfloat16",
    "kv_dtype": "int8",
    "num_blocks": 7,
    "block_size": 32,
    "max_model_len_tokens": 99,
    "max_num_batched_tokens": 77,
    "max_num_seqs": 9,
    "num_threads": 3,
    "prepack_linears": False,
    "quantization": "int4",
    "quantization_group_size": 128,
    "quantize_lm_head": True,
}


@pytest.mark.parametrize(
    ("cls", "own"),
    [
        (PrefillSettings, {"layer_group_bytes": 5}),
        (
            DecodeSettings,
            {
                "cuda_graphs": False,
                "draft_model_path": Path("draft"),
                "speculation": True,
                "num_draft_tokens": 3,
                "adaptive_drafts": False,
            },
        ),
    ],
)
def test_the_engine_is_told_what_the_worker_was(
    cls: type[WorkerSettings], own: dict[str, Any]
) -> None:
    config = asdict(cls(model_path=Path("model"), **SHARED, **own).engine_config())
    told = {"model_path": "model", **SHARED, **own}
    if "draft_model_path" in own:
        told["draft_model_path"] = "draft"
    assert {name: config[name] for name in told} == told
    # What was left out of `told` above would go unnoticed: the sizes of which only one may be set.
    assert set(cls.model_fields) & set(config) - set(told) == {"kv_bytes", "kv_share"}


def test_sizes_names_and_threads_have_defaults_of_their_own() -> None:
    folder = Path("some/model")
    config = PrefillSettings(model_path=folder, kv_share=0.5, cores="0-2").engine_config()
    assert (config.model_name, config.kv_share, config.num_threads) == ("model", 0.5, 3)
    assert not config.cuda_graphs
    config = DecodeSettings(model_path=folder, kv_bytes=1 << 20).engine_config()
    assert (config.kv_bytes, config.num_threads, config.draft_model_path) == (1 << 20, None, None)
