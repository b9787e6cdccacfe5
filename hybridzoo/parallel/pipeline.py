"""Pipeline parallelism: DeepSpeed's engine over the stages of a stack."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hybridzoo.model import HybridLM
from hybridzoo.parallel import ds_config, optim
from hybridzoo.parallel.deepspeed import DataEngine, limited, link_slots, load
from hybridzoo.parallel.engine import Engine, Outcome
from hybridzoo.parallel.loss import IGNORE, Batch, loss, sequence
from hybridzoo.parallel.norm import over, tag
from hybridzoo.parallel.replicas import level


class PipelineEngine(DataEngine):
    """Trains one stage of a model: DeepSpeed's 1F1B schedule over a step's parts, ZeRO 0 or 1.

    Only the residual stream travels: every stage knows the batches, and what its layers add to the
    loss gets its gradient there. What several stages hold (a tied embedding, shared layers) gets
    the same bits of gradient on all of them, so the copies stay equal.

    Args:
        model: one stage; parameters that other stages hold too are the same there.
        recipe: of the run, which the ranks can run.
    """

    def _setup(self) -> None:
        recipe, self.stage = self.recipe, self.recipe.parallel.zero_stage
        deepspeed = load(self.device)
        tag(self.model)
        self.part, self._shape = _Part(self), torch.Size()
        # a stream is sent whole: with sequence_parallel it differs between the ranks of tp
        whole = {"pipeline": {"pipe_partitioned": False, "grad_partitioned": False}}
        # it tells of seeds and topology on stdout, which is the caller's
        with redirect_stdout(sys.stderr), limited(recipe):
            level(self.model)
            self.engine, made, *_ = deepspeed.initialize(
                model=_piped(self.part),
                optimizer=optim.build_optimizer(self.model, recipe),
                config={**ds_config.build(recipe, self.parallel.dp.world), **whole},
                dist_init_required=False,
            )
        self.optimizer = getattr(made, "optimizer", made)
        if self.stage:
            link_slots(made, self.stage)
        else:
            self.optimizer.register_step_pre_hook(self._clip)

    def step(self, batches: Sequence[Batch], lr: float) -> Outcome:
        """As Engine's; every rank has as many parts, of one shape, those of one dp the same."""
        assert len(batches) == self.recipe.accumulate, "DeepSpeed would leave the others out"
        self.check_shares(batches)
        dp, moved = self.parallel.dp, [self.moved(b) for b in batches]
        counts = torch.stack([(b["labels"] != IGNORE).sum() for b in moved])
        n_targets = over(dp, counts.sum()).clamp(min=1)
        if moved[0]["input_ids"].shape != self._shape:
            # DeepSpeed keeps the memory that the stream is received in
            self.engine.reset_activation_shape()
            self._shape = moved[0]["input_ids"].shape
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.part.start(moved, n_targets)
        self.engine.train_batch((b["input_ids"], b["labels"]) for b in moved)
        if self.stage:
            self.norm = torch.as_tensor(self.engine.get_global_grad_norm(), device=self.device)
        sums = over(dp, over(self.parallel.pp, self.part.sums))
        nats, aux, norm, n = torch.stack([*sums, self.norm, n_targets]).tolist()
        is_applied = norm < torch.inf
        self.n_updates += is_applied
        return Outcome(nats, aux, norm, int(n), is_applied)

    def _clip(self, *_: Any) -> None:
        self.norm = self._clipped()

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """As Engine's; every rank of one dp has the same batches, which may differ in shape."""
        self.model.eval()
        pp, sums = self.parallel.pp, torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in map(self.moved, batches):
            self.part.start([batch], 1)
            x = batch["input_ids"]
            if not self.model.is_first:
                x = self._stream_like(x)
                dist.recv(x, group=pp.group, group_src=pp.rank - 1)
            # eager: the last batch's shape would be compiled anew
            with torch.compiler.set_stance("force_eager"):
                y = self.part(x)
            if self.model.is_last:
                sums += torch.stack([self.part.sums[0], (batch["labels"] != IGNORE).sum()])
            else:
                dist.send(y, group=pp.group, group_dst=pp.rank + 1)
        nats, count = over(self.parallel.dp, over(pp, sums)).tolist()
        return nats, int(count)

    def _stream_like(self, ids: Tensor) -> Tensor:
        """Memory for the residual stream that the stage before computed of ids (b, l)."""
        model, (b, l) = self.model, ids.shape
        dtype = model.blocks[model.stage.start].norm.weight.dtype
        if model.config.residual_fp32:
            dtype = torch.promote_types(dtype, torch.float32)
        if self.parallel.sequence_parallel:
            l //= self.parallel.tp.world
        return torch.empty(b, l, model.config.d_model, dtype=dtype, device=self.device)


