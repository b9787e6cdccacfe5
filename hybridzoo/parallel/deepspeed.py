"""The engine of data-parallel ranks: DeepSpeed's ZeRO under the model's own tensor parallelism."""

from __future__ import annotations

import sys
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hybridzoo.comm import Parallel
from hybridzoo.errors import ConfigError
from hybridzoo.parallel import ds_config, optim
from hybridzoo.parallel.agree import exchange
from hybridzoo.parallel.ds_keys import imported
from hybridzoo.parallel.engine import SLOTS, Engine, Outcome
from hybridzoo.parallel.loss import IGNORE, Batch, loss
from hybridzoo.parallel.norm import global_norm, over, tag
from hybridzoo.parallel.recipe import Recipe
from hybridzoo.parallel.replicas import level


class DataEngine(Engine):
    """Trains a model on the ranks of dp and tp (and ep); without pipeline stages.

    Parameters stay fp32 and the forward casts by itself, so that A_log, D and dt_bias are never
    rounded; DeepSpeed shares the training state (ZeRO, arXiv 1910.02054), reduces and clips.

    Args:
        model: as in Engine; the same weights on every data-parallel rank.
        recipe: of the run, which the ranks can run.
    """

    # until an engine's first step
    _has_checked = False

    def _setup(self) -> None:
        recipe, self.stage = self.recipe, self.recipe.parallel.zero_stage
        load(self.device)
        tag(self.model)
        with limited(recipe):
            level(self.model)
        self.engine, self.optimizer = start(
            Share(self), optim.build_optimizer(self.model, recipe), recipe, self.parallel
        )
        if self.stage:
            link_slots(self.engine.optimizer, self.stage)

    def step(self, batches: Sequence[Batch], lr: float) -> Outcome:
        """As Engine's; every rank has as many parts, and the tp ranks of one dp the same ones."""
        assert len(batches) == self.recipe.accumulate, "DeepSpeed counts the parts of a step"
        self.check_shares(batches)
        self.engine.train()
        dp = self.parallel.dp
        count = sum(int((b["labels"] != IGNORE).sum()) for b in batches)
        n_targets = over(dp, torch.tensor(count, device=self.device)).clamp(min=1)
        # all before the first forward: a copy waits for what the GPU has to do
        batches = [self.moved(b) for b in batches]
        found = torch.zeros(2, device=self.device)  # nats, aux
        for i, batch in enumerate(batches, 1):
            share, metrics = self._share(batch, n_targets)
            parts = [metrics["nats"], metrics["aux"] * metrics["n_targets"]]
            found = found + torch.stack(parts) / n_targets
            if i == len(batches):
                found = over(dp, found)
                # a loss that is not finite on one rank makes the gradients so on all: no update
                share = share * (1 + 0 * found.sum())
            # ZeRO averages over dp what is to be summed
            self.engine.backward(share * dp.world, scale_wrt_gas=False)
            if i < len(batches):
                # no update yet: the part is counted
                self.engine.step()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        norm = self._update()
        nats, aux, n = torch.cat([found, n_targets[None]]).tolist()
        is_applied = norm < torch.inf
        self.n_updates += is_applied
        return Outcome(nats, aux, norm, int(n), is_applied)

    def check_shares(self, batches: Sequence[Batch]) -> None:
        """Refuse, at the first step, ranks of one dp that bring different sequences.

        They would work on slices of different things, and no error would follow.
        """
        if self._has_checked:
            return
        mine = [zlib.crc32(b["input_ids"].cpu().numpy().tobytes()) for b in batches]
        first: dict[int, tuple[int, list[int]]] = {}
        for i, (dp, theirs) in enumerate(exchange((self.parallel.dp.rank, mine))):
            origin, told = first.setdefault(dp, (i, theirs))
            if theirs != told:
                raise ConfigError(
                    f"batches: ranks {origin} and {i} brought different sequences; the tp and pp "
                    f"ranks of one data-parallel rank ({dp}) share the work on the same. Draw them "
                    "by engine.parallel.dp.rank."
                )
        self._has_checked = True

    def _update(self) -> float:
        """Clip and apply the reduced gradients; the norm, infinite where none was applied."""
        if self.stage:
            # leaves weights and moments as they are where the norm is not finite
            self.engine.step()
            return float(self.engine.get_global_grad_norm())
        norm = self._clipped()
        self.engine.step()
        return norm.item()

    def _clipped(self) -> Tensor:
        """Clip stage 0's reduced gradients; the norm, infinite where they are dropped."""
        # DeepSpeed neither gives a norm at stage 0 nor leaves such an update out
        norm = global_norm(self.params, self.parallel)
        if not norm.isfinite():
            # AdamW passes by a parameter without a gradient
            self.engine.zero_grad()
            return norm.new_tensor(torch.inf)
        if self.recipe.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.params.values(), self.recipe.clip_norm, norm)
        return norm

    def _share(self, batch: Batch, n_targets: Tensor | int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.engine(batch, n_targets)

    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """As Engine's; every data-parallel rank has as many batches, of its own."""
        found = torch.tensor(super().evaluate(batches), dtype=torch.float64, device=self.device)
        nats, count = over(self.parallel.dp, found).tolist()
        return nats, int(count)

    @contextmanager
    def weights(self, name: str) -> Iterator[Tensor]:
        """As Engine's; what is written, the same on every data-parallel rank, reaches all of them.

        With ZeRO the optimizer updates a copy, which is written too.
        """
        import deepspeed

        parameter = self.model.get_parameter(name)
        # stages below 3 have the whole parameter: the context does nothing then
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            yield parameter.detach()
            if self.stage and parameter.requires_grad:
                self._write(parameter, parameter.detach())

    def read_slot(self, name: str, slot: str) -> Tensor:
        """As Engine's; joined from the data-parallel ranks."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if not self.stage:
            return super().read_slot(name, slot)
        parameter = self.params[name]
        shape = parameter.ds_shape if self.stage == 3 else parameter.shape
        return safe_get_full_optimizer_state(parameter, slot).view(shape)

    def write_slots(self, name: str, values: dict[str, Tensor], n_updates: int) -> None:
        """As Engine's; each rank keeps its share."""
        if not self.stage:
            return super().write_slots(name, values, n_updates)
        for slot, value in values.items():
            self._write(self.params[name], value.to(self.device), slot)
        for state in self.optimizer.state.values():
            state["step"].fill_(n_updates)
        self.n_updates = n_updates

    def _write(self, parameter: nn.Parameter, value: Tensor, *slot: str) -> None:
        """Set this rank's share of a slot, or of the copy that the optimizer updates."""
        from deepspeed import utils

        if self.stage < 3:
            write = utils.safe_set_full_optimizer_state if slot else utils.safe_set_full_fp32_param
            write(parameter, value, *slot)
            return
        # its writers of whole tensors fail where dp does not divide their elements
        dp, n = self.parallel.dp, parameter.ds_tensor.numel()
        value = nn.functional.pad(value.flatten(), (0, n * dp.world - value.numel()))
        write = utils.safe_set_local_optimizer_state if slot else utils.safe_set_local_fp32_param
        write(parameter, value.narrow(0, dp.rank * n, n), *slot)


class Share(nn.Module):
    """What DeepSpeed calls: a batch's share of the loss, in the engine's precision."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.model, self._precision = engine.model, engine.precision

    def forward(self, batch: Batch, n_targets: Tensor | int) -> tuple[Tensor, dict[str, Tensor]]:
        """As loss.loss."""
        with self._precision():
            return loss(self.model, batch, n_targets)


class Mpu:
    """What DeepSpeed asks of the ranks: tp is its model parallelism, dp its data parallelism.

    Sequence parallelism lies inside the model: DeepSpeed must not hear of it (it would scale
    gradients for its own kind).
    """

    def __init__(self, parallel: Parallel) -> None:
        self._tp, self._dp = parallel.tp, parallel.dp

    def get_model_parallel_rank(self) -> int:
        """Place among the ranks of tp."""
        return self._tp.rank

    def get_model_parallel_world_size(self) -> int:
        """Ranks of tp."""
        return self._tp.world

    def get_model_parallel_group(self) -> Any:
        """The process group of tp."""
        return self._tp.group

    def get_data_parallel_rank(self) -> int:
        """Place among the ranks of dp."""
        return self._dp.rank

    def get_data_parallel_world_size(self) -> int:
        """Ranks of dp."""
        return self._dp.world

    def get_data_parallel_group(self) -> Any:
        """The process group of dp."""
        return self._dp.group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group


def start(
    module: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, parallel: Parallel
) -> tuple[Any, Any]:
    """DeepSpeed's engine around a module, and the torch optimizer within it."""
    deepspeed = load(next(module.parameters()).device)
    with limited(recipe):
        engine, made, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=ds_config.build(recipe, parallel.dp.world),
            mpu=Mpu(parallel),
            dist_init_required=False,
        )
    return engine, getattr(made, "optimizer", made)


