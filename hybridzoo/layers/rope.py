"""Rotary position embedding, rotate-half form (arXiv 2104.09864), and its stretched variants."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from hybridzoo.errors import ConfigError
from hybridzoo.options import check_fields, read_options, shown, suggest

_POSITIVE = {"min": 1e-9}


@dataclass(frozen=True, kw_only=True)
class RopeScaling(ABC):
    """How a longer context than the trained one is turned; keys as in transformers' files.

    Attributes:
        factor: longer context / trained context.
    """

    rope_type: ClassVar[str]
    factor: float = field(metadata={"min": 1})

    def __post_init__(self) -> None:
        """Refuse a field of the wrong type or range, however the scaling was made."""
        check_fields("rope_scaling", self)

    def check(self, where: str, theta: float) -> None:  # noqa: B027 (linear has no rule)
        """Raise ConfigError where the values cannot work together, or with the base `theta`."""

    def to_dict(self) -> dict[str, Any]:
        """`rope_type` and the values that differ from their defaults."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {f.name for f in fields(self) if values[f.name] != f.default}
        return {"rope_type": self.rope_type} | {k: v for k, v in values.items() if k in changed}

    @property
    def amplitude(self) -> float:
        """Multiplies cosine and sine, hence the rotated channels of queries and keys."""
        return 1.0

    @abstractmethod
    def stretch(self, frequencies: Tensor, theta: float) -> Tensor:
        """The changed frequencies, radians a position, of theta**(-2j / d), (d / 2,)."""


@dataclass(frozen=True, kw_only=True)
class LinearScaling(RopeScaling):
    """Position interpolation (arXiv 2306.15595, eq. 4): every frequency divided by `factor`."""

    rope_type: ClassVar[str] = "linear"

    def stretch(self, frequencies: Tensor, theta: float) -> Tensor:
        """Frequencies / factor."""
        return frequencies / self.factor


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling(RopeScaling):
    """Llama 3.1's: long wavelengths divided by `factor`, short ones kept, between them a blend.

    Attributes:
        low_freq_factor: wavelengths above original_max_position_embeddings over it are long.
        high_freq_factor: wavelengths below original_max_position_embeddings over it are short.
        original_max_position_embeddings: the trained context, tokens.
    """

    rope_type: ClassVar[str] = "llama3"
    low_freq_factor: float = field(metadata=_POSITIVE)
    high_freq_factor: float = field(metadata=_POSITIVE)
    original_max_position_embeddings: int

    def check(self, where: str, theta: float) -> None:
        """Refuse bounds in the wrong order."""
        if self.low_freq_factor >= self.high_freq_factor:
            raise ConfigError(
                f"{where}.low_freq_factor: ({self.low_freq_factor}) must be below high_freq_factor "
                f"({self.high_freq_factor}). Swap them."
            )

    def stretch(self, frequencies: Tensor, theta: float) -> Tensor:
        """Blended by how many turns a frequency makes in the trained context."""
        turns = frequencies * (self.original_max_position_embeddings / (2 * math.pi))
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return torch.lerp(frequencies / self.factor, frequencies, kept)


