"""The engine: one model, its KV, and the sequences that it computes.

`Engine` may be called from any thread, but for `step`, which belongs to one thread. Its lock is
held while planning and updating, never while a model runs or KV bytes are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from baton.core.blocks import BlockPool
from baton.core.errors import BatonError, InvalidRequest, Unsupported
from baton.core.hashing import Fingerprint, block_hashes, root_hash
from baton.core.sequence import SequenceSpec, SequenceStatus
from baton.engine.config import EngineConfig, OnProgress
from baton.engine.devices import use_threads
from baton.engine.drafts import DraftModel, Drafts
from baton.engine.events import EngineEvent, EngineStats, KvChange
from baton.engine.fingerprint import make_fingerprint, tokenizer_hash
from baton.engine.grammar import Grammars
from baton.engine.kv_cache import choose_num_blocks, dtype_name
from baton.engine.model import LoadedModel, load_model
from baton.engine.quantize import Quantization
from baton.engine.runner import ModelRunner
from baton.engine.sampler import Sampler
from baton.engine.sequences import Sequences
from baton.engine.state import EngineState
from baton.engine.steps import StepLoop
from baton.engine.transfer import Transfer


class Engine:
    """Loads what `config` names, and serves it.

    Sequences come and go through `sequences`, KV bytes through `transfer`; `grammars` compiles
    guides.

    Raises:
        ModelNotFound, Unsupported, InvalidRequest: it cannot be served; the message says why.
    """

    def __init__(self, config: EngineConfig, on_progress: OnProgress | None = None) -> None:
        use_threads(config.num_threads)
        report: OnProgress = on_progress or (lambda _fraction, _text: None)
        model = self._load(config.model_path, config, report, 0.0, 0.8)
        draft = None
        if config.draft_model_path is not None:
            draft = self._load(config.draft_model_path, config, report, 0.8, 0.15)
            _check_pair(model, draft)
        report(0.95, "allocating KV blocks")
        block_bytes = model.layout.block_bytes + (draft.layout.block_bytes if draft else 0)
        num_blocks = choose_num_blocks(
            block_bytes, config.num_blocks, config.kv_bytes, model.device, config.kv_share
        )
        self.config = config
        self.vocab_size = model.vocab_size
        self.eos_token_ids = model.eos_token_ids
        self.max_model_len_tokens = _max_model_len(config, model, num_blocks)
        settings = model.config.to_dict()
        if model.layout.dtype == "int8":
            # Else rounding would hide what the KV was computed in.
            settings["kv_computed_in"] = dtype_name(model.module.dtype)
        self.fingerprint: Fingerprint = make_fingerprint(
            config.model_name, model.directory, settings, model.layout
        )
        pool = BlockPool(num_blocks, model.layout.block_size)
        self._digest = self.fingerprint.digest()
        self._state = EngineState(
            config,
            pool,
            self._digest,
            vocab_size=self.vocab_size,
            eos_token_ids=self.eos_token_ids,
        )
        for backend, num_layers in model.attention.num_layers_by_backend().items():
            self._state.counters[f"{backend}_layers"] = num_layers
        self._runner = ModelRunner(model, num_blocks)
        self._draft_runner = ModelRunner(draft, num_blocks) if draft else None
        if config.cuda_graphs:
            report(0.97, "capturing decode steps")
            for runner in filter(None, (self._runner, self._draft_runner)):
                runner.capture(config.max_num_seqs, self.max_model_len_tokens)
        sampler = Sampler(self.vocab_size, model.device)
        drafter = (
            DraftModel(self._draft_runner, sampler, self._state) if self._draft_runner else None
        )
        self._steps = StepLoop(self._state, self._runner, Drafts(config, drafter), sampler)
        self.grammars = Grammars(
            model.directory, vocab_size=self.vocab_size, eos_token_ids=self.eos_token_ids
        )
        self.sequences = Sequences(
            self._state, self.grammars, max_model_len_tokens=self.max_model_len_tokens
        )
        self.transfer = Transfer(self._state, self._runner.kv)
        self._num_kv_changes = 0
        block_size = model.layout.block_size
        report(1.0, f"{config.model_name}: {num_blocks} KV blocks of {block_size} tokens")

    # The prefix cache.

    def block_hashes(self, spec: SequenceSpec, output_ids: Sequence[int] = ()) -> list[bytes]:
        """Chained hashes of the full blocks of a prompt and its output. Needs no lock."""
        known = self._state.prompt_hashes(spec)
        token_ids = (*spec.token_ids, *output_ids) if output_ids else ()
        root = root_hash(self._digest, spec.cache_salt)
        block_size = self.fingerprint.layout.block_size
        return [*known, *block_hashes(root, token_ids, block_size, known)]

    def match_prefix(self, hashes: Sequence[bytes]) -> int:
        """How many of the leading `hashes` have their blocks here."""
        with self._state.lock:
            return len(self._state.pool.match(hashes))

    @property
    def num_kv_blocks(self) -> int:
        """Blocks in the pool, in whatever state."""
        return self._state.pool.num_blocks

    def kv_counts(self) -> dict[str, int]:
        """Blocks by lower-case state name; they sum to all blocks."""
        with self._state.lock:
            return self._state.pool.counts()

    def kv_snapshot(self) -> tuple[int, list[bytes]]:
        """Number of the last change drained, and all hashes; later changes apply on top."""
        with self._state.lock:
            return self._num_kv_changes, self._state.pool.hashes()

    def drain_kv_events(self) -> list[KvChange]:
        """Changes of the prefix cache since the last call, at most one that sums them up."""
        with self._state.lock:
            stored, removed = self._state.pool.drain_changes()
            if not stored and not removed:
                return []
            self._num_kv_changes += 1
            return [KvChange(self._num_kv_changes, tuple(stored), tuple(removed))]

    # Load.

    def stats(self) -> EngineStats:
        """Load and speeds now."""
        state = self._state
        with state.lock:
            statuses = [sequence.status for sequence in state.sequences.values()]
            computing = [*state.running.values(), *state.waiting.values()]
            return EngineStats(
                num_running=len(state.running),
                num_waiting=len(state.waiting),
                num_reserved=statuses.count(SequenceStatus.RESERVED),
                num_held=statuses.count(SequenceStatus.HELD),
                queued_prefill_tokens=sum(
                    sequence.num_tokens - sequence.num_computed_tokens - 1 for sequence in computing
                ),
                prefill_tokens_per_s=self._steps.speeds.prefill_tokens_per_s,
                decode_step_s=self._steps.speeds.decode_step_s,
                counters={**state.counters, **self._runner.counters},
            )

    def check(self) -> None:
        """Verifies the block accounting.

        Raises:
            ValueError: it is wrong (a defect).
        """
        with self._state.lock:
            self._state.pool.check()

    # The engine thread.

    def step(self) -> bool:
        """Computes one step. Only the engine thread calls it. False if there was nothing to do."""
        return self._steps.step()

    @property
    def step_age_s(self) -> float:
        """Seconds that the step under way has lasted; 0 between steps."""
        return self._steps.age_s

    def wait(self, timeout_s: float) -> None:
        """Waits until something has changed since the last step began, or for `timeout_s`."""
        with self._state.changed:
            if not self._state.is_changed and not self._state.outbox:
                self._state.changed.wait(timeout_s)

    def notify(self) -> None:
        """Ends a `wait`."""
        with self._state.lock:
            self._state.touch()

    def drain_events(self) -> list[EngineEvent]:
        """Events since the last call, in order."""
        with self._state.lock:
            events, self._state.outbox = self._state.outbox, []
            return events

    def deliver_with(self, deliver: Callable[[], None]) -> None:
        """Sets a callback that the engine thread calls for events within a step (LayersReady)."""
        self._state.deliver = deliver

    def fail_all(self, error: BatonError) -> None:
        """Ends every sequence with an error, and refuses new ones with it."""
        with self._state.lock:
            self._state.failure = error
            for sequence in list(self._state.sequences.values()):
                sequence.num_pins = 0
                self._state.fail(sequence, error)

    def close(self) -> None:
        """Frees the KV tensors."""
        self._runner.close()
        if self._draft_runner is not None:
            self._draft_runner.close()

    def _load(
        self, path: str, config: EngineConfig, report: OnProgress, start: float, share: float
    ) -> LoadedModel:
        return load_model(
            path,
            config,
            on_progress=lambda fraction, text: report(start + share * fraction, text),
            quantization=_quantization(config) if path == config.model_path else None,
        )


def _quantization(config: EngineConfig) -> Quantization | None:
    if config.quantization is None:
        return None
    return Quantization(
        config.quantization,
        group_size=config.quantization_group_size,
        has_lm_head=config.quantize_lm_head,
    )


def _max_model_len(config: EngineConfig, model: LoadedModel, num_blocks: int) -> int:
    wanted = config.max_model_len_tokens
    if wanted is not None and wanted > model.max_len_tokens:
        raise InvalidRequest(
            f"max_model_len_tokens ({wanted}) exceeds the model's {model.max_len_tokens}"
        )
    return min(wanted or model.max_len_tokens, num_blocks * model.layout.block_size)


def _check_pair(model: LoadedModel, draft: LoadedModel) -> None:
    hashes = tokenizer_hash(model.directory), tokenizer_hash(draft.directory)
    if all(hashes) and hashes[0] != hashes[1]:
        raise Unsupported(
            f"the draft model {draft.directory.name} has another tokenizer than "
            f"{model.directory.name}"
        )
