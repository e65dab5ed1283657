from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from baton.engine.graphs import CudaCapture


class Stream:
    def wait_stream(self, stream: object) -> None:
        pass


class Streams:
    """Stands in for what torch.cuda knows about the current stream."""

    def __init__(self) -> None:
        self.default = Stream()
        self.current: object = self.default

    @contextmanager
    def use(self, stream: object) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, *_: object, stream: object, **__: object) -> Iterator[None]:
        """As torch 2.13: ending a capture that failed raises before the stream is put back."""
        self.current = stream
        yield
        raise RuntimeError("operation failed due to a previous error during capture")


def test_a_capture_that_fails_leaves_the_current_stream_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streams = Streams()
    for name, value in {
        "Stream": lambda _: Stream(),
        "current_stream": lambda _: streams.current,
        "stream": streams.use,
        "graph": streams.graph,
        "CUDAGraph": lambda: None,
        "graph_pool_handle": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    seen: list[object] = []
    with pytest.raises(RuntimeError, match="during capture"):
        CudaCapture(torch.device("cpu"))(lambda: seen.append(streams.current))
    assert len(seen) == 2
    assert streams.default not in seen
    assert streams.current is streams.default
