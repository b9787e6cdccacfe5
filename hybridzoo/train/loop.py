"""The training loop: each step is a pure function of (weights, optimizer, recipe, step)."""

from __future__ import annotations

import hashlib
import math
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from hybridzoo.checkpoint.slots import load_slots, save_slots
from hybridzoo.comm import SINGLE, Parallel
from hybridzoo.errors import ConfigError
from hybridzoo.parallel.agree import agreed, is_first, lowest
from hybridzoo.parallel.engine import SLOTS, Outcome, initialize, join, pick_device
from hybridzoo.parallel.loss import Batch
from hybridzoo.parallel.optim import AVERAGE, Average, lr_at
from hybridzoo.parallel.recipe import Recipe
from hybridzoo.train import snapshot
from hybridzoo.train.documents import Split
from hybridzoo.train.held_out import held_out
from hybridzoo.train.interrupt import interruptible
from hybridzoo.train.log import Log, Record, Silence, plot
from hybridzoo.train.setup import describe, find, start

MAX_SKIPPED = 10
# what no signal's number reaches
_NONE = 1 << 10


def train(recipe: Recipe, *, resume: bool = False, console: Console | None = None) -> Path:
    """Train a model as the recipe says, into `recipe.output`.

    The directory gets step-{n}/ (native checkpoints with optimizer state; `latest` names the
    newest), best/ (the weights of the lowest held-out loss), log.jsonl and loss.png. On the CPU a
    resumed run computes the same bits as one that was never cut off.

    Under a launcher (torchrun, deepspeed, srun) every rank calls it; all see the directory.

    Args:
        recipe: what to do.
        resume: go on from the newest intact checkpoint in the directory, or from the start if it
            has none; the ranks may be others, and laid out in another way.
        console: where rank 0's progress goes; default is stderr.

    Returns:
        The last checkpoint. After SIGTERM, on any rank, that is an early one: the step is finished
        and saved.

    Raises:
        ConfigError: the recipe cannot work, changed since the checkpoint, or diverged.
        CheckpointError: no checkpoint is intact, one cannot be written, or another process trains
            into the directory.
        SystemExit: 130 after SIGINT, once the step is finished and saved.
    """
    console = console or Console(stderr=True)
    parallel = join(recipe)
    devices = list(range(torch.cuda.device_count()))
    if parallel is not SINGLE and torch.cuda.is_available():
        # another rank's device is not this one's to touch
        devices = [torch.cuda.current_device()]
    with snapshot.held(Path(recipe.output)), torch.random.fork_rng(devices=devices):
        trainer = Trainer(recipe, resume, console, parallel)
        with interruptible() as caught:
            last = trainer.run(caught)
    if trainer.signal is not None:
        name = trainer.signal.name
        trainer.notice(f"{name}: stopped after step {trainer.step}; resume from {last}.")
    if trainer.signal == signal.SIGINT:
        raise SystemExit(130)
    return last


