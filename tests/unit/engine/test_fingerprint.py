from __future__ import annotations

from pathlib import Path

from baton.engine.fingerprint import config_hash, tokenizer_hash, weights_hash


def test_the_config_hash_covers_what_decides_kv() -> None:
    base = {"rope_theta": 1e4, "hidden_size": 64, "use_cache": True, "_name_or_path": "x"}
    assert config_hash(base) == config_hash({**base, "use_cache": False, "_name_or_path": "y"})
    assert config_hash(base) != config_hash({**base, "rope_theta": 1e6})
    assert len(config_hash(base)) == 16


def test_the_weights_hash_notices_a_change_in_any_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(bytes(300_000))
    first = weights_hash(tmp_path)
    assert first == weights_hash(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(bytes(299_999) + b"\x01")
    second = weights_hash(tmp_path)
    assert second != first
    (tmp_path / "b.safetensors").rename(tmp_path / "c.safetensors")
    assert weights_hash(tmp_path) != second


def test_a_missing_tokenizer_has_no_hash(tmp_path: Path) -> None:
    assert tokenizer_hash(tmp_path) == ""
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert len(tokenizer_hash(tmp_path)) == 16
