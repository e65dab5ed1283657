from __future__ import annotations

import pytest

from baton.core.errors import InvalidRequest
from baton.engine.config import EngineConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of auto"),
        ({"num_blocks": 1, "kv_bytes": 1}, "not several"),
        ({"kv_bytes": 1, "kv_share": 0.5}, "not several"),
        ({"kv_share": 1.0}, "kv_share must be between 0 and 1, got 1.0"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"headroom_tokens": -1}, "headroom_tokens must be at least 0"),
        ({"max_num_seqs": 513}, "must be at least max_num_seqs"),
    ],
)
def test_a_bad_value_is_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        EngineConfig("path", "name", **settings)  # type: ignore[arg-type]
