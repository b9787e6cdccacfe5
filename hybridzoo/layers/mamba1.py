"""Mamba (arXiv 2312.00752): also FalconMamba's and Jamba's mixer, which norm dt, B and C."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from hybridzoo.errors import ConfigError
from hybridzoo.kernels.causal_conv1d import causal_conv1d
from hybridzoo.kernels.causal_conv1d_step import causal_conv1d_step
from hybridzoo.kernels.selective_scan import selective_scan
from hybridzoo.kernels.selective_scan_step import selective_scan_step
from hybridzoo.layers import init
from hybridzoo.layers.base import Layer, LayerConfig, Param, Sequence, State, StateTensor
from hybridzoo.layers.mamba1_inner import Options, Weights, are_plain, find_launchers, inner
from hybridzoo.layers.mlp import ACTIVATIONS, Activation
from hybridzoo.layers.norm import RMSNorm
from hybridzoo.sharding import Part, Split


@dataclass(frozen=True, kw_only=True)
class Mamba1Config(LayerConfig):
    """Hyperparameters of a Mamba-1 mixer.

    Attributes:
        d_state: states a channel.
        d_conv: taps of the causal convolution.
        expand: d_inner / d_model, unless d_inner is given.
        d_inner: channels of the scan; None is expand * d_model.
        dt_rank: width of the low-rank dt; None is ceil(d_model / 16).
        conv_bias: bias of the convolution.
        in_proj_bias: bias of in_proj.
        out_proj_bias: bias of out_proj.
        activation: of the convolved x; the gate is silu in all families, as in Mamba's kernel.
        x_norm: RMSNorm on dt, B and C: none (Mamba), learned weights (Jamba), no weights
            (FalconMamba).
        norm_eps: eps of those norms.
        dt_limit: bounds of dt after softplus, in prefill and decode alike.
        dt_min: smallest step at initialisation.
        dt_max: largest step at initialisation.
        dt_init_floor: no initial step lies below it.
    """

    kind: ClassVar[str] = "mamba1"
    d_state: int = 16
    d_conv: int = field(default=4, metadata={"min": 2, "max": 8})
    expand: float = field(default=2.0, metadata={"min": 0, "max": 2**16})
    d_inner: int | None = None
    dt_rank: int | None = None
    conv_bias: bool = True
    in_proj_bias: bool = False
    out_proj_bias: bool = False
    activation: Activation = "silu"
    x_norm: Literal["none", "learned", "weightless"] = "none"
    norm_eps: float = field(default=1e-5, metadata={"min": 0})
    dt_limit: tuple[float, float] = field(default=(0.0, math.inf), metadata={"max": math.inf})
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dt_init_floor: float = 1e-4

    @classmethod
    def tiny(cls) -> Self:
        """d_inner 24 over d_model 16, learned norms, every bias."""
        return cls(
            d_state=5, d_conv=3, d_inner=24, dt_rank=3, in_proj_bias=True, out_proj_bias=True,
            x_norm="learned", norm_eps=1e-3, dt_limit=(0.01, 2.0),
            input_multiplier=0.8, output_multiplier=1.3,
        )  # fmt: skip

    def check(self, where: str, d_model: int) -> None:
        """Refuse bounds in the wrong order and a scan without channels."""
        i, _ = self.widths(d_model)
        if i < 1:
            raise ConfigError(
                f"{where}.expand: ({self.expand}) times d_model ({d_model}) leaves no channel. "
                "Raise it."
            )
        low, high = self.dt_limit
        if not 0 <= low < high:
            rule = f"bounds in the wrong order ({low}, {high}); 0 <= low < high"
            raise ConfigError(f"{where}.dt_limit: {rule}. Swap them.")
        for name, value in (("dt_min", self.dt_min), ("dt_init_floor", self.dt_init_floor)):
            if not 0 < value < self.dt_max:
                rule = f"must lie between 0 and dt_max ({self.dt_max})"
                raise ConfigError(f"{where}.{name}: ({value}) {rule}. Choose one between.")

    def widths(self, d_model: int) -> tuple[int, int]:
        """(d_inner, dt_rank)."""
        return self.d_inner or int(self.expand * d_model), self.dt_rank or -(-d_model // 16)

    def params(self, d_model: int) -> dict[str, Param]:
        """The table; in_proj holds the rows x | z, x_proj the rows dt | B | C."""
        (i, r), n = self.widths(d_model), self.d_state
        channels = Part(i, i, "d_inner")
        rows, columns = Split(0, (channels,)), Split(1, (channels,))
        both, fan = Split(0, (channels, channels)), init.fan_in_uniform
        table = {"in_proj.weight": Param((2 * i, d_model), fan(d_model), both)}
        if self.in_proj_bias:
            table["in_proj.bias"] = Param((2 * i,), fan(d_model), both, decay=False)
        table["conv_weight"] = Param((i, self.d_conv), fan(self.d_conv), rows)
        if self.conv_bias:
            table["conv_bias"] = Param((i,), fan(self.d_conv), rows, decay=False)
        table["x_proj.weight"] = Param((r + 2 * n, i), fan(i), columns)
        if self.x_norm == "learned":
            for name, width in (("dt_norm.weight", r), ("B_norm.weight", n), ("C_norm.weight", n)):
                table[name] = Param((width,), init.constant(1.0), decay=False)
        dt_bias = init.dt_bias(self.dt_min, self.dt_max, self.dt_init_floor)
        table |= {
            "dt_proj.weight": Param((i, r), init.uniform(r**-0.5), rows),
            "dt_bias": Param((i,), dt_bias, rows, decay=False, fp32=True),
            "A_log": Param((i, n), init.log_arange(), rows, decay=False, fp32=True),
            "D": Param((i,), init.constant(1.0), rows, decay=False, fp32=True),
            "out_proj.weight": Param((d_model, i), fan(i), columns, residual=True),
        }
        if self.out_proj_bias:
            table["out_proj.bias"] = Param((d_model,), init.constant(0.0), decay=False)
        return table

    def state(self, d_model: int, batch: int, max_len: int) -> dict[str, StateTensor]:
        """The last d_conv - 1 inputs of the convolution and the fp32 scan state.

        No growth with max_len.
        """
        i, _ = self.widths(d_model)
        channels = (Part(i, i, "d_inner"),)
        return {
            "conv_state": StateTensor((batch, self.d_conv - 1, i), None, channels, dim=2),
            "ssm_state": StateTensor((batch, i, self.d_state), torch.float32, channels, dim=1),
        }

    def flops(self, d_model: int, context: int) -> int:
        """Projections, convolution, 7 operations a state, skip and gate.

        Of a state: dt A, exp, dt x B, multiply-add, C multiply-add.
        """
        (i, r), n = self.widths(d_model), self.d_state
        projections = 2 * d_model * 2 * i + 2 * i * (r + 2 * n) + 2 * r * i + 2 * i * d_model
        return projections + 2 * i * self.d_conv + 7 * i * n + 4 * i

    def build(self, d_model: int, **where: Any) -> Mamba1:
        """The module."""
        return Mamba1(self, d_model, **where)


class Mamba1(Layer):
    """out_proj(scan(silu(conv(x))) * silu(z)) with dt, B and C read off the convolved x.

    arXiv 2312.00752, algorithm 2.
    """

    config: Mamba1Config

    def __init__(self, config: Mamba1Config, d_model: int, **where: Any) -> None:
        super().__init__(config, d_model, **where)
        self.widths = config.widths(d_model)
        self.in_proj = self.linear("in_proj")
        self.conv_weight, self.conv_bias = self.param("conv_weight"), self.param("conv_bias")
        self.x_proj, self.dt_proj = self.linear("x_proj"), self.linear("dt_proj")
        self.dt_bias, self.A_log = self.param("dt_bias"), self.param("A_log")
        self.D = self.param("D")
        self.out_proj = self.linear("out_proj")
        if config.x_norm != "none":
            self.dt_norm = RMSNorm(self.param("dt_norm.weight"), config.norm_eps)
            self.B_norm = RMSNorm(self.param("B_norm.weight"), config.norm_eps)
            self.C_norm = RMSNorm(self.param("C_norm.weight"), config.norm_eps)

    def forward(self, x: Tensor, state: State | None, ctx: Sequence) -> Tensor:
        """(b, l, d) -> this rank's share of (b, l, d)."""
        xz = self.in_proj(x)
        is_training = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if is_training and state is None and ctx.pad_mask is None:
            y = self._in_one_node(xz, ctx)
            if y is not None:
                return y
        x, z = xz.chunk(2, -1)  # (b, l, i)
        # blank before the convolution, which reads neighbours, and after it, whose bias would
        # refill padding.
        x = ctx.blank_padding(self._convolve(ctx.blank_padding(x), state, ctx))
        dt, B, C = self._select(x)
        return self.out_proj(self._scan(x, self.dt_proj(dt), B, C, z, state, ctx))

    def _in_one_node(self, xz: Tensor, ctx: Sequence) -> Tensor | None:
        """The rest of the layer as one node of autograd; None where that is not the same."""
        has_norms = self.config.x_norm != "none"
        norms = [self.dt_norm, self.B_norm, self.C_norm] if has_norms else []
        projections = (self.x_proj, self.dt_proj, self.out_proj)
        if self.config.activation != "silu" or not are_plain(*projections, *norms):
            return None
        # a module in their place may have a bias
        if self.x_proj.bias is not None or self.dt_proj.bias is not None:
            return None
        x_proj, dt_proj, out_proj = (module.weight for module in projections)
        dt_norm, B_norm, C_norm = (norm.weight for norm in norms) if norms else (None, None, None)
        weights = Weights(
            self.conv_weight, self.conv_bias, x_proj, dt_norm, B_norm, C_norm, dt_proj,
            self.dt_bias, self.A_log, self.D, out_proj, self.out_proj.bias,
        )  # fmt: skip
        launchers = find_launchers(xz, weights)
        if launchers is None:
            return None
        if weights.out_bias is not None:
            weights = weights._replace(out_bias=self.parallel.tp.share(weights.out_bias))
        eps = self.config.norm_eps if has_norms else None
        options = Options(launchers, self.config.dt_limit, eps, self.parallel.tp)
        return inner(xz, decays(self.A_log.detach()), weights, ctx.cu_seqlens, options)

    def _convolve(self, x: Tensor, state: State | None, ctx: Sequence) -> Tensor:
        # the op fuses silu, which every released model uses
        fused = "silu" if self.config.activation == "silu" else None
        if state and ctx.is_step(x):
            x = causal_conv1d_step(
                x[:, 0], state.tensors["conv_state"], self.conv_weight, self.conv_bias,
                activation=fused, slots=ctx.slots,
            )[:, None]  # fmt: skip
        else:
            x, conv_state = causal_conv1d(
                x, self.conv_weight, self.conv_bias, activation=fused, cu_seqlens=ctx.cu_seqlens,
                initial_state=state.get("conv_state", ctx) if state else None,
            )  # fmt: skip
            if state:
                state.set("conv_state", conv_state, ctx)
        return x if fused else ACTIVATIONS[self.config.activation](x)

    def _scan(
        self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor,
        state: State | None, ctx: Sequence,
    ) -> Tensor:  # fmt: skip
        options = {"D": self.D, "dt_bias": self.dt_bias, "dt_limit": self.config.dt_limit}
        if state and ctx.is_step(x):
            # the logarithms themselves: -exp of them would be two more kernels a token
            return selective_scan_step(
                x[:, 0], state.tensors["ssm_state"], dt[:, 0], self.A_log, B, C, A_is_log=True,
                z=z[:, 0], dt_softplus=True, slots=ctx.slots, **options,
            )[:, None]  # fmt: skip
        y, ssm_state = selective_scan(
            x, dt, decays(self.A_log), B[:, :, None], C[:, :, None], z=z, dt_softplus=True,
            cu_seqlens=ctx.cu_seqlens,
            initial_state=state.get("ssm_state", ctx) if state else None, **options,
        )  # fmt: skip
        if state:
            state.set("ssm_state", ssm_state, ctx)
        return y

    def _select(self, x: Tensor) -> tuple[Tensor, ...]:
        # dt, B and C depend on every channel: the ranks' shares are summed before the norms, which
        # are not linear, and each rank uses them for its own channels, so their gradients are too.
        tp = self.parallel.tp
        widths = [self.widths[1], self.config.d_state, self.config.d_state]
        dtBC = tp.sum_out(self.x_proj(x))
        if self.config.x_norm != "none":
            dt, B, C = dtBC.split(widths, -1)
            dtBC = torch.cat([self.dt_norm(dt)[0], self.B_norm(B)[0], self.C_norm(C)[0]], -1)
        return tp.copy_in(dtBC).split(widths, -1)


def decays(A_log: Tensor) -> Tensor:
    """A = -exp(A_log), in fp32 at least also where model.to(dtype) made A_log narrower."""
    return -A_log.to(torch.promote_types(A_log.dtype, torch.float32)).exp()
