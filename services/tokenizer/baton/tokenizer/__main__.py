"""Runs the tokenizer service: `python -m baton.tokenizer --models PATH`."""

from __future__ import annotations

import os

from baton.rpc.process import main
from baton.tokenizer.service import TokenizerService
from baton.tokenizer.settings import TokenizerSettings

if __name__ == "__main__":
    # Texts are encoded one at a time, each on a thread of ours: the library's own pool would only
    # take cores from the workers.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(TokenizerSettings, TokenizerService)
