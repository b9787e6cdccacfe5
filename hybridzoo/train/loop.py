"""The training loop: each step is a pure function of (weights, optimizer, recipe, step)."""

from __future__ import annotations

import hashlib
import math
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor

from hybridzoo.errors import ConfigError
from hybridzoo.parallel import optim
from hybridzoo.parallel.loss import expert_loads, loss
from hybridzoo.parallel.recipe import Recipe
from hybridzoo.train import snapshot
from hybridzoo.train.data import IGNORE, Batch
from hybridzoo.train.documents import Split
from hybridzoo.train.interrupt import interruptible
from hybridzoo.train.log import Log, Record, plot
from hybridzoo.train.setup import describe, pick_device, start

MAX_SKIPPED = 10


def train(recipe: Recipe, *, resume: bool = False, console: Console | None = None) -> Path:
    """Train a model as the recipe says, into `recipe.output`.

    The directory gets step-{n}/ (native checkpoints with optimizer state; `latest` names the
    newest), best/ (the weights of the lowest held-out loss), log.jsonl and loss.png. On the CPU a
    resumed run computes the same bits as one that was never cut off.

    Args:
        recipe: what to do.
        resume: go on from the newest intact checkpoint in the directory, or from the start if it
            has none.
        console: where progress goes; default is stderr.

    Returns:
        The last checkpoint. After SIGTERM that is an early one: the step is finished and saved.

    Raises:
        ConfigError: the recipe cannot work, changed since the checkpoint, or diverged.
        CheckpointError: no checkpoint is intact, one cannot be written, or another process trains
            into the directory.
        SystemExit: 130 after SIGINT, once the step is finished and saved.
    """
    console = console or Console(stderr=True)
    devices = list(range(torch.cuda.device_count()))
    with snapshot.held(Path(recipe.output)), torch.random.fork_rng(devices=devices):
        trainer = Trainer(recipe, resume, console)
        with interruptible() as caught:
            last = trainer.run(caught)
    if caught:
        name = signal.Signals(caught[0]).name
        trainer.notice(f"{name}: stopped after step {trainer.step}; resume from {last}.")
    if signal.SIGINT in caught:
        raise SystemExit(130)
    return last


@dataclass
class Outcome:
    """What one step gave: its loss and balance loss in nats, its gradient norm, its labels."""

    nats: Tensor
    aux: Tensor
    norm: Tensor
    n_targets: int


