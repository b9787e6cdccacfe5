"""Feed-forward layer, gated (SwiGLU, arXiv 2002.05202) or plain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch.nn.functional as F
from torch import Tensor

from hybridzoo.layers import init
from hybridzoo.layers.base import Layer, LayerConfig, Param, Sequence, State
from hybridzoo.sharding import Part, Split

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


@dataclass(frozen=True, kw_only=True)
class MLPConfig(LayerConfig):
    """Hyperparameters of a feed-forward layer.

    Attributes:
        d_ff: hidden width.
        activation: applied to the gate, or to the hidden units when not gated.
        gated: down(act(gate(x)) * up(x)) instead of down(act(up(x))).
        bias: biases of every projection.
    """

    kind: ClassVar[str] = "mlp"
    d_ff: int
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False

    @classmethod
    def tiny(cls) -> Self:
        """20 gated units with biases."""
        return cls(
            d_ff=20, activation="gelu_tanh", bias=True, input_multiplier=0.8, output_multiplier=1.3
        )

    def params(self, d_model: int) -> dict[str, Param]:
        """The table; gate_up_proj holds the rows gate | up."""
        unit = Part(self.d_ff, self.d_ff, "d_ff")
        name, n = ("gate_up_proj", 2) if self.gated else ("up_proj", 1)
        rows, n_rows = Split(0, (unit,) * n), n * self.d_ff
        table = {f"{name}.weight": Param((n_rows, d_model), init.normal(0.02), rows)}
        if self.bias:
            table[f"{name}.bias"] = Param((n_rows,), init.constant(0.0), rows, decay=False)
        down = Param((d_model, self.d_ff), init.normal(0.02), Split(1, (unit,)), residual=True)
        table["down_proj.weight"] = down
        if self.bias:
            table["down_proj.bias"] = Param((d_model,), init.constant(0.0), decay=False)
        return table

    def flops(self, d_model: int, context: int) -> int:
        """Projections, and the activation and product of each hidden unit."""
        return 2 * d_model * self.d_ff * (3 if self.gated else 2) + 2 * self.d_ff

    def build(self, d_model: int, **where: Any) -> MLP:
        """The module."""
        return MLP(self, d_model, **where)


class MLP(Layer):
    """down_proj(act(gate) * up), or down_proj(act(up))."""

    config: MLPConfig

    def __init__(self, config: MLPConfig, d_model: int, **where: Any) -> None:
        super().__init__(config, d_model, **where)
        if config.gated:
            self.gate_up_proj = self.linear("gate_up_proj")
        else:
            self.up_proj = self.linear("up_proj")
        self.down_proj = self.linear("down_proj")

    def forward(self, x: Tensor, state: State | None, ctx: Sequence) -> Tensor:
        """(b, l, d) -> this rank's share of (b, l, d)."""
        hidden = self.gate_up_proj(x) if self.config.gated else self.up_proj(x)
        return self.down_proj(activate(hidden, self.config.activation, self.config.gated))


def activate(hidden: Tensor, activation: str, gated: bool) -> Tensor:
    """act(gate) * up for hidden (.., gate | up), or act(hidden)."""
    act = ACTIVATIONS[activation]
    if not gated:
        return act(hidden)
    gate, up = hidden.chunk(2, -1)
    return act(gate) * up
