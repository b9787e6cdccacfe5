"""Mamba-2 (arXiv 2405.21060): one decay a head, B and C a group of heads, a gated norm."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from hybridzoo.errors import ConfigError
from hybridzoo.kernels.causal_conv1d import causal_conv1d
from hybridzoo.kernels.ssd import ssd
from hybridzoo.layers import init
from hybridzoo.layers.base import Layer, LayerConfig, Param, Sequence, State, StateTensor
from hybridzoo.layers.mamba1 import decays
from hybridzoo.layers.mlp import ACTIVATIONS, Activation
from hybridzoo.layers.norm import GatedRMSNorm
from hybridzoo.sharding import Part, Split


@dataclass(frozen=True, kw_only=True)
class Mamba2Config(LayerConfig):
    """Hyperparameters of a Mamba-2 mixer.

    Attributes:
        d_state: states a channel.
        head_dim: channels a head.
        n_heads: heads; None is d_inner / head_dim.
        n_groups: groups of heads that share B and C.
        d_conv: taps of the causal convolution over x, B and C.
        expand: d_inner / d_model, unless d_inner or n_heads is given.
        d_inner: channels of the scan; None is n_heads * head_dim, or expand * d_model.
        conv_bias: bias of the convolution.
        in_proj_bias: bias of in_proj.
        out_proj_bias: bias of out_proj.
        activation: of the convolved x, B and C; the gate is silu in all families.
        norm: gate_first, RMSNorm(y * silu(z)); norm_first, RMSNorm(y) * silu(z); none, y * silu(z).
            Groups of d_inner / n_groups.
        norm_eps: eps of that norm.
        chunk_size: tokens a chunk of the scan; changes speed and rounding, not the function.
        dt_limit: bounds of dt after softplus, in prefill and decode alike.
        dt_min: smallest step at initialisation.
        dt_max: largest step at initialisation.
        dt_init_floor: no initial step lies below it.
        A_init: range of the initial decays.
    """

    kind: ClassVar[str] = "mamba2"
    d_state: int = 128
    head_dim: int = 64
    n_heads: int | None = None
    n_groups: int = 1
    d_conv: int = field(default=4, metadata={"min": 2, "max": 8})
    expand: float = field(default=2.0, metadata={"min": 0, "max": 2**16})
    d_inner: int | None = None
    conv_bias: bool = True
    in_proj_bias: bool = False
    out_proj_bias: bool = False
    activation: Activation = "silu"
    norm: Literal["gate_first", "norm_first", "none"] = "gate_first"
    norm_eps: float = field(default=1e-5, metadata={"min": 0})
    chunk_size: int = 128
    dt_limit: tuple[float, float] = field(default=(0.0, math.inf), metadata={"max": math.inf})
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dt_init_floor: float = 1e-4
    A_init: tuple[float, float] = (1.0, 16.0)

    @classmethod
    def tiny(cls) -> Self:
        """4 heads of 6 in 2 groups, every bias, chunks shorter than the tests' sequences."""
        return cls(
            d_state=5, head_dim=6, n_heads=4, n_groups=2, d_conv=3, in_proj_bias=True,
            out_proj_bias=True, norm_eps=1e-3, chunk_size=8, dt_limit=(0.01, 2.0),
            input_multiplier=0.8, output_multiplier=1.3,
        )  # fmt: skip

    def check(self, where: str, d_model: int) -> None:
        """Refuse widths that do not fit together."""
        i, h = self.widths(d_model)
        if i < 1:
            raise ConfigError(
                f"{where}.expand: ({self.expand}) times d_model ({d_model}) leaves no channel. "
                "Raise it."
            )
        if i != h * self.head_dim:
            raise ConfigError(
                f"{where}.head_dim: ({self.head_dim}) times n_heads ({h}) must be d_inner ({i}). "
                "Give n_heads and head_dim, or a head_dim that divides d_inner."
            )
        if h % self.n_groups:
            raise ConfigError(
                f"{where}.n_groups: ({self.n_groups}) must divide n_heads ({h}). "
                f"Use a divisor of {h}."
            )
        (low, high), (slow, fast) = self.dt_limit, self.A_init
        if not 0 <= low < high:
            rule = f"bounds in the wrong order ({low}, {high}); 0 <= low < high"
            raise ConfigError(f"{where}.dt_limit: {rule}. Swap them.")
        if not 0 < slow < fast:
            rule = f"bounds in the wrong order ({slow}, {fast}); 0 < low < high"
            raise ConfigError(f"{where}.A_init: {rule}. Change them.")
        for name, value in (("dt_min", self.dt_min), ("dt_init_floor", self.dt_init_floor)):
            if not 0 < value < self.dt_max:
                rule = f"must lie between 0 and dt_max ({self.dt_max})"
                raise ConfigError(f"{where}.{name}: ({value}) {rule}. Choose one between.")

    def widths(self, d_model: int) -> tuple[int, int]:
        """(d_inner, n_heads)."""
        if self.d_inner or self.n_heads is None:
            i = self.d_inner or int(self.expand * d_model)
            return i, self.n_heads or i // self.head_dim
        return self.n_heads * self.head_dim, self.n_heads

    def parts(self, d_model: int) -> tuple[Part, Part, Part, Part, Part]:
        """z, x, B, C, dt: the rows of in_proj; z, x and dt are cut by head, B and C by group."""
        i, h = self.widths(d_model)
        head, width = Part(i, h, "n_heads"), self.n_groups * self.d_state
        group = Part(width, self.n_groups, "n_groups", replicates=True)
        return head, head, group, group, Part(h, h, "n_heads")

    def params(self, d_model: int) -> dict[str, Param]:
        """The table.

        in_proj holds the rows z | x | B | C | dt, the convolution the channels x | B | C.
        """
        i, h = self.widths(d_model)
        z, x, B, C, dt = self.parts(d_model)
        rows, conv, heads = Split(0, (z, x, B, C, dt)), Split(0, (x, B, C)), Split(0, (dt,))
        n_rows, n_conv = (sum(p.width for p in cut.parts) for cut in (rows, conv))
        fan = init.fan_in_uniform
        table = {"in_proj.weight": Param((n_rows, d_model), fan(d_model), rows)}
        if self.in_proj_bias:
            table["in_proj.bias"] = Param((n_rows,), fan(d_model), rows, decay=False)
        table["conv_weight"] = Param((n_conv, self.d_conv), fan(self.d_conv), conv)
        if self.conv_bias:
            table["conv_bias"] = Param((n_conv,), fan(self.d_conv), conv, decay=False)
        dt_bias = init.dt_bias(self.dt_min, self.dt_max, self.dt_init_floor)
        table |= {
            "dt_bias": Param((h,), dt_bias, heads, decay=False, fp32=True),
            "A_log": Param((h,), init.log_uniform_A(*self.A_init), heads, decay=False, fp32=True),
            "D": Param((h,), init.constant(1.0), heads, decay=False, fp32=True),
        }
        if self.norm != "none":
            table["norm.weight"] = Param((i,), init.constant(1.0), Split(0, (x,)), decay=False)
        table["out_proj.weight"] = Param((d_model, i), fan(i), Split(1, (x,)), residual=True)
        if self.out_proj_bias:
            table["out_proj.bias"] = Param((d_model,), init.constant(0.0), decay=False)
        return table

    def state(self, d_model: int, batch: int, max_len: int) -> dict[str, StateTensor]:
        """The last d_conv - 1 inputs of the convolution and the fp32 scan state.

        No growth with max_len.
        """
        _, h = self.widths(d_model)
        _, x, B, C, dt = self.parts(d_model)
        n_conv = x.width + B.width + C.width
        ssm_shape = (batch, h, self.head_dim, self.d_state)
        return {
            "conv_state": StateTensor((batch, self.d_conv - 1, n_conv), None, (x, B, C), dim=2),
            "ssm_state": StateTensor(ssm_shape, torch.float32, (dt,), dim=1),
        }

    def flops(self, d_model: int, context: int) -> int:
        """Projections, convolution, 5 operations a state, skip, gate and norm.

        Of a state: decay, dt x B, add, C multiply-add.
        """
        i, _ = self.widths(d_model)
        z, x, B, C, dt = (p.width for p in self.parts(d_model))
        projections = 2 * d_model * (z + x + B + C + dt) + 2 * i * d_model
        convolution = 2 * (x + B + C) * self.d_conv
        skip_and_gate = (8 if self.norm != "none" else 4) * i
        return projections + convolution + 5 * i * self.d_state + skip_and_gate

    def build(self, d_model: int, **where: Any) -> Mamba2:
        """The module."""
        return Mamba2(self, d_model, **where)


