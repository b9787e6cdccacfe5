"""The contract of a layer kind: a config that declares parameters and states, a module with one forward.

Shape legend: b batch, l length, d d_model, i d_inner, h heads, p head_dim, g groups, n d_state, w d_conv, s packed sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridzoo.comm import SINGLE, Parallel
from hybridzoo.errors import ConfigError
from hybridzoo.layers.init import Init, seeded
from hybridzoo.options import check_fields, read_options
from hybridzoo.sharding import Cut, Part, Replicate, Split, check_tp


@dataclass(frozen=True)
class Param:
    """One canonical parameter: everything about it but its values.

    Attributes:
        shape: full shape.
        init: draws the full tensor, fp32.
        cut: how tensor parallelism cuts it.
        decay: whether weight decay applies (never to norms, biases, A_log, D, dt_bias).
        fp32: kept in float32 whatever dtype the model has.
        residual: writes to the residual stream; its draw is divided by sqrt(number of sublayers), GPT-2's and Mamba's rule.
        active: the share of it that one token uses (top_k / n_experts for experts).
        trained: False for a table that gradients never reach (a router's correction bias).
    """

    shape: tuple[int, ...]
    init: Init
    cut: Cut = field(default_factory=Replicate)
    decay: bool = True
    fp32: bool = False
    residual: bool = False
    active: tuple[int, int] = (1, 1)
    trained: bool = True


@dataclass(frozen=True)
class StateTensor:
    """One tensor of a layer's state.

    Attributes:
        shape: full shape; dimension 0 counts sequences.
        dtype: None is the model's dtype; float32 becomes float64 in a float64 model.
        parts: how dimension `dim` is cut over tensor-parallel ranks; none: every rank holds it whole.
        dim: the dimension that parts cut.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    parts: tuple[Part, ...] = ()
    dim: int = -1

    def local_shape(self, world: int) -> tuple[int, ...]:
        """The shape on one of `world` ranks."""
        shape = list(self.shape)
        if self.parts:
            shape[self.dim] = sum(p.range(world, 0)[1] for p in self.parts)
        return tuple(shape)


@dataclass(frozen=True)
class Sequence:
    """What a layer must know of the tokens in one forward; built once by the model.

    Attributes:
        cu_seqlens: (s + 1,) int32 starts of packed sequences and the end; then b == 1 and states have one row a sequence.
        max_seqlen: longest packed sequence, the caller's int, so that no host sync is needed.
        seq_idx: (l,) int64 the packed sequence of each token.
        positions: (b, l) int32 index of each token among its sequence's tokens in this call, -1 at padding;
            None when it is 0..l-1 in every row. A state's own position is added by the layer.
        pad_mask: (b, l) bool, True at real tokens; padding is on the left. None: no padding.
        slots: (b,) int64 row of the state pool for each sequence; negative rows are computed and dropped.
        embed0: (b, l, d) token embeddings, for kinds that read them again.
        aux: losses that layers add (MoE balance); None when nobody collects them.
    """

    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    seq_idx: Tensor | None = None
    positions: Tensor | None = None
    pad_mask: Tensor | None = None
    slots: Tensor | None = None
    embed0: Tensor | None = None
    aux: list[Tensor] | None = None

    @classmethod
    def build(
        cls,
        length: int,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        **rest: Any,
    ) -> Self:
        """Derive positions from a left-padding mask (b, l) or from cu_seqlens (s + 1,); raise ConfigError on both."""
        if cu_seqlens is not None:
            if attention_mask is not None or max_seqlen is None:
                raise ConfigError(
                    f"cu_seqlens: packed sequences need max_seqlen ({max_seqlen}) and take no attention_mask; "
                    "padding does not exist in a pack. Pass cu_seqlens and max_seqlen alone."
                )
            token = torch.arange(length, device=cu_seqlens.device)
            # right=True: a token at a boundary belongs to the sequence that starts there; empty ones are passed over.
            seq_idx = torch.bucketize(token, cu_seqlens[1:], right=True)
            positions = (token - cu_seqlens[seq_idx]).to(torch.int32)[None]
            return cls(
                cu_seqlens=cu_seqlens,
                max_seqlen=max_seqlen,
                seq_idx=seq_idx,
                positions=positions,
                **rest,
            )
        if attention_mask is None:
            return cls(**rest)
        mask = attention_mask.bool()
        positions = (mask.cumsum(1, dtype=torch.int32) - 1).masked_fill(~mask, -1)
        return cls(positions=positions, pad_mask=mask, **rest)

    def local_positions(self, x: Tensor) -> Tensor:
        """`positions`, made explicit: (b, l) int32 for x (b, l, ...)."""
        if self.positions is not None:
            return self.positions
        row = torch.arange(x.shape[1], device=x.device, dtype=torch.int32)
        return row.expand(x.shape[0], -1)

    def count(self, x: Tensor) -> Tensor:
        """Tokens that this call adds to each state row: (b,) or (s,) int32."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens.diff().to(torch.int32)
        if self.pad_mask is not None:
            return self.pad_mask.sum(1, dtype=torch.int32)
        return torch.full((x.shape[0],), x.shape[1], dtype=torch.int32, device=x.device)

    def blank_padding(self, x: Tensor) -> Tensor:
        """x (b, l, ...) with zeros at padding, so that no padding enters a state or a neighbour."""
        return x if self.pad_mask is None else x.masked_fill(~self.pad_mask[:, :, None], 0)

    def unpack(self, x: Tensor, fill: float = 0) -> Tensor:
        """Packed x (1, l, ...) as one padded row a sequence (s, max_seqlen, ...)."""
        rows = (len(self._starts()) - 1, self.max_seqlen, *x.shape[2:])
        return x.new_full(rows, fill).index_put((self.seq_idx, self.positions[0].long()), x[0])

    def repack(self, x: Tensor) -> Tensor:
        """Inverse of unpack: (s, max_seqlen, ...) to (1, l, ...)."""
        return x[self.seq_idx, self.positions[0].long()][None]

    def _starts(self) -> Tensor:
        assert self.cu_seqlens is not None
        return self.cu_seqlens


class State:
    """Named tensors of one layer, one row a sequence, of fixed shapes.

    `set` rebinds while gradients are recorded and copies in place otherwise, so that a one-token step can be captured
    in a CUDA graph and a training chunk can be differentiated through. Nothing here is read back to the host.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def get(self, name: str, ctx: Sequence) -> Tensor:
        """The rows that ctx.slots names, or all rows."""
        full = self.tensors[name]
        return full if ctx.slots is None else full[_row_index(ctx.slots, full)]

    def set(self, name: str, value: Tensor, ctx: Sequence) -> None:
        """Replace the rows that ctx.slots names, or all rows."""
        full = self.tensors[name]
        value = value.to(full.dtype)
        if torch.is_grad_enabled():
            self.tensors[name] = (
                value
                if ctx.slots is None
                else full.index_copy(0, _row_index(ctx.slots, full), value)
            )
        elif ctx.slots is None:
            full.copy_(value)
        else:
            full.index_copy_(0, _row_index(ctx.slots, full), value)

    def map(self, change: Any) -> State:
        """A new State with `change` applied to every tensor."""
        return State({name: change(t) for name, t in self.tensors.items()})


def _row_index(slots: Tensor, full: Tensor) -> Tensor:
    # a negative slot wraps to the pool's last row, which its owner keeps as scratch: no branch, no host sync.
    return torch.remainder(slots, full.shape[0])


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
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
        """Build from a mapping; ConfigError names an unknown key with its nearest, or a value of the wrong type."""
        return read_options(cls, where, options, of=cls.kind)

    @classmethod
    def tiny(cls) -> Self:
        """A small instance with options off their defaults, for the contract tests."""
        raise NotImplementedError

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

    def check(self, where: str, d_model: int) -> None:
        """Raise ConfigError where the hyperparameters cannot work together."""

    def params(self, d_model: int) -> dict[str, Param]:
        """Every canonical parameter, in order: shape, cut, start, decay, dtype."""
        raise NotImplementedError

    def state(self, d_model: int, batch: int, max_len: int) -> dict[str, StateTensor]:
        """Every state tensor for `batch` sequences of at most `max_len` tokens, full sizes."""
        return {}

    def flops(self, d_model: int, context: int) -> int:
        """Forward floating-point operations of one token that has `context` tokens before it."""
        raise NotImplementedError

    def build(self, d_model: int, **where: Any) -> Layer:
        """The module; keyword arguments `parallel`, `device`, `dtype`."""
        raise NotImplementedError

    def tp_plan(self, d_model: int) -> dict[str, Cut]:
        """How each parameter is cut, in full sizes."""
        return {name: p.cut for name, p in self.params(d_model).items()}

    def check_tp(self, where: str, d_model: int, tp: int) -> None:
        """Raise ConfigError, naming the legal tp, when this layer cannot be cut over `tp` ranks."""
        check_tp(where, self.tp_plan(d_model).values(), tp)


class Layer(nn.Module):
    """A module built from a LayerConfig's table of parameters, sized for this rank.

    `forward(x, state, ctx) -> (b, l, d)` serves training, prefill, chunks and single steps. x arrives through the block's
    copy_in and the result is this rank's share of the sum: the block sums once, however many branches it has.
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
        # name in memory -> how many different contents the ranks hold of it; their gradients are summed in one go.
        self._partial: dict[str, int] = {}
        config.check_tp(config.kind, d_model, parallel.tp.world)

    def forward(self, x: Tensor, state: State | None, ctx: Sequence) -> Tensor:
        """This rank's share of the output, (b, l, d), for the normed input x (b, l, d)."""
        raise NotImplementedError

    def linear(self, name: str) -> nn.Linear:
        """The projection `name`, from the table's `name.weight` and `name.bias`; replicated parts become parameters of ours."""
        weight = self._local(f"{name}.weight")
        has_bias = f"{name}.bias" in self.table
        if has_bias:
            self._local(f"{name}.bias")
        cut = self.table[f"{name}.weight"].cut
        is_row = isinstance(cut, Split) and cut.dim == 1
        made = RowLinear if is_row and has_bias and self.parallel.tp.world > 1 else nn.Linear
        linear = torch.nn.utils.skip_init(
            made, weight[1], weight[0], bias=has_bias, **self._factory
        )
        if isinstance(linear, RowLinear):
            linear.axis = self.parallel.tp
        return linear

    def param(self, name: str) -> nn.Parameter | None:
        """The parameter `name` of the table, sized for this rank; None when the config has none."""
        return self._empty(name, self._local(name)) if name in self.table else None

    def _local(self, name: str) -> tuple[int, ...]:
        """This rank's shape of `name`; its replicated parts, if any, are registered beside it."""
        p, world = self.table[name], self.parallel.tp.world
        shapes = p.cut.local_shapes(name, p.shape, world)
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
        """The parameters held in copies of which each rank sees a share, by name, their gradients summed at once."""
        names = list(self._partial)
        params = [self.get_parameter(n) for n in names]
        return dict(
            zip(
                names, self.parallel.tp.sum_grads(params, list(self._partial.values())), strict=True
            )
        )

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

    def init_state(self, batch: int, max_len: int) -> State:
        """Zeros for `batch` sequences of at most `max_len` tokens, on this layer's device, sized for this rank."""
        # the table's first parameter is a projection: it has the model's dtype, also after model.to(dtype).
        like = self.get_parameter(next(iter(self.table)))
        tensors = {}
        for name, spec in self.config.state(self.d_model, batch, max_len).items():
            dtype = spec.dtype or like.dtype
            if dtype == torch.float32:
                dtype = torch.promote_types(dtype, like.dtype)
            shape = spec.local_shape(self.parallel.tp.world)
            tensors[name] = torch.zeros(shape, dtype=dtype, device=like.device)
        return State(tensors)

    @torch.no_grad()
    def init_weights(self, seed: int, prefix: str, n_sublayers: int) -> None:
        """Draw every parameter in full from a generator seeded by its name, then keep this rank's cut."""
        for name, p in self.table.items():
            full = p.init(p.shape, seeded(seed, prefix + name))
            if p.residual:
                full /= n_sublayers**0.5
            for local, piece in p.cut.shard(
                name, full, self.parallel.tp.world, self.parallel.tp.rank
            ).items():
                self.get_parameter(local).copy_(piece)


class RowLinear(nn.Linear):
    """A Linear cut along its inputs: every rank adds its share of the bias, so the sum over ranks adds it once."""

    axis = SINGLE.tp

    def forward(self, input: Tensor) -> Tensor:
        """This rank's share, (..., out)."""
        (bias,) = self.axis.sum_grads([self.bias], [1])
        return F.linear(input, self.weight, bias / self.axis.world)
