"""How parameters start: each draw is a pure function of shape, seed and name, on the CPU.

So it depends neither on tp nor on the device, nor on torch's default one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Init = Callable[[tuple[int, ...], torch.Generator], Tensor]


def seeded(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one parameter, the same in every process and at every tp."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def constant(value: float) -> Init:
    """Every element `value`."""
    return partial(_constant, value)


def normal(std: float) -> Init:
    """N(0, std)."""
    return partial(_normal, std)


def uniform(bound: float) -> Init:
    """U(-bound, bound)."""
    return partial(_uniform, bound)


def fan_in_uniform(fan_in: int) -> Init:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): what Mamba's projections and convolutions start from."""
    return uniform(fan_in**-0.5)


def log_arange() -> Init:
    """Log(1..n) along the last dimension: Mamba's A_log (arXiv 2312.00752, section 3.6)."""
    return _log_arange


def log_uniform_A(low: float, high: float) -> Init:
    """Log of U(low, high): Mamba-2's A_log, one decay a head."""
    return partial(_log_uniform, low, high)


def dt_bias(low: float, high: float, floor: float) -> Init:
    """Inverse softplus of a log-uniform step in [low, high], at least floor.

    As in Mamba (arXiv 2312.00752, section 3.6).
    """
    return partial(_dt_bias, low, high, floor)


# functions of the module rather than closures: a model holds its inits, and must pickle


def _constant(value: float, shape: tuple[int, ...], _: torch.Generator) -> Tensor:
    return torch.full(shape, value, device="cpu")


def _normal(std: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device="cpu") * std


def _uniform(bound: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return (_unit(shape, generator) * 2 - 1) * bound


def _log_uniform(
    low: float, high: float, shape: tuple[int, ...], generator: torch.Generator
) -> Tensor:
    return (low + _unit(shape, generator) * (high - low)).log()


def _log_arange(shape: tuple[int, ...], _: torch.Generator) -> Tensor:
    steps = torch.arange(1, shape[-1] + 1, dtype=torch.float32, device="cpu")
    return steps.log().expand(shape).clone()


def _dt_bias(
    low: float, high: float, floor: float, shape: tuple[int, ...], generator: torch.Generator
) -> Tensor:
    share = _unit(shape, generator)
    dt = torch.exp(math.log(low) + share * math.log(high / low)).clamp(min=floor)
    return dt + (-torch.expm1(-dt)).log()


def _unit(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device="cpu")