class Mamba2(Layer):
    """out_proj(norm(ssd(silu(conv(x, B, C))), z)) (arXiv 2405.21060, section 7)."""

    config: Mamba2Config

    def __init__(self, config: Mamba2Config, d_model: int, **where: Any) -> None:
        super().__init__(config, d_model, **where)
        self.in_proj = self.linear("in_proj")
        self.conv_weight, self.conv_bias = self.param("conv_weight"), self.param("conv_bias")
        self.dt_bias, self.A_log = self.param("dt_bias"), self.param("A_log")
        self.D = self.param("D")
        if config.norm != "none":
            # a full group's channels, also where several ranks hold them
            group_size = config.widths(d_model)[0] // config.n_groups
            self.norm = GatedRMSNorm(
                self.param("norm.weight"), config.norm_eps, group_size,
                config.norm == "norm_first", parallel=self.parallel,
            )  # fmt: skip
        self.out_proj = self.linear("out_proj")

    def forward(self, x: Tensor, state: State | None, ctx: Sequence) -> Tensor:
        """(b, l, d) -> this rank's share of (b, l, d)."""
        partial = self.partial_params()
        z, x, B, C, dt = self.project("in_proj", x, partial)
        widths = [x.shape[-1], B.shape[-1], C.shape[-1]]
        conv_weight = self.whole("conv_weight", partial)
        conv_bias = self.whole("conv_bias", partial)
        # the op fuses silu, which every released model uses
        fused = "silu" if self.config.activation == "silu" else None
        # blank before the convolution, which reads neighbours, and after it, whose bias would
        # refill padding.
        xBC, conv_state = causal_conv1d(
            ctx.blank_padding(torch.cat([x, B, C], -1)), conv_weight, conv_bias, activation=fused,
            cu_seqlens=ctx.cu_seqlens,
            initial_state=state.get("conv_state", ctx) if state else None,
        )  # fmt: skip
        xBC = xBC if fused else ACTIVATIONS[self.config.activation](xBC)
        x, B, C = ctx.blank_padding(xBC).split(widths, -1)
        n_groups = B.shape[-1] // self.config.d_state
        # without a norm the scan gates; else the norm does
        gate = _heads(z, dt.shape[-1]) if self.config.norm == "none" else None
        y, ssm_state = ssd(
            _heads(x, dt.shape[-1]), dt, decays(self.A_log),
            _heads(B, n_groups), _heads(C, n_groups), D=self.D, z=gate, dt_bias=self.dt_bias,
            dt_softplus=True, dt_limit=self.config.dt_limit,
            chunk_size=self.config.chunk_size, cu_seqlens=ctx.cu_seqlens,
            initial_state=state.get("ssm_state", ctx) if state else None,
        )  # fmt: skip
        if state:
            state.set("conv_state", conv_state, ctx)
            state.set("ssm_state", ssm_state, ctx)
        y = y.flatten(2)
        return self.out_proj(y if gate is not None else self.norm(y, z))


def _heads(x: Tensor, n: int) -> Tensor:
    return x.unflatten(-1, (n, x.shape[-1] // n))
