"""Text to token ids and back, by whichever tokenizer answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from baton.core.errors import DeadlineExceeded, NoWorker, WorkerDraining
from baton.core.prompt import TextPrompt
from baton.scheduler.peers import Peers
from baton.scheduler.view import ClusterWatch
from baton.wire.tokenizer import TokenizerCaller

AnswerT = TypeVar("AnswerT")


class Encoder:
    """Asks tokenizers; when one is lost, another."""

    def __init__(self, cluster: ClusterWatch, peers: Peers, timeout_s: float) -> None:
        self._cluster = cluster
        self._peers = peers
        self._timeout_s = timeout_s
        """Bound on one answer."""

    async def encode(self, model: str, prompt: TextPrompt, timeout_s: float) -> tuple[int, ...]:
        """Token ids of a text or a conversation.

        Raises:
            NoWorker: no tokenizer answered.
            BatonError: the tokenizer refused the prompt.
        """
        bound_s = min(timeout_s, self._timeout_s)
        encoded = await self._ask(model, lambda peer: peer.encode(model, prompt, bound_s))
        return encoded.token_ids

    async def decode(self, model: str, token_ids: Sequence[int], timeout_s: float) -> str:
        """Text of token ids; raises as `encode` does."""
        bound_s = min(timeout_s, self._timeout_s)
        return await self._ask(model, lambda peer: peer.decode_text(model, token_ids, bound_s))

    async def _ask(
        self, model: str, question: Callable[[TokenizerCaller], Awaitable[AnswerT]]
    ) -> AnswerT:
        avoid: set[str] = set()
        while True:
            tokenizer = self._cluster.tokenizer(model, frozenset(avoid))
            address = tokenizer.status.address
            if address in avoid:
                raise NoWorker("no tokenizer could be reached", retry_after_s=1.0)
            try:
                return await question(self._peers.tokenizer(address))
            except (NoWorker, DeadlineExceeded, WorkerDraining):
                self._cluster.suspect(tokenizer.worker_id)
                avoid.add(address)
