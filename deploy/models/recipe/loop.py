"""The training loop of target and draft: bf16 compute, float32 masters, scheduled by the clock.

The learning rate follows the share of the time budget that is used, not a step count, so that a run
always ends fully annealed at the set time, however busy the machine is.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from models import MAX_CONTEXT, export
from stream import TokenStream
from transformers import LlamaForCausalLM

WARMUP_SHARE = 0.03
DECAY_SHARE = 0.6
"""The learning rate falls linearly to zero over this last share of the budget."""
SHORT_CONTEXT = 512
"""Used for most of the run; attention costs least there."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run is allowed and where it keeps its state."""

    budget_s: float
    work_dir: Path
    """Holds the checkpoint, and an export in Hugging Face format made at every save."""
    batch_tokens: int = 8192
    muon_rate: float = 4e-3
    adam_rate: float = 3e-3
    weight_decay: float = 0.1
    long_context_share: float = 0.2
    """The last share of the budget trains at the full context, so that all positions are known."""
    save_every_s: float = 240.0
    compile: bool = True


class Loop:
    """Trains one model; a run that was interrupted continues in a new `Loop` on its directory."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        loss_of: Callable[[torch.Tensor], torch.Tensor],
        documents: list[list[int]],
        settings: Settings,
    ) -> None:
        """Take `model` in float32; `loss_of` maps a batch `[rows, context]` to the mean nats."""
        self.settings = settings
        self.model = model
        self.masters = [weight.detach().clone() for weight in model.parameters()]
        model.to(torch.bfloat16)
        self.weights = list(model.parameters())
        self.optimizers = self._make_optimizers()
        self.loss_of = torch.compile(loss_of, dynamic=False) if settings.compile else loss_of
        self.used_s, self.step = 0.0, 0
        self.losses: list[float] = []
        position = self._load()
        self.stream = TokenStream(documents, seed=0, position=position)

    def _make_optimizers(self) -> list[torch.optim.Optimizer]:
        """Give Muon the matrices inside the layers, AdamW the embedding and the norms."""
        names = [name for name, _ in self.model.named_parameters()]
        named = list(zip(names, self.masters, strict=True))
        matrices = [master for name, master in named if master.ndim == 2 and "embed" not in name]
        others = [master for name, master in named if master.ndim != 2 or "embed" in name]
        decay = self.settings.weight_decay
        return [
            torch.optim.Muon(
                matrices,
                lr=self.settings.muon_rate,
                weight_decay=decay,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(
                others, lr=self.settings.adam_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
            ),
        ]

    def run(self) -> None:
        """Train until the budget is used; Ctrl-C saves and stops."""
        started_s, last_save_s = time.monotonic() - self.used_s, self.used_s
        try:
            while self.used_s < self.settings.budget_s:
                self._train_step()
                self.used_s = time.monotonic() - started_s
                if self.step % 10 == 0:
                    self._report()
                if self.used_s - last_save_s > self.settings.save_every_s:
                    self.save()
                    last_save_s = self.used_s
        except KeyboardInterrupt:
            sys.stdout.write("interrupted: saving; the same command continues from here\n")
            self.save()
            raise SystemExit(130) from None
        self.save()

    def _train_step(self) -> None:
        progress = self.used_s / self.settings.budget_s
        is_long = progress > 1 - self.settings.long_context_share
        batch = self.stream.next_batch(
            self.settings.batch_tokens, MAX_CONTEXT if is_long else SHORT_CONTEXT
        )
        loss = self.loss_of(batch)
        loss.backward()
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad = weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        scale = min(1.0, progress / WARMUP_SHARE + 0.01, (1 - progress) / DECAY_SHARE)
        peaks = (self.settings.muon_rate, self.settings.adam_rate)
        for optimizer, peak in zip(self.optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * scale
            optimizer.step()
        with torch.no_grad():
            for master, weight in zip(self.masters, self.weights, strict=True):
                weight.copy_(master)
        self.losses = [*self.losses[-99:], loss.item()]
        self.step += 1

    def _report(self) -> None:
        tokens, left_s = self.stream.position, self.settings.budget_s - self.used_s
        sys.stdout.write(
            f"step {self.step:5d}  loss {sum(self.losses) / len(self.losses):.4f}  "
            f"{tokens / 1e6:6.2f} M tokens ({tokens / self.stream.epoch_tokens:.2f} epochs)  "
            f"{tokens / self.used_s:6.0f} tokens/s  {left_s / 60:5.1f} min left\n"
        )
        sys.stdout.flush()

    def save(self) -> None:
        """Write the checkpoint and an export of the present weights."""
        self.settings.work_dir.mkdir(parents=True, exist_ok=True)
        state = {
            "masters": self.masters,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "used_s": self.used_s,
            "step": self.step,
            "losses": self.losses,
            "position": self.stream.position,
        }
        part = self._checkpoint.with_suffix(".part")
        torch.save(state, part)
        part.replace(self._checkpoint)
        export(self.model.state_dict(), self.model.config, self.settings.work_dir)
        summary = {"step": self.step, "tokens": self.stream.position, "seconds": round(self.used_s)}
        (self.settings.work_dir / "run.json").write_text(json.dumps(summary) + "\n")

    @property
    def _checkpoint(self) -> Path:
        return self.settings.work_dir / "checkpoint.pt"

    def _load(self) -> int:
        """Restore the last checkpoint, if there is one; return its place in the stream."""
        if not self._checkpoint.exists():
            return 0
        state = torch.load(self._checkpoint, weights_only=True)
        with torch.no_grad():
            for master, weight, saved in zip(
                self.masters, self.weights, state["masters"], strict=True
            ):
                master.copy_(saved)
                weight.copy_(saved)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.used_s, self.step, self.losses = state["used_s"], state["step"], state["losses"]
        return int(state["position"])
