"""The contract of a kind: a config that declares parameters and states, a module's one forward.

Shape legend: b batch, l length, d d_model, i d_inner, h heads, p head_dim, g groups, n d_state,
w d_conv, s packed sequences.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridzoo.comm import SINGLE, Axis, Parallel
from hybridzoo.errors import ConfigError
from hybridzoo.layers.init import Init, seeded
from hybridzoo.layers.linear import RankLinear
from hybridzoo.layers.state import Sequence, State, StateTensor
from hybridzoo.options import check_fields, read_options
from hybridzoo.sharding import Cut, Replicate, Split, check_tp


@dataclass(frozen=True)
class Param:
    """One canonical parameter: everything about it but its values.

    Attributes:
        shape: full shape.
        init: draws the full tensor, fp32.
        cut: how tensor parallelism cuts it.
        decay: whether weight decay applies (never to norms, biases, A_log, D, dt_bias).
        fp32: kept in float32 whatever dtype the model has.
        residual: writes to the residual stream; its draw is divided by sqrt(number of sublayers),
            GPT-2's and Mamba's rule.
        active: the share of it that one token uses (top_k / n_experts for experts).
        trained: False for a table that gradients never reach (a router's correction bias).
        experts: dimension 0 counts experts, which expert parallelism spreads over its ranks.
    """

    shape: tuple[int, ...]
    init: Init
    cut: Cut = field(default_factory=Replicate)
    decay: bool = True
    fp32: bool = False
    residual: bool = False
    active: tuple[int, int] = (1, 1)
    trained: bool = True
    experts: bool = False

    def expert_range(self, ep: Axis) -> range:
        """The part of dimension 0 that this rank of the experts' axis holds."""
        n = self.shape[0]
        if not self.experts:
            return range(n)
        return range(n * ep.rank // ep.world, n * (ep.rank + 1) // ep.world)


@dataclass(frozen=True, kw_only=True)
class LayerConfig(ABC):
    """Hyperparameters of one kind; a frozen dataclass whose fields are the YAML's keys.

    Attributes:
        input_multiplier: scales the layer's normed input (muP families).
        output_multiplier: scales the layer's output before it joins the residual.
    """

    kind: ClassVar[str]
    input_multiplier: float = 1.0
    output_multiplier: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a field of the wrong type or range, however the config was made."""
        check_fields(self.kind, self)

    @classmethod
    def from_dict(cls, where: str, options: Mapping[str, Any]) -> Self:
        """Build from a mapping.

        ConfigError names an unknown key with its nearest, or a value of the wrong type.
        """
        return read_options(cls, where, options, of=cls.kind)

    @classmethod
    @abstractmethod
    def tiny(cls) -> Self:
        """A small instance with options off their defaults, for the contract tests."""

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, and `kind`."""
        changed = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if getattr(self, f.name) != f.default
        }
        return {
            "kind": self.kind,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in changed.items()},
        }

    def check(self, where: str, d_model: int) -> None:  # noqa: B027 (some kinds have no rule)
        """Raise ConfigError where the hyperparameters cannot work together."""

    @abstractmethod
    def params(self, d_model: int) -> dict[str, Param]:
        """Every canonical parameter, in order: shape, cut, start, decay, dtype."""

    def state(self, d_model: int, batch: int, max_len: int) -> dict[str, StateTensor]:
        """Every state tensor for `batch` sequences of at most `max_len` tokens, full sizes."""
        return {}

    @abstractmethod
    def flops(self, d_model: int, context: int) -> int:
        """Forward floating-point operations of one token that has `context` tokens before it."""

    @abstractmethod
    def build(self, d_model: int, **where: Any) -> Layer:
        """The module; keyword arguments `parallel`, `device`, `dtype`."""

    def tp_plan(self, d_model: int) -> dict[str, Cut]:
        """How each parameter is cut, in full sizes."""
        return {name: p.cut for name, p in self.params(d_model).items()}

    def check_tp(self, where: str, d_model: int, tp: int) -> None:
        """Raise ConfigError, naming the legal tp, when this layer cannot be cut over `tp` ranks."""
        check_tp(where, self.tp_plan(d_model).values(), tp)

    def check_ep(self, where: str, d_model: int, ep: int) -> None:
        """Raise ConfigError, naming the legal ep, when `ep` ranks cannot share the experts."""
        counts = {p.shape[0] for p in self.params(d_model).values() if p.experts}
        for n in counts:
            if n % ep:
                legal = ", ".join(str(i) for i in range(1, n + 1) if n % i == 0)
                rule = f"ep={ep} must divide n_experts ({n})"
                raise ConfigError(f"{where}: {rule}. Use ep={legal}.")


