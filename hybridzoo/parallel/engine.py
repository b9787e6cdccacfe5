"""The engines: one step of training, however many ranks share it.

`Engine` is one process in plain torch; deepspeed.py and pipeline.py have those of many.
`initialize` picks one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast, get_args

import torch
from torch import Tensor, nn

from hybridzoo.comm import Parallel
from hybridzoo.config import HybridConfig
from hybridzoo.errors import ConfigError
from hybridzoo.model import HybridLM
from hybridzoo.options import checked
from hybridzoo.parallel import groups, optim
from hybridzoo.parallel.agree import check_alike
from hybridzoo.parallel.loss import IGNORE, Batch, loss
from hybridzoo.parallel.recipe import Recipe
from hybridzoo.parallel.stages import stages
from hybridzoo.recompute import Recompute

# what AdamW remembers of a parameter, in the parameter's shape
SLOTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Outcome:
    """What one step gave, over all ranks.

    Attributes:
        nats: mean loss of a label.
        aux: balance losses.
        norm: gradient norm before clipping.
        n_targets: labels.
        is_applied: False where loss or norm was not finite, and the weights stayed as they were.
    """

    nats: float
    aux: float
    norm: float
    n_targets: int
    is_applied: bool


class Engine:
    """Trains a model in one process.

    Args:
        model: fp32 weights, on its device.
        recipe: of the run.

    Attributes:
        params: this rank's trained parameters by their name in the model, decayed ones first.
        n_updates: updates that the optimizer has made.
    """

    def __init__(self, model: HybridLM, recipe: Recipe) -> None:
        self.model, self.recipe, self.parallel = model, recipe, model.parallel
        self.device = model.device
        self.params = {k: p for group in optim.decay_groups(model) for k, p in group.items()}
        self.n_updates = 0
        set_recompute(model, recipe.parallel.recompute)
        self._setup()

    def _setup(self) -> None:
        self.optimizer = optim.build_optimizer(self.model, self.recipe)

    def step(self, batches: Sequence[Batch], lr: float) -> Outcome:
        """One update from this rank's parts of a step's batch, unless it would not be finite.

        Args:
            batches: `recipe.accumulate` parts, whose gradients are summed.
            lr: learning rate.
        """
        self.model.train()
        n_targets = max(1, sum(int((b["labels"] != IGNORE).sum()) for b in batches))
        # all before the first forward: a copy waits for what the GPU has to do
        batches = [self.moved(b) for b in batches]
        nats = aux = torch.zeros((), device=self.device)
        for batch in batches:
            share, metrics = self._share(batch, n_targets)
            share.backward()
            nats = nats + metrics["nats"] / n_targets
            aux = aux + metrics["aux"] * metrics["n_targets"] / n_targets
        limit = math.inf if self.recipe.clip_norm is None else self.recipe.clip_norm
        norm = nn.utils.clip_grad_norm_(self.params.values(), limit)
        # one transfer, the only wait for the GPU in a step
        found: list[float] = torch.stack([nats, aux, norm]).tolist()
        is_finite = all(map(math.isfinite, found))
        if is_finite:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.n_updates += 1
        self.optimizer.zero_grad(set_to_none=True)
        nats, aux, norm = found
        return Outcome(nats, aux, norm, n_targets, is_finite)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """Summed nats and number of labels of batches, over all ranks, without dropout."""
        self.model.eval()
        nats, count = torch.zeros((), dtype=torch.float64), 0
        # eager: the last batch's shape would be compiled anew
        with torch.compiler.set_stance("force_eager"):
            for batch in batches:
                _, metrics = self._share(self.moved(batch), 1)
                nats += metrics["nats"].cpu()
                count += int((batch["labels"] != IGNORE).sum())
        return nats.item(), count

    @contextmanager
    def weights(self, name: str) -> Iterator[Tensor]:
        """The parameter `name` of this rank, whole and writable until the block ends.

        Every data-parallel rank asks for the same ones in the same order.
        """
        yield self.model.get_parameter(name).detach()

    def read_slot(self, name: str, slot: str) -> Tensor:
        """What the optimizer remembers of a parameter, in its shape; zeros before any update.

        Every data-parallel rank asks for the same ones in the same order.
        """
        state = self.optimizer.state[self.params[name]]
        return state[slot] if slot in state else torch.zeros_like(self.params[name])

    def write_slots(self, name: str, values: dict[str, Tensor], n_updates: int) -> None:
        """Set what the optimizer remembers of a parameter, and how many updates it made."""
        parameter = self.params[name]
        state = {slot: t.to(parameter.device, copy=True) for slot, t in values.items()}
        where = parameter.device if self.optimizer.defaults["fused"] else "cpu"
        state["step"] = torch.tensor(float(n_updates), device=where)
        self.optimizer.state[parameter] = state
        self.n_updates = n_updates

    def _share(self, batch: Batch, n_targets: Tensor | int) -> tuple[Tensor, dict[str, Tensor]]:
        with self.precision():
            return loss(self.model, batch, n_targets)

    def precision(self) -> torch.autocast:
        """The forward's number format."""
        is_bf16 = self.recipe.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_bf16)

    def moved(self, batch: Batch) -> Batch:
        """A batch on the engine's device."""
        moved = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        return cast(Batch, moved)


