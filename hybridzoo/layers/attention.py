"""Causal grouped-query attention (arXiv 2305.13245); no padding enters its cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridzoo.errors import ConfigError
from hybridzoo.kernels.attention import attention
from hybridzoo.kernels.causal_conv1d import causal_conv1d
from hybridzoo.layers import init
from hybridzoo.layers.base import Layer, LayerConfig, Param, Sequence, State, StateTensor
from hybridzoo.layers.rope import RopeScaling, apply_rope, read_scaling
from hybridzoo.sharding import Part, Split


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(LayerConfig):
    """Hyperparameters of an attention layer.

    Attributes:
        n_heads: query heads.
        n_kv_heads: key and value heads; None is n_heads.
        head_dim: channels a head; None is d_model / n_heads.
        qkv_bias: bias of qkv_proj.
        out_proj_bias: bias of out_proj.
        rope_fraction: share of every head that rotary embedding turns: 0 none, 1 all.
        rope_theta: base of its wavelengths.
        rope_scaling: how a longer context is turned: rope_type (linear, llama3 or yarn), factor and
            the other keys of transformers' files; None is plain.
        window_size: keys that a query sees, itself included; None is all before it.
        softmax_scale: multiplies the scores; None is 1 / sqrt(head_dim).
        d_conv: taps of a causal convolution over q, k and v, without activation, before the rotary
            embedding (mamba2attn); None is no convolution.
        conv_bias: bias of that convolution.
        parallel_d_ff: hidden width of a gated feed-forward layer beside the heads, which shares
            their two projections (mamba_ssm's mlp_dim); None is none.
    """

    kind: ClassVar[str] = "attention"
    n_heads: int
    n_kv_heads: int | None = None
    head_dim: int | None = None
    qkv_bias: bool = False
    out_proj_bias: bool = False
    rope_fraction: float = 0.0
    rope_theta: float = field(default=10000.0, metadata={"min": 1})
    rope_scaling: RopeScaling | None = None
    window_size: int | None = None
    softmax_scale: float | None = None
    d_conv: int | None = field(default=None, metadata={"min": 2, "max": 8})
    conv_bias: bool = True
    parallel_d_ff: int | None = None

    def __post_init__(self) -> None:
        """Read rope_scaling, and refuse a field of the wrong type or range."""
        if self.rope_scaling is not None:
            scaling = read_scaling("attention.rope_scaling", self.rope_scaling)
            object.__setattr__(self, "rope_scaling", scaling)
        super().__post_init__()

    @classmethod
    def from_dict(cls, where: str, options: Mapping[str, Any]) -> Self:
        """Build from a mapping; rope_scaling is one too. ConfigError as of every kind."""
        if isinstance(options, Mapping) and options.get("rope_scaling") is not None:
            scaling = read_scaling(f"{where}.rope_scaling", options["rope_scaling"])
            options = {**options, "rope_scaling": scaling}
        return super().from_dict(where, options)

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, and `kind`, as plain values."""
        plain = super().to_dict()
        return plain | ({"rope_scaling": self.rope_scaling.to_dict()} if self.rope_scaling else {})

    @classmethod
    def tiny(cls) -> Self:
        """4 query heads of 6 on 2 key heads, two thirds of each rotated, a window, every bias."""
        return cls(
            n_heads=4, n_kv_heads=2, head_dim=6, qkv_bias=True, out_proj_bias=True,
            rope_fraction=2 / 3, rope_theta=100.0, window_size=7, softmax_scale=0.5,
            input_multiplier=0.8, output_multiplier=1.3,
        )  # fmt: skip

    def check(self, where: str, d_model: int) -> None:
        """Refuse head counts and rotary widths that do not fit."""
        if self.head_dim is None and d_model % self.n_heads:
            raise ConfigError(
                f"{where}.n_heads: ({self.n_heads}) must divide d_model ({d_model}). "
                "Use a divisor, or give head_dim."
            )
        if self.n_heads % (self.n_kv_heads or self.n_heads):
            raise ConfigError(
                f"{where}.n_kv_heads: ({self.n_kv_heads}) must divide n_heads ({self.n_heads}). "
                "Use a divisor of it."
            )
        if not 0 <= self.rope_fraction <= 1 or self.rotary_dim(d_model) % 2:
            raise ConfigError(
                f"{where}.rope_fraction: ({self.rope_fraction}) must lie in 0..1 and turn an even "
                f"number of head_dim's channels ({self.rotary_dim(d_model)} now). "
                "Choose a fraction of head_dim that is even."
            )
        if self.rope_scaling is not None:
            if not self.rope_fraction:
                rule = "with rope_fraction (0.0) nothing is turned"
                raise ConfigError(f"{where}.rope_scaling: {rule}. Drop it, or give rope_fraction.")
            self.rope_scaling.check(f"{where}.rope_scaling", self.rope_theta)

    def widths(self, d_model: int) -> tuple[int, int, int]:
        """(n_heads, n_kv_heads, head_dim)."""
        n_kv_heads = self.n_kv_heads or self.n_heads
        return self.n_heads, n_kv_heads, self.head_dim or d_model // self.n_heads

    def rotary_dim(self, d_model: int) -> int:
        """Channels of a head that rotary embedding turns."""
        return round(self.rope_fraction * self.widths(d_model)[2])

    def parts(self, d_model: int) -> tuple[Part, Part, Part]:
        """q, k, v: rows of qkv_proj, cut by head; few key heads are shared by several ranks."""
        h, hk, p = self.widths(d_model)
        key = Part(hk * p, hk, "n_kv_heads", replicates=True)
        return Part(h * p, h, "n_heads"), key, key

    def params(self, d_model: int) -> dict[str, Param]:
        """The table.

        qkv_proj holds the rows q | k | v | gate | up, the convolution the channels q | k | v,
        out_proj the columns heads | hidden; gate, up and hidden are parallel_d_ff's.
        """
        qkv, unit = self.parts(d_model), self._parallel_units()
        rows, columns = Split(0, (*qkv, *unit, *unit)), Split(1, (qkv[0], *unit))
        n_rows, n_columns, n_conv = (
            sum(p.width for p in ps) for ps in (rows.parts, columns.parts, qkv)
        )
        table = {"qkv_proj.weight": Param((n_rows, d_model), init.normal(0.02), rows)}
        if self.qkv_bias:
            table["qkv_proj.bias"] = Param((n_rows,), init.constant(0.0), rows, decay=False)
        if self.d_conv:
            fan, conv = init.fan_in_uniform(self.d_conv), Split(0, qkv)
            table["conv_weight"] = Param((n_conv, self.d_conv), fan, conv)
            if self.conv_bias:
                table["conv_bias"] = Param((n_conv,), fan, conv, decay=False)
        table["out_proj.weight"] = Param(
            (d_model, n_columns), init.normal(0.02), columns, residual=True
        )
        if self.out_proj_bias:
            table["out_proj.bias"] = Param((d_model,), init.constant(0.0), decay=False)
        return table

    def state(self, d_model: int, batch: int, max_len: int) -> dict[str, StateTensor]:
        """Keys and values of max_len tokens and the number of tokens so far.

        With d_conv also the convolution's last d_conv - 1 inputs.
        """
        _, hk, p = self.widths(d_model)
        heads = (Part(hk, hk, "n_kv_heads", replicates=True),)
        cache = StateTensor((batch, max_len, hk, p), None, heads, dim=2)
        state = {"k_cache": cache, "v_cache": cache, "position": StateTensor((batch,), torch.int32)}
        if self.d_conv:
            qkv = self.parts(d_model)
            shape = (batch, self.d_conv - 1, sum(part.width for part in qkv))
            state["conv_state"] = StateTensor(shape, None, qkv, dim=2)
        return state

    def flops(self, d_model: int, context: int) -> int:
        """Projections, convolution, scores and values of the keys that the token sees, itself too.

        Of parallel_d_ff the projections, the activation and the product.
        """
        q, k, v = (p.width for p in self.parts(d_model))
        seen = min(context + 1, self.window_size or context + 1)
        heads = 2 * d_model * (q + k + v) + 2 * q * d_model + 4 * q * seen
        convolution, hidden = 2 * (q + k + v) * (self.d_conv or 0), self.parallel_d_ff or 0
        return heads + convolution + 6 * d_model * hidden + 2 * hidden

    def _parallel_units(self) -> tuple[Part, ...]:
        f = self.parallel_d_ff
        return (Part(f, f, "parallel_d_ff"),) if f else ()

    def build(self, d_model: int, **where: Any) -> Attention:
        """The module."""
        return Attention(self, d_model, **where)


class Attention(Layer):
    """out_proj(softmax(q k^T scale) v), causal, beside silu(gate) * up if parallel_d_ff is given.

    Position t of a sequence is index t of its cache.
    """

    config: AttentionConfig

    def __init__(self, config: AttentionConfig, d_model: int, **where: Any) -> None:
        super().__init__(config, d_model, **where)
        self.qkv_proj, self.out_proj = self.linear("qkv_proj"), self.linear("out_proj")
        self.conv_weight, self.conv_bias = self.param("conv_weight"), self.param("conv_bias")
        self.head_dim, self.rotary_dim = config.widths(d_model)[2], config.rotary_dim(d_model)

    def init_state(self, batch: int, max_len: int) -> State:
        """Zeros for max_len tokens and one more, the scratch that padding is written to."""
        return super().init_state(batch, max_len + 1)

    def forward(self, x: Tensor, state: State | None, ctx: Sequence) -> Tensor:
        """(b, l, d) -> this rank's share of (b, l, d)."""
        partial = self.partial_params()
        q, k, v, *gate_up = self.project("qkv_proj", x, partial)
        if self.config.d_conv:
            q, k, v = self._convolved([q, k, v], partial, state, ctx)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))  # (b, l, h or hk, p)
        positions = ctx.local_positions(x)
        if state:
            positions = self._absolute(positions, state, ctx)
        if self.rotary_dim:
            turn = (positions, self.config.rope_theta, self.rotary_dim, self.config.rope_scaling)
            q, k = apply_rope(q, *turn), apply_rope(k, *turn)
        options = {"scale": self.config.softmax_scale, "window_size": self.config.window_size}
        if state:
            o = self._cached(q, k, v, positions, state, ctx, options)
        else:
            packs = {"cu_seqlens": ctx.cu_seqlens, "max_seqlen": ctx.max_seqlen}
            o = attention(q, k, v, k_start=_first_token(ctx.pad_mask), **packs, **options)
        o = o.flatten(2)
        if gate_up:
            gate, up = gate_up
            o = torch.cat([o, F.silu(gate) * up], -1)
        return self.out_proj(o)

    def _convolved(
        self, qkv: list[Tensor], partial: dict[str, Tensor], state: State | None, ctx: Sequence
    ) -> tuple[Tensor, ...]:
        # blank before, for it reads neighbours; what its bias puts at padding no token sees.
        y, conv_state = causal_conv1d(
            ctx.blank_padding(torch.cat(qkv, -1)), self.whole("conv_weight", partial),
            self.whole("conv_bias", partial), cu_seqlens=ctx.cu_seqlens,
            initial_state=state.get("conv_state", ctx) if state else None,
        )  # fmt: skip
        if state:
            state.set("conv_state", conv_state, ctx)
        return y.split([t.shape[-1] for t in qkv], -1)

    def _absolute(self, positions: Tensor, state: State, ctx: Sequence) -> Tensor:
        # tokens of this call follow those of the calls before; padding stays at -1.
        start = state.get("position", ctx)
        if ctx.slots is not None:
            # what a dropped row reads is another's: its position there may be the cache's last
            start = start.where(ctx.slots >= 0, 0)
        start = start[:, None] if ctx.seq_idx is None else start[ctx.seq_idx][None]
        return torch.where(positions < 0, positions, positions + start)

    def _cached(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        state: State,
        ctx: Sequence,
        options: dict[str, Any],
    ) -> Tensor:
        if ctx.cu_seqlens is not None:
            q, k, v = ctx.unpack(q), ctx.unpack(k), ctx.unpack(v)
            positions = ctx.unpack(positions[:, :, None], fill=-1)[:, :, 0]
        capacity = state.tensors["k_cache"].shape[1] - 1
        if q.shape[1] > capacity:
            raise ConfigError(
                f"attention: {q.shape[1]} tokens do not fit a state of max_len ({capacity}); "
                "a state is made for the longest text. Pass a larger max_len to init_state."
            )
        k_cache = _write(state.get("k_cache", ctx), k, positions)
        v_cache = _write(state.get("v_cache", ctx), v, positions)
        state.set("k_cache", k_cache, ctx)
        state.set("v_cache", v_cache, ctx)
        state.set(
            "position", state.get("position", ctx) + (positions >= 0).sum(1, dtype=torch.int32), ctx
        )
        o = attention(q, k_cache.to(q.dtype), v_cache.to(q.dtype), q_positions=positions, **options)
        return o if ctx.cu_seqlens is None else ctx.repack(o)


def _first_token(pad_mask: Tensor | None) -> Tensor | None:
    # where a row starts, not how much of it is padding: behind the last token padding is harmless
    # here, for no token sees it
    return None if pad_mask is None else pad_mask.int().argmax(1).to(torch.int32)


def _write(cache: Tensor, new: Tensor, positions: Tensor) -> Tensor:
    """The cache (b, m, hk, p) with new (b, l, hk, p) at its tokens' positions.

    Padding goes to the scratch at m - 1.
    """
    index = torch.where(positions < 0, cache.shape[1] - 1, positions).long()
    place = (torch.arange(cache.shape[0], device=cache.device)[:, None], index)
    new = new.to(cache.dtype)
    return cache.index_put(place, new) if torch.is_grad_enabled() else cache.index_put_(place, new)
