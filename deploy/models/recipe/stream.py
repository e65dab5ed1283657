"""An endless, seeded stream of training tokens: shuffled documents, cut in shuffled windows."""

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import corpus
import torch
from tokenizer import END_ID
from transformers import PreTrainedTokenizerFast

NON_TEST_REPEATS = 3
"""How often an epoch shows a file that is not a test; tests, two thirds of the text, come once."""
CHAT_ONE_IN = 2
POOL_TOKENS = 2**20
"""Windows are shuffled among this many tokens, so that a batch shows many files and not one."""


def load_documents(tokenizer_dir: Path) -> list[list[int]]:
    """Tokenize one epoch: the training files, some more than once, and the chats made from them."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    files = corpus.split(corpus.stdlib_files()).train
    chats = [
        str(tokenizer.apply_chat_template(chat, tokenize=False))
        for chat in corpus.chat_examples(files)[::CHAT_ONE_IN]
    ]
    documents = []
    for file, ids in zip(files, _encode(tokenizer, [file.text for file in files]), strict=True):
        documents += [ids] * (1 if file.is_test else NON_TEST_REPEATS)
    return documents + _encode(tokenizer, chats)


def _encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    return [[END_ID, *encoding.ids] for encoding in tokenizer.backend_tokenizer.encode_batch(texts)]


class TokenStream:
    """Batches of shuffled windows; `position` lets a checkpoint resume at nearly the same text."""

    def __init__(self, documents: list[list[int]], seed: int, position: int = 0) -> None:
        """Start `position` tokens into the stream that `seed` determines."""
        self.position = position
        self.epoch_tokens = sum(map(len, documents))
        """Tokens in one pass over the documents."""
        self._tokens = self._endless(documents, seed)
        next(islice(self._tokens, position, position), None)
        self._shuffler = torch.Generator().manual_seed(seed + position)
        self._pool = torch.empty(0, 1, dtype=torch.int64)

    def next_batch(self, num_tokens: int, context: int) -> torch.Tensor:
        """Return the next tokens as int64 `[num_tokens // context, context]`."""
        num_rows = num_tokens // context
        if self._pool.shape[1] != context or len(self._pool) < num_rows:
            windows = torch.tensor(list(islice(self._tokens, POOL_TOKENS))).view(-1, context)
            self._pool = windows[torch.randperm(len(windows), generator=self._shuffler)]
        batch, self._pool = self._pool[:num_rows], self._pool[num_rows:]
        self.position += num_tokens
        return batch

    @staticmethod
    def _endless(documents: list[list[int]], seed: int) -> Iterator[int]:
        order = list(range(len(documents)))
        shuffler = random.Random(seed)
        while True:
            shuffler.shuffle(order)
            for index in order:
                yield from documents[index]