class Trainer:
    """One run: the model, its optimizer and average, and where it stands.

    Args:
        recipe: what to do.
        resume: as in `train`.
        console: as in `train`.
    """

    def __init__(self, recipe: Recipe, resume: bool, console: Console) -> None:
        self.recipe, self.root, self.console = recipe, Path(recipe.output), console
        self.device = pick_device(recipe)
        self.step, self.best, self.skipped = 0, math.inf, 0
        found = self._find(resume)
        self.start = start(recipe, self.device, None if found is None else found[0])
        self.model, self.data = self.start.model, self.start.data
        self.params = {k: p for group in optim.decay_groups(self.model) for k, p in group.items()}
        self.optimizer = optim.build_optimizer(self.model, recipe)
        self.average = optim.Average(self.params, recipe.ema) if recipe.ema else None
        if found is not None:
            self._restore(*found)
        if recipe.compile:
            for block in self.model.blocks:
                block.compile()
        # nothing is written before all that can be refused has been
        self.root.mkdir(parents=True, exist_ok=True)
        self.log = Log(self.root, console, recipe.steps, self.step)

    def run(self, caught: list[int]) -> Path:
        """Train to the last step, or until `caught` holds a signal; returns the last checkpoint."""
        recipe, saved = self.recipe, self.step if self.step else None
        for line in describe(self.model, recipe, self.device):
            self.log.say(line)
        try:
            batches, since, seen = self._batches(self.step), time.perf_counter(), 0
            while self.step < recipe.steps and not caught:
                outcome = self._compute(batches)
                # the next batch is made while the GPU works
                batches = self._batches(self.step + 1)
                record = self._update(outcome)
                self.step += 1
                seen += outcome.n_targets
                is_end = self.step == recipe.steps
                if "skipped" in record or is_end or self.step % recipe.log_every == 0:
                    now = time.perf_counter()
                    self.log.write({**record, "tokens_per_s": round(seen / (now - since))})
                    since, seen = now, 0
                if recipe.eval_every and (is_end or self.step % recipe.eval_every == 0):
                    self._evaluate()
                    since = time.perf_counter()
                if self.step % recipe.save_every == 0:
                    self._save()
                    saved, since = self.step, time.perf_counter()
            if saved != self.step:
                self._save()
            if not plot(self.log.path, self.root / "loss.png"):
                self.log.say("loss.png: not drawn, matplotlib is missing; pip install matplotlib.")
        finally:
            self.log.close()
        return self.root / snapshot.name_of(self.step)

    def _compute(self, batches: list[Batch]) -> Outcome:
        """Gradients of one step's batch, part by part."""
        self.model.train()
        # dropout too is a function of (seed, step): a resume needs no generator's state
        torch.manual_seed(_step_seed(self.recipe.seed, self.step))
        n_targets = max(1, sum(int((b["labels"] != IGNORE).sum()) for b in batches))
        nats = aux = torch.zeros((), device=self.device)
        for batch in batches:
            with self._precision():
                share, metrics = loss(self.model, _move(batch, self.device), n_targets)
            share.backward()
            nats = nats + metrics["nats"] / n_targets
            aux = aux + metrics["aux"] * metrics["n_targets"] / n_targets
        limit = math.inf if self.recipe.clip_norm is None else self.recipe.clip_norm
        norm = torch.nn.utils.clip_grad_norm_(self.params.values(), limit)
        return Outcome(nats, aux, norm, n_targets)

    def _update(self, outcome: Outcome) -> Record:
        """Apply the gradients, unless they are not finite; returns the step's record."""
        lr = optim.lr_at(self.recipe, self.step)
        # one transfer, the only wait for the GPU in a step
        nats, aux, norm = torch.stack([outcome.nats, outcome.aux, outcome.norm]).tolist()
        record: Record = {"step": self.step + 1, "lr": lr}
        if math.isfinite(nats + aux) and math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            if self.average is not None:
                self.average.update(self.step + 1)
            self.skipped = 0
            record |= {"loss": nats, **self._bits("", "train", nats), "aux": aux, "grad_norm": norm}
        else:
            self._skip(nats + aux, norm)
            record |= {"skipped": f"loss {nats + aux}, gradient norm {norm}"}
        self.optimizer.zero_grad(set_to_none=True)
        return record

    def _skip(self, value: float, norm: float) -> None:
        self.skipped += 1
        step = self.step + 1
        self.log.say(f"step {step}: loss {value}, gradient norm {norm}; this update is skipped.")
        if self.skipped == MAX_SKIPPED:
            raise ConfigError(
                f"train: loss or gradient norm was not finite in {MAX_SKIPPED} steps in a row "
                f"({step - MAX_SKIPPED + 1} to {step}); the run diverged. Lower lr or clip_norm."
            )

    def _evaluate(self) -> None:
        """Held-out loss, of the averaged weights if there are any; the best are kept in best/."""
        with self.average.applied() if self.average else nullcontext():
            value, loads = self._held_out()
            is_best = value < self.best
            if is_best:
                self.best = value
                self.start.save_model(self.root / "best")
        record: Record = {"step": self.step, "val_loss": value, **self._bits("val_", "val", value)}
        record |= {"is_best": is_best} | ({"expert_load": loads} if loads else {})
        self.log.write(record)

    @torch.no_grad()
    def _held_out(self) -> tuple[float, dict[str, list[float]]]:
        """Nats a label over the held-out split, and each expert's share of the picks."""
        self.model.eval()
        nats, count = torch.zeros((), dtype=torch.float64), 0
        # eager: the last batch's shape and the hooks would each be compiled anew
        with expert_loads(self.model) as loads, torch.compiler.set_stance("force_eager"):
            for batch in self._eval_batches():
                with self._precision():
                    _, metrics = loss(self.model, _move(batch, self.device), 1)
                nats += metrics["nats"].cpu()
                count += int((batch["labels"] != IGNORE).sum())
        means = {name: torch.stack(each).mean(0).tolist() for name, each in loads.items()}
        return nats.item() / max(1, count), means

    def _eval_batches(self) -> Iterator[Batch]:
        """All of the held-out split, or eval_batches of it at even distances."""
        n_windows = 2 * self.data.documents("val").n_targets / self.recipe.data.seq_len
        n_batches = n_windows / self.data.batch_size
        stride = max(1, int(n_batches / (self.recipe.eval_batches or math.inf)))
        return (b for i, b in enumerate(self.data.eval_batches("val")) if i % stride == 0)

    def _batches(self, step: int) -> list[Batch]:
        n = self.recipe.accumulate
        return [self.data.batch_at(step * n + i) for i in range(n)]

    def _bits(self, prefix: str, split: Split, nats: float) -> Record:
        """The loss in bits a byte, where the source knows its bytes."""
        ratio = self.data.documents(split).bytes_per_target
        return {} if ratio is None else {f"{prefix}bits_per_byte": nats / math.log(2) / ratio}

    def _precision(self) -> torch.autocast:
        is_bf16 = self.recipe.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_bf16)

    def _find(self, resume: bool) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint to go on from, its plain values; half-written ones are removed."""
        snapshot.remove_halves(self.root)
        if not resume:
            if snapshot.has_any(self.root):
                raise ConfigError(
                    f"output: {self.root} already holds checkpoints; a new run needs a directory "
                    "of its own. Go on with --resume, or choose another."
                )
            return None
        found = snapshot.newest(self.root, self.notice)
        if found is None:
            self.notice(f"{self.root}: no checkpoint yet; starting at step 0.")
            return None
        key = self.recipe.changed_key(found[1]["recipe"])
        if key is not None:
            raise ConfigError(
                f"{key}: changed since {found[0]} was written; a resumed run keeps its recipe. "
                "Restore the value, or train into another output."
            )
        return found

    def _restore(self, directory: Path, info: dict[str, Any]) -> None:
        self.step, self.skipped = info["step"], info["skipped"]
        self.best = math.inf if info["best"] is None else info["best"]
        names = list(self.params)
        optim.load_state(self.optimizer, names, snapshot.read_tensors(directory, "optimizer"))
        if self.average is not None:
            for name, tensor in snapshot.read_tensors(directory, "average").items():
                self.average.tensors[name].copy_(tensor)
        self.notice(f"resuming after step {self.step} from {directory}.")

    def _save(self) -> None:
        tensors = {"optimizer": optim.parse_state(self.optimizer, list(self.params))}
        if self.average is not None:
            tensors["average"] = self.average.tensors
        info = {
            "recipe": self.recipe.to_dict(),
            "best": self.best if math.isfinite(self.best) else None,
            "skipped": self.skipped,
        }
        snapshot.write(
            self.root,
            self.step,
            self.start.save_model,
            tensors,
            info,
            keep_last=self.recipe.keep_last,
        )

    def notice(self, line: str) -> None:
        """One line for people."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _step_seed(seed: int, step: int) -> int:
    digest = hashlib.sha256(f"{seed}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _move(batch: Batch, device: torch.device) -> Batch:
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return cast(Batch, moved)
