"""The tokenizer's process: loads vocabularies, serves them, counts."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from baton.rpc.runtime import Runtime, ServiceSnapshot
from baton.tokenizer.settings import TokenizerSettings, parse_models
from baton.tokenizer.tokenizer import LocalTokenizer
from baton.tokenizer.vocabulary import Vocabularies, Vocabulary
from baton.wire.tokenizer import add_tokenizer


class TokenizerService:
    """Implements rpc.runtime.Service."""

    def __init__(self, runtime: Runtime[TokenizerSettings]) -> None:
        settings = runtime.settings
        self._models = parse_models(settings.models)
        if not self._models:
            raise RuntimeError("set --models (or BATON_TOKENIZER_MODELS) to a model's directory")
        self._runtime = runtime
        self._executor = ThreadPoolExecutor(settings.encode_threads, "encode")
        self._vocabularies = Vocabularies()
        self._tokenizer = LocalTokenizer(
            self._vocabularies, settings, self._executor, runtime.metrics
        )

    def register(self, server: Any) -> list[str]:
        """Serves the tokenizer; returns the names of the gRPC services."""
        return [add_tokenizer(server, self._tokenizer)]

    async def start(self) -> None:
        """Reads the vocabularies.

        Raises:
            InvalidRequest: a directory has no usable tokenizer.
        """
        for index, (name, directory) in enumerate(self._models.items()):
            self._runtime.report_progress(index / len(self._models), f"reading {name}")
            vocabulary = await asyncio.to_thread(Vocabulary, name, directory)
            self._vocabularies.add(vocabulary)

    def snapshot(self) -> ServiceSnapshot:
        """The models' names; a tokenizer has no load worth placing by."""
        names = [vocabulary.name for vocabulary in self._vocabularies]
        return ServiceSnapshot(models=tuple(names))

    async def drain(self, grace_s: float) -> None:
        """Nothing to do: the server lets running calls end."""

    async def stop(self) -> None:
        """Ends the encoding threads."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def kv_snapshot(self) -> tuple[int, list[bytes]]:
        """No KV here."""
        return 0, []
