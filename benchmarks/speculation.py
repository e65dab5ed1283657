"""Speculative decoding on the demo pair: acceptance, tokens per step and speed on held-out text.

    python -m benchmarks.speculation
    python -m benchmarks.speculation --batch 16 --num-draft-tokens 8 --json

Prompts are beginnings of modules that neither model was trained on; outputs are greedy and must be
the same in every row. All variants take turns, so compare within one table.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass

from tokenizers import Tokenizer

from baton.core.sampling import DraftSource, SamplingParams
from baton.core.sequence import SequenceSpec
from baton.engine.config import EngineConfig
from baton.engine.engine import Engine
from baton.engine.events import Tokens
from benchmarks.quantization.perplexity import DEMO, heldout_texts

VARIANTS: dict[str, tuple[bool, DraftSource | None, bool]] = {
    "off": (False, None, False),
    "draft model, fixed": (True, DraftSource.MODEL, False),
    "draft model, adaptive": (True, DraftSource.MODEL, True),
    "n-gram lookup, fixed": (True, DraftSource.NGRAM, False),
    "n-gram lookup, adaptive": (True, DraftSource.NGRAM, True),
}
PROMPT_TOKENS = 256


@dataclass(slots=True)
class Row:
    """One variant."""

    name: str
    output_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    sequence_steps: int = 0
    """Steps times the sequences in them: what gave at least one token each."""
    seconds: float = 0.0

    @property
    def acceptance(self) -> float:
        """Share of drafts accepted."""
        return self.accepted_tokens / max(1, self.draft_tokens)

    @property
    def tokens_per_step(self) -> float:
        """Tokens of a sequence per step."""
        return self.output_tokens / max(1, self.sequence_steps)

    @property
    def tokens_per_s(self) -> float:
        """Of the whole batch."""
        return self.output_tokens / self.seconds


class Bench:
    """One engine per variant, so that each measures its own costs."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
        self._prompts = [
            tuple(tokenizer.encode(text).ids[:PROMPT_TOKENS])
            for text in heldout_texts(options.batch * options.rounds)
        ]
        self.rows = {name: Row(name) for name in VARIANTS}
        self._engines = {
            name: Engine(
                EngineConfig(
                    str(DEMO),
                    "demo",
                    dtype="float32",
                    num_blocks=64 * (options.batch + 1),
                    num_threads=options.threads,
                    draft_model_path=str(DEMO) + "-draft",
                    num_draft_tokens=options.num_draft_tokens,
                    adaptive_drafts=is_adaptive,
                )
            )
            for name, (_, _, is_adaptive) in VARIANTS.items()
        }

    def run(self) -> None:
        """All variants by turns; raises ValueError if their outputs differ."""
        size = self._options.batch
        for start in range(0, len(self._prompts), size):
            outputs = {}
            for name in VARIANTS:
                outputs[name] = self._round(name, self._prompts[start : start + size], start)
                sys.stderr.write(f"  {start + size} prompts: {name}\n")
            if len(set(map(repr, outputs.values()))) > 1:
                raise ValueError("outputs differ between variants")

    def _round(self, name: str, prompts: list[tuple[int, ...]], start: int) -> dict[str, list[int]]:
        speculation, source, _ = VARIANTS[name]
        engine, row = self._engines[name], self.rows[name]
        sampling = SamplingParams(
            temperature=0.0, ignore_eos=True, speculation=speculation, draft_source=source
        )
        for index, prompt in enumerate(prompts):
            engine.sequences.submit(
                SequenceSpec(str(start + index), prompt, sampling, self._options.max_tokens)
            )
        output: dict[str, list[int]] = {}
        started_at_s = 0.0
        while engine.step():
            for event in engine.drain_events():
                if not isinstance(event, Tokens):
                    continue
                # Prompts are not measured: the first token ends one.
                if output.setdefault(event.seq_id, []):
                    row.output_tokens += len(event.token_ids)
                    row.sequence_steps += 1
                    row.draft_tokens += event.draft_tokens
                    row.accepted_tokens += event.accepted_tokens
                output[event.seq_id].extend(event.token_ids)
            if not started_at_s and len(output) == len(prompts):
                started_at_s = time.perf_counter()
        row.seconds += time.perf_counter() - started_at_s
        return output


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speculation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch", type=int, default=1, help="sequences at once")
    parser.add_argument("--rounds", type=int, default=8, help="batches per variant")
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens of each output")
    parser.add_argument("--num-draft-tokens", type=int, default=4, help="most drafts per step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="also print one line of JSON, last")
    options = parser.parse_args(argv)
    bench = Bench(options)
    bench.run()
    head = (
        f"{'variant':<26}{'acceptance':>11}{'tokens/step':>13}{'drafts/step':>13}{'tokens/s':>10}"
    )
    lines, found = [head], []
    for row in bench.rows.values():
        drafts = row.draft_tokens / max(1, row.sequence_steps)
        lines.append(
            f"{row.name:<26}{row.acceptance:>11.1%}{row.tokens_per_step:>13.2f}{drafts:>13.2f}"
            f"{row.tokens_per_s:>10.1f}"
        )
        found.append({**asdict(row), "tokens_per_s": row.tokens_per_s})
    if options.json:
        lines.append(json.dumps({"batch": options.batch, "variants": found}))
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
