"""Mixture of experts: every token runs through its router's top_k; none is dropped."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridzoo.errors import ConfigError
from hybridzoo.kernels.dispatch import autocast_dtype, no_autocast
from hybridzoo.kernels.grouped_mm import grouped_mm
from hybridzoo.kernels.packing import inverse
from hybridzoo.layers import init
from hybridzoo.layers.base import Layer, LayerConfig, Param, Sequence, State
from hybridzoo.layers.mlp import Activation, activate
from hybridzoo.sharding import Cut, Part, Replicate, Split


@dataclass(frozen=True, kw_only=True)
class MoEConfig(LayerConfig):
    """Hyperparameters of a mixture of experts.

    Attributes:
        d_ff: hidden width of one expert.
        n_experts: experts.
        top_k: experts a token.
        activation: as in mlp.
        gated: as in mlp.
        router: softmax_topk scores all experts, then picks (Jamba); topk_softmax picks, then scores
            the picked (Granite); sigmoid scores each expert by itself (Nemotron-H, DeepSeek-V3).
        router_fp32: compute the router's logits in fp32 instead of the model's dtype.
        renormalize: divide the picked scores by their sum.
        scaling: multiplies the picked scores.
        correction_bias: a bias a expert, added for picking only and not trained by gradients.
        n_expert_groups: experts form groups, scored by the sum of their two best; only the best
            groups may be picked.
        top_k_groups: groups that may be picked.
        shared_d_ff: width of an expert that every token uses; None is no such expert.
        d_latent: width that the experts read and write, projected down before them and up after
            their sum (Nemotron-3 Super); router and shared expert keep d_model; None is d_model.
        bias: biases of the shared expert's and the latent projections; experts never have one.
        aux_loss: coefficient of the load-balancing loss (Switch, arXiv 2101.03961, eq. 4).
        z_loss: coefficient of the router z-loss (ST-MoE, arXiv 2202.08906, eq. 5).
    """

    kind: ClassVar[str] = "moe"
    d_ff: int
    n_experts: int
    top_k: int
    activation: Activation = "silu"
    gated: bool = True
    router: Literal["softmax_topk", "topk_softmax", "sigmoid"] = "softmax_topk"
    router_fp32: bool = True
    renormalize: bool = False
    scaling: float = 1.0
    correction_bias: bool = False
    n_expert_groups: int = 1
    top_k_groups: int = 1
    shared_d_ff: int | None = None
    d_latent: int | None = None
    bias: bool = False
    aux_loss: float = field(default=0.001, metadata={"min": 0})
    z_loss: float = field(default=0.0, metadata={"min": 0})

    @classmethod
    def tiny(cls) -> Self:
        """6 experts in 3 groups, 2 a token, sigmoid scores, a correction bias, a shared expert."""
        return cls(
            d_ff=10, n_experts=6, top_k=2, router="sigmoid", renormalize=True, scaling=1.7,
            correction_bias=True, n_expert_groups=3, top_k_groups=2, shared_d_ff=12,
            aux_loss=0.02, z_loss=0.01,
            input_multiplier=0.8, output_multiplier=1.3,
        )  # fmt: skip

    def check(self, where: str, d_model: int) -> None:
        """Refuse more picks than there are experts to pick from."""
        if self.n_experts % self.n_expert_groups:
            raise ConfigError(
                f"{where}.n_expert_groups: ({self.n_expert_groups}) must divide n_experts "
                f"({self.n_experts}). Use a divisor."
            )
        if self.top_k_groups > self.n_expert_groups:
            raise ConfigError(
                f"{where}.top_k_groups: ({self.top_k_groups}) exceeds n_expert_groups "
                f"({self.n_expert_groups}). Lower it."
            )
        pickable = self.n_experts // self.n_expert_groups * self.top_k_groups
        if self.top_k > pickable:
            raise ConfigError(
                f"{where}.top_k: ({self.top_k}) exceeds the experts that a token may pick from "
                f"({pickable}). Lower it."
            )
        if self.bias and not (self.shared_d_ff or self.d_latent):
            rule = "only a shared expert and latent projections have one"
            raise ConfigError(f"{where}.bias: (true) {rule}. Drop it, or give shared_d_ff.")

    def params(self, d_model: int) -> dict[str, Param]:
        """The table; expert e's rows of expert_gate_up_weight are gate | up."""
        e, f, n = self.n_experts, self.d_ff, 2 if self.gated else 1
        unit, used = Part(f, f, "d_ff"), (self.top_k, self.n_experts)
        rows, columns = Split(1, (unit,) * n), Split(2, (unit,))
        width, whole = self.d_latent or d_model, Replicate(partial_grad=True)
        up, down = (e, n * f, width), (e, width, f)
        is_last = self.d_latent is None
        normal = init.normal(0.02)
        table = {
            "expert_up_weight": Param(up, normal, rows, active=used, experts=True),
            "expert_down_weight": Param(
                down, normal, columns, residual=is_last, active=used, experts=True
            ),
            "router_weight": Param((e, d_model), normal, whole),
        }
        if self.correction_bias:
            table["correction_bias"] = Param(
                (e,), init.constant(0.0), decay=False, fp32=True, trained=False
            )
        if self.shared_d_ff:
            shared = Part(self.shared_d_ff, self.shared_d_ff, "shared_d_ff")
            shape, rows = (n * self.shared_d_ff, d_model), Split(0, (shared,) * n)
            table |= self._projection("shared_up_proj", shape, rows, rows)
            shape, columns = (d_model, self.shared_d_ff), Split(1, (shared,))
            table |= self._projection(
                "shared_down_proj", shape, columns, Replicate(), residual=True
            )
        if self.d_latent:
            table |= self._projection("latent_down_proj", (width, d_model), whole, whole)
            table |= self._projection(
                "latent_up_proj", (d_model, width), whole, whole, residual=True
            )
        return table

    def _projection(
        self, name: str, shape: tuple[int, int], cut: Cut, bias_cut: Cut, residual: bool = False
    ) -> dict[str, Param]:
        weight = Param(shape, init.normal(0.02), cut, residual=residual)
        bias = Param(shape[:1], init.constant(0.0), bias_cut, decay=False)
        return {f"{name}.weight": weight} | ({f"{name}.bias": bias} if self.bias else {})

    def flops(self, d_model: int, context: int) -> int:
        """Router, the picked experts, the shared one and the latent projections."""
        picked, shared = self.top_k * self.d_ff, self.shared_d_ff or 0
        read = (self.d_latent or d_model) * picked + d_model * shared
        experts = 2 * read * (3 if self.gated else 2) + 2 * (picked + shared)
        return 2 * d_model * self.n_experts + experts + 4 * d_model * (self.d_latent or 0)

    def build(self, d_model: int, **where: Any) -> MoE:
        """The module."""
        return MoE(self, d_model, **where)


