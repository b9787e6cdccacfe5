"""A kind kept outside the package: y = scale * x ** power."""

from dataclasses import dataclass
from typing import ClassVar

from hybridzoo.layers import Layer, LayerConfig, Param, init


@dataclass(frozen=True, kw_only=True)
class OutsideConfig(LayerConfig):
    kind: ClassVar[str] = "outside"
    power: int = 2

    @classmethod
    def tiny(cls):
        return cls(power=3)

    def params(self, d_model):
        return {"scale": Param((1,), init.constant(1.0))}

    def flops(self, d_model, context):
        return self.power * d_model

    def build(self, d_model, **where):
        return Outside(self, d_model, **where)


class Outside(Layer):
    def __init__(self, config, d_model, **where):
        super().__init__(config, d_model, **where)
        self.scale = self.param("scale")

    def forward(self, x, state, ctx):
        return self.scale * x**self.config.power