class _Part(nn.Module):
    """What DeepSpeed calls: a stage's ids or stream in, its stream or loss out."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.model, self._precision = engine.model, engine.precision
        self._dp, self._n_parts = engine.parallel.dp.world, engine.recipe.accumulate

    def start(self, batches: Iterable[Batch], n_targets: Tensor | int) -> None:
        """The batches of the next forwards, in their order, and the labels of all ranks'."""
        self._batches, self._n_targets = iter(batches), n_targets
        # nats and aux of a label, of this stage
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.model.device)

    def forward(self, x: Tensor) -> Tensor:
        """Ids (b, l) or the stream (b, l, d) -> the stream, or the last stage's loss."""
        model, batch = self.model, next(self._batches)
        with self._precision():
            h = model.embedded(x) if model.is_first else x
            if model.is_last:
                share, found = loss(model, batch, self._n_targets, h=h)
                self._add(found["nats"], found["aux"] * found["n_targets"])
                # one that is not finite makes the gradients so: no update
                share = share * (1 + 0 * share.detach())
                # DeepSpeed takes means over the data-parallel ranks and over a step's parts
                return share * (self._dp * self._n_parts)
            ctx = sequence(batch)
            # what is sent are its bytes as they lie
            h = model.flushed(*model.stream(h, None, ctx)).contiguous()
        if not ctx.aux:
            return h
        aux = torch.stack(ctx.aux).sum() * (batch["labels"] != IGNORE).sum()
        self._add(torch.zeros_like(aux), aux)
        return _Carry.apply(h, aux / self._n_targets, self._dp)

    def _add(self, nats: Tensor, aux: Tensor) -> None:
        self.sums += torch.stack([nats, aux]).detach() / self._n_targets


class _Carry(torch.autograd.Function):
    """The stream h; when it gets its gradient, a loss of this stage gets `scale` as its own."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, loss: Tensor, scale: int) -> Tensor:
        ctx.grad = scale + 0 * loss
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], ctx.grad, None


def _piped(part: _Part) -> nn.Module:
    """The stage as DeepSpeed's module, of one layer a stage."""
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    parallel = part.model.parallel
    pp, copies = parallel.pp, _copies(part.model)

    class Piped(PipelineModule):  # type: ignore[misc]
        def _partition_layers(self, method: str) -> None:
            self.parts = list(range(pp.world + 1))
            self._set_bounds(pp.rank, pp.rank + 1)

        def get_tied_weights_and_groups(self) -> list[Any]:
            # DeepSpeed asks right before it averages gradients over dp, to sum these over the
            # stages of each data-parallel rank alone
            for copy in copies:
                copy.sum_grad()
            return []

    topology = PipeModelDataParallelTopology(pp.world, parallel.tp.world, parallel.dp.world)
    module = Piped([part if i == pp.rank else None for i in range(pp.world)], topology=topology)
    for copy in copies:
        # the norm counts one of them
        copy.parameter.ds_pipe_replicated = not copy.is_first
    return module


@dataclass(frozen=True)
class _Copy:
    """A trained parameter that other stages hold too.

    Attributes:
        parameter: this stage's.
        group: the ranks whose gradients it gets, of all stages that hold it and of dp.
        is_first: whether this stage is the first of those.
        keeps: whether this rank brings their sum to the average over dp; one of each stage does.
    """

    parameter: nn.Parameter
    group: Any
    is_first: bool
    keeps: bool

    def sum_grad(self) -> None:
        """Give all stages the same bits, and leave nothing to add to the average over dp.

        Each stage averages by itself: three or more numbers are added in an order that depends on
        where they lie in its buffer, so copies would drift apart. An all-reduce gives one result to
        all ranks; zeros added to it change nothing in any order.
        """
        grad = self.parameter.grad
        if grad is None:
            # frozen, or unused on this stage: the others wait for it
            grad = self.parameter.grad = torch.zeros_like(self.parameter)
        dist.all_reduce(grad, group=self.group)
        if not self.keeps:
            grad.zero_()


def _copies(model: HybridLM) -> list[_Copy]:
    """The copies that this stage holds, in one order on all stages.

    All ranks call it, for all take part in making every group.
    """
    parallel, found, groups = model.parallel, [], {}
    pp, me = parallel.pp, dist.get_rank()
    mine = {name: names for name, p, names in model.local_names() if p.trained}
    held: list[list[str]] = [[] for _ in range(pp.world)]
    dist.all_gather_object(held, list(mine), group=pp.group)
    for name, p in model.config.params():
        holders = tuple(i for i, names in enumerate(held) if name in names)
        if len(holders) < 2:
            continue
        # of so many data-parallel ranks in a row each has other numbers
        n = parallel.ep.world if p.experts else 1
        if (holders, n) not in groups:
            # a rank's number counts along (pp, dp, tp): one column a group
            ranks = torch.arange(dist.get_world_size()).view(pp.world, -1, n * parallel.tp.world)
            columns = ranks[list(holders)].flatten(0, 1).T.tolist()
            groups[holders, n] = [dist.new_group(c) for c in columns][me % len(columns)]
        for parameter in map(model.get_parameter, mine.get(name, {}).values()):
            is_first, keeps = pp.rank == holders[0], parallel.dp.rank < n
            found.append(_Copy(parameter, groups[holders, n], is_first, keeps))
    return found
