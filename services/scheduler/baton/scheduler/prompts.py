"""Prompts: to token ids by a tokenizer, and to what a model can take."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from random import Random
from typing import TypeVar

from baton.core.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NoWorker,
    PromptTooLong,
    WorkerDraining,
)
from baton.core.prompt import TextPrompt
from baton.scheduler.live import AcceptedRequest
from baton.scheduler.peer_calls import Peers
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


_SEED_BITS = 63


async def tokenized(asked: AcceptedRequest, encoder: Encoder, timeout_s: float) -> AcceptedRequest:
    """The request with its prompt's token ids.

    Raises:
        InvalidRequest: the prompt has no token.
        BatonError: no tokenizer answered, or it refused the prompt.
    """
    prompt = asked.job.prompt
    if not isinstance(prompt, tuple):
        prompt = await encoder.encode(asked.model, prompt, timeout_s)
    if not prompt:
        raise InvalidRequest("the prompt is empty; it must have at least one token")
    return replace(asked, prompt_ids=prompt)


def completed(asked: AcceptedRequest, limit: int, rng: Random) -> AcceptedRequest:
    """The tokenized request with a seed and the most tokens that it may produce.

    `limit` is how many tokens of prompt and output the model takes; 0 when no worker says.

    Raises:
        PromptTooLong: prompt and output do not fit the limit.
        InvalidRequest: the output that it resumes has all its tokens.
    """
    seed = asked.job.sampling.seed
    max_tokens = _max_tokens(asked, limit) if limit else asked.job.sampling.max_tokens
    if max_tokens is not None and len(asked.job.received_ids) >= max_tokens:
        raise InvalidRequest("resume has max_tokens tokens: nothing is left to produce")
    seed = rng.getrandbits(_SEED_BITS) if seed is None else seed
    return replace(asked, sampling=replace(asked.job.sampling, max_tokens=max_tokens, seed=seed))


def _max_tokens(asked: AcceptedRequest, limit: int) -> int:
    wanted = asked.job.sampling.max_tokens
    num_prompt = len(asked.prompt_ids)
    room = limit - num_prompt
    if room < 1:
        raise PromptTooLong(
            f"the prompt has {num_prompt} tokens and model {asked.model!r} takes {limit},"
            f" output included; shorten the prompt by at least {1 - room} tokens"
        )
    if wanted is not None and wanted > room:
        raise PromptTooLong(
            f"the prompt's {num_prompt} tokens and max_tokens {wanted} exceed the {limit}"
            f" that model {asked.model!r} takes; lower max_tokens to at most {room}"
        )
    return room if wanted is None else wanted
