"""The varlen backend with a kernel in plain operators: tables, windows, and who gets it."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import varlen as torch_varlen

from baton.core.errors import InvalidRequest, Unsupported
from baton.engine import backends
from baton.engine.attention import AttentionOptions, LayerShape
from baton.engine.devices import check_device, default_block_size
from baton.engine.ragged import AttentionBatch, RowSpan
from baton.engine.sdpa import SdpaBackend
from baton.engine.varlen import VarlenBackend, find_kernel, why_not
from tests.support import varlen

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
BLOCK_SIZE = 256
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 6, 2, 8
SHAPES = [
    [(7, 1), (300, 1), (255, 1), (256, 1)],
    [(0, 30), (5, 1), (0, 3), (9, 3), (250, 40), (511, 2)],
]


def _rows(shapes: list[tuple[int, int]]) -> list[RowSpan]:
    blocks = torch.randperm(24, generator=torch.Generator().manual_seed(3)).tolist()
    rows = []
    for start, num_tokens in shapes:
        # One block more than is needed: room for output.
        count = -(-(start + num_tokens) // BLOCK_SIZE) + 1
        rows.append(RowSpan(start, num_tokens, [blocks.pop() for _ in range(count)]))
    return sorted(rows, key=lambda row: row.sort_key)


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("window", [None, 1, 5, 256, 4096])
def test_equals_sdpa(shapes: list[tuple[int, int]], window: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    pool = [
        torch.randn(24, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, generator=generator) for _ in range(2)
    ]
    rows = _rows(shapes)
    num_tokens = sum(row.num_tokens for row in rows)
    query = torch.randn(num_tokens, NUM_HEADS, HEAD_DIM, generator=generator)
    batch = AttentionBatch(rows, BLOCK_SIZE, CPU)
    options = AttentionOptions(scaling=0.3, window=window)
    expected = SdpaBackend().attend(query, pool[0], pool[1], batch, options)
    output = VarlenBackend(varlen.varlen_attn).attend(query, pool[0], pool[1], batch, options)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_tables_are_made_once_for_all_layers() -> None:
    batch = AttentionBatch(_rows(SHAPES[1]), BLOCK_SIZE, CPU)
    rows = batch.paged_rows
    assert rows is batch.paged_rows
    assert rows.query_starts.tolist() == [0, 1, 3, 6, 9, 39, 79]
    assert rows.context_lens.tolist() == [6, 513, 12, 3, 30, 290]
    assert rows.context_starts.tolist() == [0, 6, 519, 531, 534, 564, 854]
    assert rows.block_table.shape == (6, 3), "headroom is left out"
    assert (rows.max_num_queries, rows.max_context_len) == (40, 513)


def test_the_stand_in_has_the_signature_of_the_kernel() -> None:
    def parameters(function: Callable[..., object]) -> list[tuple[str, object, object]]:
        signature = inspect.signature(function)
        return [(p.name, p.kind, p.default) for p in signature.parameters.values()]

    assert parameters(varlen.varlen_attn) == parameters(torch_varlen.varlen_attn)


def test_the_kernel_of_torch_takes_the_arguments() -> None:
    """On tensors without content: what the operator's schema and shapes allow."""
    meta = torch.device("meta")
    pool = torch.empty(24, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=meta)
    query = torch.empty(79, NUM_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=meta)
    batch = AttentionBatch(_rows(SHAPES[1]), BLOCK_SIZE, meta)
    backend = VarlenBackend(torch_varlen.varlen_attn)
    for window in (None, 5):
        with torch.inference_mode():
            output = backend.attend(query, pool, pool, batch, AttentionOptions(0.3, window))
        assert (output.shape, output.dtype) == (query.shape, query.dtype)


@pytest.mark.parametrize(
    ("device", "dtype", "block_size", "message"),
    [
        (CPU, torch.bfloat16, 256, "needs a CUDA device, this is cpu"),
        (CUDA, torch.float32, 256, "bfloat16 or float16, not in float32"),
        (CUDA, torch.bfloat16, 16, "multiple of 256 as block_size, not 16"),
        (CUDA, torch.bfloat16, 256, "capability 8.0, this device has 7.5"),
    ],
)
def test_the_reason_against_a_kernel_is_said(
    device: torch.device,
    dtype: torch.dtype,
    block_size: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (7, 5))
    with pytest.raises(Unsupported, match=message):
        find_kernel(device, dtype, block_size)


def test_a_device_that_can_gets_the_kernel_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    assert find_kernel(CUDA, torch.float16, 512) is torch_varlen.varlen_attn


def test_an_older_torch_is_told_from_the_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    def older(query: object, *, scale: float, seqused_k: object, window_size: object) -> None: ...

    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch_varlen, "varlen_attn", older)
    with pytest.raises(Unsupported, match="without paged KV"):
        find_kernel(CUDA, torch.bfloat16, 256)


def test_layers_that_the_kernel_cannot_compute_get_sdpa(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backends, "find_kernel", lambda *_: varlen.varlen_attn)
    shapes = [
        LayerShape(2, 64),
        LayerShape(2, 64, has_softcap=True),
        LayerShape(2, 64, has_sinks=True),
        LayerShape(2, 20),
        LayerShape(2, 512),
        LayerShape(2, 256),
    ]
    with caplog.at_level(logging.INFO):
        chosen = backends.choose_backends(shapes, CUDA, torch.bfloat16, 256)
    assert [chosen[layer].name for layer in range(6)] == [
        "varlen",
        "sdpa",
        "sdpa",
        "sdpa",
        "sdpa",
        "varlen",
    ]
    assert "varlen for 2 of 6 layers" in caplog.text
    for shape in shapes[1:5]:
        assert f"sdpa for 1 layers; not varlen: {why_not(shape)}" in caplog.text


def test_a_model_that_cannot_use_it_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        chosen = backends.choose_backends([LayerShape(2, 64)] * 2, CUDA, torch.float32, 256)
    assert [chosen[layer].name for layer in range(2)] == ["sdpa", "sdpa"]
    assert "attention: sdpa; not varlen: it computes in bfloat16 or float16" in caplog.text


def test_a_device_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_device("cpu") == CPU
    with pytest.raises(InvalidRequest, match="'gpu' is not a device"):
        check_device("gpu")
    with pytest.raises(Unsupported, match="device meta is not supported"):
        check_device("meta")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(Unsupported, match="no CUDA device; use cpu"):
        check_device("cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
    assert check_device("cuda") == torch.device("cuda:1")
    with pytest.raises(Unsupported, match="cuda:2: this machine has 2 CUDA devices"):
        check_device("cuda:2")


def test_blocks_are_as_large_as_the_kernel_needs() -> None:
    assert default_block_size(CPU) == 16
    assert default_block_size(CUDA) % varlen.PAGE_MULTIPLE == 0