class Trainer:
    """One run: the model, its engine and average, and where it stands.

    Args:
        recipe: what to do.
        resume: as in `train`.
        console: as in `train`.
        parallel: this process's place among the ranks.
    """

    def __init__(
        self, recipe: Recipe, resume: bool, console: Console, parallel: Parallel = SINGLE
    ) -> None:
        self.recipe, self.root, self.parallel = recipe, Path(recipe.output), parallel
        self.console = console if is_first() else Console(quiet=True)
        self.device = pick_device(recipe)
        self.step, self.best, self.skipped = 0, math.inf, 0
        self.signal: signal.Signals | None = None
        # the step of the last checkpoint; labels since the last record, and when that was
        self._saved, self._seen, self._since = 0, 0, 0.0
        with agreed():
            found = find(recipe, resume, self.notice)
        with agreed():
            at = None if found is None else found[0]
            self.start = start(recipe, self.device, parallel, at)
        self.model, self.data = self.start.model, self.start.data
        self.engine = initialize(self.model, recipe)
        self.average = Average(self.engine.params, recipe.ema) if recipe.ema else None
        if found is not None:
            with agreed():
                self._restore(*found)
        if recipe.compile:
            for i in self.model.stage:
                self.model.blocks[i].compile()
        self.log: Log = Silence()
        if is_first():
            # nothing is written before all that can be refused has been
            self.root.mkdir(parents=True, exist_ok=True)
            self.log = Log(self.root, console, recipe.steps, self.step)

    def run(self, caught: list[int]) -> Path:
        """Train to the last step, or until `caught` holds a signal; returns the last checkpoint.

        Args:
            caught: signals that came to this rank; those of others count too.
        """
        recipe = self.recipe
        for line in describe(self.model, recipe, self.device):
            self.log.say(line)
        self._since, self._seen = time.perf_counter(), 0
        # the next step's batches are made while the GPU works on this one's
        with ThreadPoolExecutor(1) as pool:
            try:
                coming = pool.submit(self._batches, self.step)
                while self.step < recipe.steps and not self._is_stopped(caught):
                    batches = coming.result()
                    coming = pool.submit(self._batches, self.step + 1)
                    self._advance(batches)
                if self._saved != self.step:
                    self._save()
                self._is_stopped(caught)
                if is_first() and not plot(self.log.path, self.root / "loss.png"):
                    missing = "matplotlib is missing; pip install matplotlib."
                    self.log.say(f"loss.png: not drawn, {missing}")
            finally:
                self.log.close()
        return self.root / snapshot.name_of(self.step)

    def _advance(self, batches: list[Batch]) -> None:
        """One step, and what is due after it: a record, an evaluation, a checkpoint."""
        recipe, outcome = self.recipe, self._update(batches)
        self._seen += outcome.n_targets
        is_end = self.step == recipe.steps
        if not outcome.is_applied or is_end or self.step % recipe.log_every == 0:
            now = time.perf_counter()
            self.log.write(self._record(outcome, round(self._seen / (now - self._since))))
            self._since, self._seen = now, 0
        if recipe.eval_every and (is_end or self.step % recipe.eval_every == 0):
            self._evaluate()
            self._since = time.perf_counter()
        if self.step % recipe.save_every == 0:
            self._save()
            self._since = time.perf_counter()

    def _is_stopped(self, caught: list[int]) -> bool:
        """Whether a signal came to any rank; at a step's end, so that all stop after the same."""
        number = min(caught, default=0) if caught else _NONE
        if self.parallel is not SINGLE:
            number = lowest(number, self.device)
        if 0 < number < _NONE:
            self.signal = signal.Signals(number)
        return number < _NONE

    def _update(self, batches: list[Batch]) -> Outcome:
        """One step."""
        torch.manual_seed(_step_seed(self.recipe, self.step, self.parallel))
        outcome = self.engine.step(batches, lr_at(self.recipe, self.step))
        self.step += 1
        if outcome.is_applied:
            self.skipped = 0
            if self.average is not None:
                self.average.update(self.step)
        else:
            self._skip(outcome.nats + outcome.aux, outcome.norm)
        return outcome

    def _record(self, outcome: Outcome, speed: int) -> Record:
        """What the log keeps of a step."""
        record: Record = {"step": self.step, "lr": lr_at(self.recipe, self.step - 1)}
        nats, aux, norm = outcome.nats, outcome.aux, outcome.norm
        if outcome.is_applied:
            record |= {"loss": nats, **self._bits("", "train", nats), "aux": aux, "grad_norm": norm}
        else:
            record |= {"skipped": f"loss {nats + aux}, gradient norm {norm}"}
        return {**record, "tokens_per_s": speed}

    def _skip(self, value: float, norm: float) -> None:
        self.skipped += 1
        step = self.step
        self.log.say(f"step {step}: loss {value}, gradient norm {norm}; this update is skipped.")
        if self.skipped == MAX_SKIPPED:
            raise ConfigError(
                f"train: loss or gradient norm was not finite in {MAX_SKIPPED} steps in a row "
                f"({step - MAX_SKIPPED + 1} to {step}); the run diverged. Lower lr or clip_norm."
            )

    def _evaluate(self) -> None:
        """Held-out loss, of the averaged weights if there are any; the best are kept in best/."""
        with self.average.applied() if self.average else nullcontext():
            value, loads = held_out(self.engine, self.data)
        is_best = value < self.best
        if is_best:
            self.best = value
            with agreed():
                self.start.save_model(self.root / "best", self._averaged)
        record: Record = {"step": self.step, "val_loss": value, **self._bits("val_", "val", value)}
        record |= {"is_best": is_best} | ({"expert_load": loads} if loads else {})
        self.log.write(record)

    def _averaged(self, name: str) -> AbstractContextManager[Tensor]:
        """As the engine's `weights`, of the averaged ones if there are any."""
        if self.average is not None and name in self.average.tensors:
            return nullcontext(self.average.tensors[name])
        return self.engine.weights(name)

    def _batches(self, step: int) -> list[Batch]:
        n = self.recipe.accumulate
        return [self.data.batch_at(step * n + i) for i in range(n)]

    def _bits(self, prefix: str, split: Split, nats: float) -> Record:
        """The loss in bits a byte, where the source knows its bytes."""
        ratio = self.data.documents(split).bytes_per_target
        return {} if ratio is None else {f"{prefix}bits_per_byte": nats / math.log(2) / ratio}

    def _restore(self, directory: Path, info: dict[str, Any]) -> None:
        self.step, self.skipped = info["step"], info["skipped"]
        self._saved = self.step
        self.best = math.inf if info["best"] is None else info["best"]
        engine, average = self.engine, self.average

        for name, values in load_slots(directory / "optimizer", self.model, SLOTS):
            engine.write_slots(name, values, info["n_updates"])
        if average is not None:
            for name, values in load_slots(directory / "average", self.model, AVERAGE):
                average.tensors[name].copy_(values["average"])
        self.notice(f"resuming after step {self.step} from {directory}.")

    def _save(self) -> None:
        info = {
            "recipe": self.recipe.to_dict(),
            "best": self.best if math.isfinite(self.best) else None,
            "skipped": self.skipped,
            "n_updates": self.engine.n_updates,
        }
        keep = self.recipe.keep_last
        snapshot.write(self.root, self.step, self._write_parts, info, keep_last=keep)
        self._saved = self.step

    def _write_parts(self, directory: Path) -> None:
        self.start.save_model(directory, self.engine.weights)
        save_slots(directory / "optimizer", self.model, SLOTS, self.engine.read_slot)
        if self.average is not None:
            tensors = self.average.tensors
            save_slots(directory / "average", self.model, AVERAGE, lambda name, _: tensors[name])

    def notice(self, line: str) -> None:
        """One line for people."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _step_seed(recipe: Recipe, step: int, parallel: Parallel) -> int:
    """Of a step's dropout: a function of (seed, step), so that a resume needs no generator's state.

    Ranks that compute the same values draw the same.
    """
    tp_rank = parallel.tp.rank if parallel.sequence_parallel else 0
    place = (parallel.dp.rank, parallel.pp.rank, tp_rank)
    text = f"{recipe.seed}/{step}" + (f"/{place}" if any(place) else "")
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