class Layer(nn.Module):
    """A module built from a LayerConfig's table of parameters, sized for this rank.

    `forward(x, state, ctx) -> (b, l, d)` serves training, prefill, chunks and single steps. x
    arrives through the block's copy_in and the result is this rank's share of the sum: the block
    sums once, however many branches it has.
    """

    def __init__(
        self,
        config: LayerConfig,
        d_model: int,
        *,
        parallel: Parallel = SINGLE,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config, self.d_model, self.parallel = config, d_model, parallel
        self.table = config.params(d_model)
        self._factory = {
            "device": device or torch.get_default_device(),
            "dtype": dtype or torch.get_default_dtype(),
        }
        # name in memory -> how many different contents the ranks hold of it; their gradients are
        # summed in one go.
        self._partial: dict[str, int] = {}
        config.check_tp(config.kind, d_model, parallel.tp.world)
        config.check_ep(config.kind, d_model, parallel.ep.world)

    def forward(self, x: Tensor, state: State | None, ctx: Sequence) -> Tensor:
        """This rank's share of the output, (b, l, d), for the normed input x (b, l, d)."""
        raise NotImplementedError

    def linear(self, name: str) -> nn.Linear:
        """The projection `name`, from the table's `name.weight` and `name.bias`.

        Replicated parts become parameters of ours.
        """
        weight = self._local(f"{name}.weight")
        has_bias = f"{name}.bias" in self.table
        if has_bias:
            self._local(f"{name}.bias")
        p = self.table[f"{name}.weight"]
        is_row = isinstance(p.cut, Split) and p.cut.dim == 1
        is_whole = isinstance(p.cut, Replicate) and p.cut.partial_grad
        needs_sums = self.parallel.tp.world > 1 and (is_whole or (is_row and has_bias))
        made = RankLinear if needs_sums else nn.Linear
        linear = torch.nn.utils.skip_init(
            made, weight[1], weight[0], bias=has_bias, **self._factory
        )
        if isinstance(linear, RankLinear):
            # what a layer writes to the residual stream is a share of a sum
            linear.give(self.parallel.tp, is_whole=is_whole, gives_shares=is_row or p.residual)
        if is_whole:
            # its gradients are summed by the module, in whose place another may stand
            for parameter in ("weight", "bias"):
                self._partial.pop(f"{name}.{parameter}", None)
        return linear

    def param(self, name: str) -> nn.Parameter | None:
        """The parameter `name` of the table, sized for this rank; None when the config has none."""
        return self._empty(name, self._local(name)) if name in self.table else None

    def _local(self, name: str) -> tuple[int, ...]:
        """This rank's shape of `name`; its replicated parts, if any, are registered beside it."""
        p, world = self.table[name], self.parallel.tp.world
        shape = (len(p.expert_range(self.parallel.ep)), *p.shape[1:])
        shapes = p.cut.local_shapes(name, shape, world, self.parallel.tp.rank)
        for local, indices in p.cut.pieces(name, world).items():
            if isinstance(p.cut, Split) and indices and p.cut.parts[indices[0]].is_shared(world):
                self._partial[local] = p.cut.parts[indices[0]].units
            if isinstance(p.cut, Replicate) and p.cut.partial_grad:
                self._partial[local] = 1
            if local != name:
                self.register_parameter(local, self._empty(name, shapes[local]))
        return shapes[name]

    def _empty(self, name: str, shape: tuple[int, ...]) -> nn.Parameter:
        dtype = self._factory["dtype"]
        if self.table[name].fp32:
            dtype = torch.promote_types(dtype, torch.float32)
        empty = torch.empty(shape, device=self._factory["device"], dtype=dtype)
        return nn.Parameter(empty, requires_grad=self.table[name].trained)

    def partial_params(self) -> dict[str, Tensor]:
        """The parameters held in copies, by name; their gradients are summed over ranks at once."""
        # attributes, not get_parameter: functional_call puts plain tensors there
        params = [attrgetter(name)(self) for name in self._partial]
        summed = self.parallel.tp.sum_grads(params, list(self._partial.values()))
        return dict(zip(self._partial, summed, strict=True))

    def project(self, name: str, x: Tensor, partial: Mapping[str, Tensor]) -> list[Tensor]:
        """Apply the fused projection `name` and return its parts in written order."""
        weight = f"{name}.weight"
        cut, tp = self.table[weight].cut, self.parallel.tp
        assert isinstance(cut, Split)
        found: dict[int, Tensor] = {}
        for local, indices in cut.pieces(weight, tp.world).items():
            if local == weight:
                y = getattr(self, name)(x)
            else:
                y = F.linear(x, partial[local], partial.get(f"{name}_bias_shared"))
            widths = [cut.parts[i].range(tp.world, tp.rank)[1] for i in indices]
            found.update(zip(indices, y.split(widths, -1), strict=True))
        return [found[i] for i in range(len(cut.parts))]

    def whole(self, name: str, partial: Mapping[str, Tensor]) -> Tensor | None:
        """This rank's rows of the parameter `name`, whose cut parts are written before the others.

        None when the config has none.
        """
        mine, shared = getattr(self, name), partial.get(f"{name}_shared")
        return mine if shared is None else torch.cat([mine, shared])

    def init_state(self, batch: int, max_len: int) -> State:
        """Zeros for `batch` sequences of at most `max_len` tokens, sized for this rank."""
        like = self._compute_like()
        tensors = {}
        for name, spec in self.config.state(self.d_model, batch, max_len).items():
            shape = spec.local_shape(self.parallel.tp.world)
            dtype = spec.dtype_in(like.dtype)
            tensors[name] = torch.zeros(shape, dtype=dtype, device=like.device)
        return State(tensors)

    def _compute_like(self) -> Tensor:
        # a parameter that has the model's dtype, also after model.to(dtype): by looking rather than
        # by name, for an adapter or a quantised module may stand where a projection did
        wide = {name for name, p in self.table.items() if p.fp32}
        return next(
            p for n, p in self.named_parameters() if n not in wide and p.is_floating_point()
        )

    @torch.no_grad()
    def init_weights(self, seed: int, prefix: str, n_sublayers: int) -> None:
        """Draw every parameter in full, seeded by its name, then keep this rank's cut."""
        tp = self.parallel.tp
        for name, p in self.table.items():
            full = p.init(p.shape, seeded(seed, prefix + name))
            if p.residual:
                full /= n_sublayers**0.5
            mine = p.expert_range(self.parallel.ep)
            full = full[mine.start : mine.stop]
            for local, piece in p.cut.shard(name, full, tp.world, tp.rank).items():
                self.get_parameter(local).copy_(piece)
