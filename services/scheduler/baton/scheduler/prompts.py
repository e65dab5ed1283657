"""Tokenizes a request's prompt and fills in what depends on its length."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from baton.core.errors import InvalidRequest, PromptTooLong
from baton.scheduler.encoder import Encoder
from baton.scheduler.live import AcceptedRequest
from baton.scheduler.view import ClusterWatch

_SEED_BITS = 63


class Prompts:
    """Makes accepted requests complete."""

    def __init__(self, cluster: ClusterWatch, encoder: Encoder, rng: Random) -> None:
        self._cluster = cluster
        self._encoder = encoder
        self._rng = rng

    async def tokenized(self, asked: AcceptedRequest, timeout_s: float) -> AcceptedRequest:
        """The request with its prompt's token ids.

        Raises:
            InvalidRequest: the prompt has no token.
            BatonError: no tokenizer answered, or it refused the prompt.
        """
        prompt = asked.job.prompt
        if not isinstance(prompt, tuple):
            prompt = await self._encoder.encode(asked.model, prompt, timeout_s)
        if not prompt:
            raise InvalidRequest("the prompt is empty; it must have at least one token")
        return replace(asked, prompt_ids=prompt)

    def completed(self, asked: AcceptedRequest) -> AcceptedRequest:
        """The tokenized request with a seed and the most tokens that it may produce.

        Raises:
            PromptTooLong: prompt and output do not fit the model's context.
            InvalidRequest: the output that it resumes has all its tokens.
        """
        seed = asked.job.sampling.seed
        max_tokens = self._max_tokens(asked)
        if max_tokens is not None and len(asked.job.received_ids) >= max_tokens:
            raise InvalidRequest("resume has max_tokens tokens: nothing is left to produce")
        sampling = replace(
            asked.job.sampling,
            max_tokens=max_tokens,
            seed=self._rng.getrandbits(_SEED_BITS) if seed is None else seed,
        )
        return replace(asked, sampling=sampling)

    def _max_tokens(self, asked: AcceptedRequest) -> int | None:
        """Most tokens to produce, None when no worker says how many it takes."""
        limit = self._cluster.max_model_len_tokens(asked.model)
        wanted = asked.job.sampling.max_tokens
        num_prompt = len(asked.prompt_ids)
        if not limit:
            return wanted
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