def initialize(config_or_model: HybridConfig | HybridLM, recipe: Recipe) -> Engine:
    """The engine that trains a model, or this rank's part of one, as the recipe says.

    Every rank calls it. The engine's `model` holds this rank's slices; `step` takes its share of a
    batch.

    Args:
        config_or_model: a config, whose initial weights are drawn by the recipe's seed and laid out
            by its `parallel`; or a model with fp32 weights, on its device, that is laid out so.
        recipe: of the run; its model, data.source and output are not read.

    Raises:
        ConfigError: this process, or the ranks that it is one of, cannot run the recipe; before any
            tensor is made.
    """
    if isinstance(config_or_model, HybridConfig):
        parallel = join(recipe)
        check(config_or_model, recipe)
        model = _built(config_or_model, recipe, parallel)
    else:
        model = config_or_model
        check(model.config, recipe)
    if not torch.distributed.is_initialized():
        return Engine(model, recipe)
    if model.device.type != pick_device(recipe).type:
        raise ConfigError(
            f"device: the model is on {model.device}, and the recipe's {recipe.device} is "
            f"{pick_device(recipe)}; ranks talk by their device. Move it, or set device: "
            f"{model.device.type}."
        )
    if model.parallel.pp.world == 1:
        from hybridzoo.parallel.deepspeed import DataEngine

        return DataEngine(model, recipe)
    from hybridzoo.parallel.pipeline import PipelineEngine

    return PipelineEngine(model, recipe)


def join(recipe: Recipe) -> Parallel:
    """This process's place among the ranks that a launcher started, as the recipe lays them out."""
    spread = recipe.parallel
    parallel = groups.init(
        tp=spread.tp,
        pp=spread.pp,
        ep=spread.ep,
        sequence_parallel=spread.sequence_parallel,
        timeout_s=spread.timeout_s,
        device=pick_device(recipe),
    )
    check_alike(recipe.values())
    return parallel


def pick_device(recipe: Recipe) -> torch.device:
    """The device of the recipe; auto is the GPU if there is one."""
    has_gpu = torch.cuda.is_available()
    if recipe.device == "cuda" and not has_gpu:
        raise ConfigError(
            f"device: torch {torch.__version__} sees no GPU (cuda); it must. Use auto or cpu."
        )
    return torch.device("cuda" if has_gpu and recipe.device != "cpu" else "cpu")


def check(config: HybridConfig, recipe: Recipe) -> None:
    """Refuse what this process, or the ranks that it is one of, cannot run.

    Raises:
        ConfigError: the key, and its legal values.
    """
    if torch.distributed.is_initialized():
        from hybridzoo.parallel import ds_config

        return ds_config.check(recipe, torch.distributed.get_world_size(), config)
    recompute_at(config, recipe.parallel.recompute)
    if recipe.parallel.deepspeed is not None:
        raise ConfigError(
            f"parallel.deepspeed: {recipe.parallel.deepspeed} would not be read; one process "
            "without a launcher trains in plain torch. Start it with torchrun or deepspeed, or "
            "leave it out."
        )


def _built(config: HybridConfig, recipe: Recipe, parallel: Parallel) -> HybridLM:
    spread = recipe.parallel
    places = stages(config, parallel.pp.world, spread.balance, recipe.data.seq_len)
    return HybridLM(
        config,
        seed=recipe.seed,
        parallel=parallel,
        stage=places[parallel.pp.rank],
        device=pick_device(recipe),
        dtype=torch.float32,
    )


def set_recompute(model: HybridLM, modes: Mapping[str, Recompute]) -> None:
    """Set what each block computes again in the backward, by the letters of its place."""
    for block, mode in zip(model.blocks, recompute_at(model.config, modes), strict=True):
        # None: another pipeline stage's
        if block is not None:
            block.recompute = mode


def recompute_at(config: HybridConfig, modes: Mapping[str, Recompute]) -> list[Recompute]:
    """What is computed again at each place; of parallel letters the most that one of them says.

    Raises:
        ConfigError: a letter that the pattern does not have, or an unknown mode.
    """
    order: tuple[Recompute, ...] = get_args(Recompute)
    letters = list(dict.fromkeys(b.letter for place in config.places for b in place))
    for letter, mode in modes.items():
        if letter not in letters:
            raise ConfigError(
                f"parallel.recompute: no such letter ({letter!r}); the pattern has "
                f"{', '.join(letters)}. Use one of them."
            )
        checked(f"parallel.recompute.{letter}", mode, Recompute)
    return [
        max((modes.get(b.letter, "none") for b in place), key=order.index)
        for place in config.places
    ]