@dataclass(frozen=True, kw_only=True)
class YarnScaling(RopeScaling):
    """YaRN (arXiv 2309.00071): a blend along the channels, and larger queries and keys.

    Attributes:
        original_max_position_embeddings: the trained context, tokens.
        beta_fast: channels that make more turns in it are kept.
        beta_slow: channels that make fewer are divided by `factor`.
        truncate: round the blend's ends outwards to whole channels.
        attention_factor: multiplies the rotated queries and keys; None is 0.1 log(factor) + 1.
        mscale: with mscale_all_dim, attention_factor is the ratio of the two
            0.1 mscale log(factor) + 1 (DeepSeek).
        mscale_all_dim: see mscale.
    """

    rope_type: ClassVar[str] = "yarn"
    original_max_position_embeddings: int
    beta_fast: float = field(default=32.0, metadata=_POSITIVE)
    beta_slow: float = field(default=1.0, metadata=_POSITIVE)
    truncate: bool = True
    attention_factor: float | None = field(default=None, metadata={"min": 0})
    mscale: float | None = field(default=None, metadata=_POSITIVE)
    mscale_all_dim: float | None = field(default=None, metadata=_POSITIVE)

    def check(self, where: str, theta: float) -> None:
        """Refuse bounds in the wrong order, two attention factors and equal wavelengths."""
        if theta <= 1:
            rule = "the wavelengths must differ from channel to channel"
            raise ConfigError(f"{where}: yarn with rope_theta ({theta}); {rule}. Raise rope_theta.")
        if self.beta_slow >= self.beta_fast:
            raise ConfigError(
                f"{where}.beta_slow: ({self.beta_slow}) must be below beta_fast "
                f"({self.beta_fast}). Swap them."
            )
        pair = (self.mscale, self.mscale_all_dim)
        if (None in pair) != (pair == (None, None)):
            rule = f"comes with mscale_all_dim ({self.mscale_all_dim}), or neither"
            raise ConfigError(f"{where}.mscale: ({self.mscale}) {rule}. Give both or none.")
        if self.mscale is not None and self.attention_factor is not None:
            rule = "mscale and mscale_all_dim say it already"
            raise ConfigError(
                f"{where}.attention_factor: ({self.attention_factor}) is given twice; {rule}. "
                "Drop one."
            )

    @property
    def amplitude(self) -> float:
        """The attention factor."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale is None or self.mscale_all_dim is None:
            return self._temperature(1.0)
        return self._temperature(self.mscale) / self._temperature(self.mscale_all_dim)

    def stretch(self, frequencies: Tensor, theta: float) -> Tensor:
        """Blended by the channel's place between those of beta_fast and beta_slow turns."""
        n = frequencies.shape[0]
        first, last = (self._channel(turns, theta, n) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * n - 1)
        channel = torch.arange(n, device=frequencies.device, dtype=frequencies.dtype)
        # a blend of no width is a step
        divided = ((channel - first) / (last - first if last != first else 1e-3)).clamp(0, 1)
        return torch.lerp(frequencies, frequencies / self.factor, divided)

    def _channel(self, turns: float, theta: float, n: int) -> float:
        """The channel of n, not whole, that makes so many turns in the trained context."""
        wavelength = self.original_max_position_embeddings / turns
        return n * math.log(wavelength / (2 * math.pi)) / math.log(theta)

    def _temperature(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0


SCALINGS: dict[str, type[RopeScaling]] = {
    kind.rope_type: kind for kind in (LinearScaling, Llama3Scaling, YarnScaling)
}


def read_scaling(where: str, options: Any) -> RopeScaling:
    """The scaling that a file's mapping describes; ConfigError says what is wrong with it."""
    if isinstance(options, RopeScaling):
        return options
    known = ", ".join(SCALINGS)
    if not isinstance(options, Mapping):
        what = f"expected a rope_type and its values ({shown(options)})"
        raise ConfigError(f"{where}: {what}; write {{rope_type: linear, factor: ...}}.")
    options = dict(options)
    kind = options.pop("rope_type", None)
    if kind is None:
        raise ConfigError(f"{where}.rope_type is missing; use one of: {known}.")
    if not isinstance(kind, str) or kind not in SCALINGS:
        near = suggest(str(kind), SCALINGS)
        raise ConfigError(
            f"{where}.rope_type: unknown choice ({shown(kind)}); {near}use one of: {known}."
        )
    return read_options(SCALINGS[kind], where, options, of=f"{kind} scaling")


def apply_rope(
    x: Tensor,
    positions: Tensor,
    theta: float,
    rotary_dim: int,
    scaling: RopeScaling | None = None,
) -> Tensor:
    """Rotate the first `rotary_dim` channels of every head by its token's position.

    Args:
        x: queries or keys, (b, l, h, p).
        positions: (b, l) integers.
        theta: base of the wavelengths.
        rotary_dim: channels rotated, even, at most p; channel j turns with the one rotary_dim / 2
            further.
        scaling: changes the wavelengths, and the size of what is rotated; None changes nothing.

    Returns:
        (b, l, h, p), x.dtype; angles and rotation in fp32 (float64 for float64 x).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    exponent = torch.arange(0, rotary_dim, 2, device=x.device, dtype=wide) / rotary_dim
    frequencies = theta**-exponent
    if scaling is not None:
        frequencies = scaling.stretch(frequencies, theta)
    angle = positions.to(wide)[:, :, None, None] * frequencies
    cos, sin = angle.cos(), angle.sin()
    if scaling is not None and scaling.amplitude != 1.0:
        cos, sin = cos * scaling.amplitude, sin * scaling.amplitude
    first, second, rest = x.split([rotary_dim // 2, rotary_dim // 2, x.shape[-1] - rotary_dim], -1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
    return torch.cat([turned, rest], -1)