class MoE(Layer):
    """sum_k w_k expert_k(x) + shared(x), or up(sum_k w_k expert_k(down(x))) + shared(x).

    Tokens are sorted by expert, so each expert is one matrix product.

    Under expert parallelism (`parallel.ep`) each rank holds a contiguous range of the experts and
    reads sequences of its own: tokens travel to their experts and back (layers/exchange.py), and
    the host waits for the device once a forward, to read how many. Every rank of the axis must run
    as many forwards as the others, in training and in generation; a rank may have no tokens. An
    expert's gradients are those of all the axis's tokens, so they are summed over the
    data-parallel ranks that hold the same experts, everything else's over all of dp. The balance
    loss is each rank's own, over the tokens that it reads.
    """

    config: MoEConfig

    def __init__(self, config: MoEConfig, d_model: int, **where: Any) -> None:
        super().__init__(config, d_model, **where)
        self.expert_up_weight = self.param("expert_up_weight")
        self.expert_down_weight = self.param("expert_down_weight")
        self.router_weight = self.param("router_weight")
        self.correction_bias = self.param("correction_bias")
        if config.shared_d_ff:
            self.shared_up_proj = self.linear("shared_up_proj")
            self.shared_down_proj = self.linear("shared_down_proj")
        if config.d_latent:
            self.latent_down_proj = self.linear("latent_down_proj")
            self.latent_up_proj = self.linear("latent_up_proj")

    def forward(self, x: Tensor, state: State | None, ctx: Sequence) -> Tensor:
        """(b, l, d) -> this rank's share of (b, l, d); the balance losses go to ctx.aux."""
        tokens = x.flatten(0, 1)  # (t, d)
        # the choice of experts hangs on the router's logits: autocast would round them
        with no_autocast(x.device):
            logits = self._logits(tokens)  # (t, e)
            weights, chosen, scores = self._route(logits)
        if ctx.aux is not None:
            ctx.aux.append(self._balance(logits, scores, chosen, ctx))
        if self.config.d_latent:
            latent = self._experts(self.latent_down_proj(tokens), weights, chosen)
            y = self.latent_up_proj(latent)
        else:
            y = self._experts(tokens, weights, chosen)
        if self.config.shared_d_ff:
            up = self.shared_up_proj(tokens)
            y = y + self.shared_down_proj(activate(up, self.config.activation, self.config.gated))
        return y.view(x.shape)

    @torch.no_grad()
    def load(self, x: Tensor) -> Tensor:
        """Share of all picks that each expert gets of the tokens x (b, l, d), (e,) fp32."""
        with no_autocast(x.device):
            _, chosen, _ = self._route(self._logits(x.flatten(0, 1)))
        return chosen.flatten().bincount(minlength=self.config.n_experts) / chosen.numel()

    def _logits(self, tokens: Tensor) -> Tensor:
        router_weight = self.partial_params()["router_weight"]
        wide = torch.promote_types(tokens.dtype, torch.float32)
        dtype = wide if self.config.router_fp32 else tokens.dtype
        return F.linear(tokens.to(dtype), router_weight.to(dtype)).to(wide)

    def _route(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights (t, k) and indices (t, k) of the picked, and every expert's score (t, e)."""
        config = self.config
        if config.router == "softmax_topk":
            scores = logits.softmax(-1)
        else:
            scores = logits.sigmoid() if config.router == "sigmoid" else logits
        choice = scores if self.correction_bias is None else scores + self.correction_bias
        if config.n_expert_groups > 1:
            choice = self._best_groups(choice)
        chosen = choice.topk(config.top_k, -1).indices
        weights = scores.gather(-1, chosen)
        if config.router == "topk_softmax":
            weights, scores = weights.softmax(-1), logits.softmax(-1)
        if config.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * config.scaling, chosen, scores

    def _best_groups(self, choice: Tensor) -> Tensor:
        groups = choice.unflatten(-1, (self.config.n_expert_groups, -1))  # (t, groups, e / groups)
        totals = groups.topk(min(2, groups.shape[-1]), -1).values.sum(-1)
        best = totals.topk(self.config.top_k_groups, -1).indices
        keep = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, True)
        return groups.masked_fill(~keep[..., None], -torch.inf).flatten(-2)

    def _experts(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        # sorted by expert; the ends come from a search in the sorted list, so nothing waits for the
        # host.
        expert, order = chosen.flatten().sort(stable=True)
        every = torch.arange(self.config.n_experts, device=tokens.device)
        offsets = torch.searchsorted(expert, every, right=True).to(torch.int32)
        # autocast knows torch's own products only; without this the experts alone would stay fp32.
        dtype = autocast_dtype(tokens.device) or tokens.dtype
        rows = tokens[order // self.config.top_k].to(dtype)
        if self.parallel.ep.world == 1:
            y = self._products(rows, offsets)
        else:
            from hybridzoo.layers.exchange import elsewhere

            y = elsewhere(self._products, rows, offsets, self.parallel.ep)
        # back through the inverse permutation and a sum over k: deterministic, unlike index_add on
        # a GPU.
        picked = y[inverse(order)].unflatten(0, (-1, self.config.top_k))
        return (picked * weights[..., None].to(dtype)).sum(1)

    def _products(self, rows: Tensor, offsets: Tensor) -> Tensor:
        up_weight, down_weight = (
            w.to(rows.dtype) for w in (self.expert_up_weight, self.expert_down_weight)
        )
        up = grouped_mm(rows, up_weight, offsets)
        hidden = activate(up, self.config.activation, self.config.gated)
        return grouped_mm(hidden.to(rows.dtype), down_weight, offsets)

    def _balance(self, logits: Tensor, scores: Tensor, chosen: Tensor, ctx: Sequence) -> Tensor:
        real = None if ctx.pad_mask is None else ctx.pad_mask.flatten().to(scores.dtype)
        count = max(1, len(scores)) if real is None else real.sum().clamp(min=1)
        mask = 1.0 if real is None else real[:, None]
        share = scores / scores.sum(-1, keepdim=True)
        picked = F.one_hot(chosen, self.config.n_experts).sum(1)  # (t, e)
        load = (picked * mask).sum(0) / (count * self.config.top_k)
        balance = self.config.n_experts * (load * (share * mask).sum(0) / count).sum()
        z = (logits.logsumexp(-1).square() * (1.0 if real is None else real)).sum() / count
        loss = self.config.aux_loss * balance + self.config.z_loss * z
        # every tp rank computes the whole loss, but the router's gradients are summed over them:
        # each gives its share.
        share_of_grad = loss / self.parallel.tp.world
        return share_of_grad + (loss - share_of_grad).detach()