@contextmanager
def limited(recipe: Recipe) -> Iterator[None]:
    """Process groups that are made until the block ends give up after the recipe's time.

    DeepSpeed makes its own without a limit; torch would take 10 minutes (NCCL) or 30 (gloo).
    """
    known = dist.new_group
    dist.new_group = partial(known, timeout=timedelta(seconds=recipe.parallel.timeout_s))
    try:
        yield
    finally:
        dist.new_group = known


def load(device: torch.device) -> ModuleType:
    """DeepSpeed ready for tensors on `device`; torch.distributed is initialised."""
    deepspeed = imported(device.type)
    # on the CPU the first use would compile a shared-memory operator, 40 s of g++; gloo does
    # without. The module is looked up by name: the attribute deepspeed.comm.torch is torch itself
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    # an engine of ZeRO 3 that was here before has put its own in the place of torch's
    nn.functional.linear = torch._C._nn.linear
    # torch 2.13's new names for collectives, which DeepSpeed does not use yet
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    return deepspeed


def link_slots(zero: Any, stage: int) -> None:
    """Make AdamW's moments of ZeRO's flat partitions now, which AdamW does in its first update.

    So they can be read and written at any time.
    """
    flats = (
        zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    )
    is_fused = zero.optimizer.defaults["fused"]
    for flat in flats:
        where = flat.device if is_fused else "cpu"
        state = {slot: torch.zeros_like(flat) for slot in SLOTS}
        zero.optimizer.state[flat] = {"step": torch.zeros((), device=where), **state}
    if stage < 3:
        zero._lazy_init_hp_params_optimizer_state()
