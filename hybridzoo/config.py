"""HybridConfig: one model as text (YAML or JSON) and as typed values.

Every user error is caught here, before any tensor.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch

from hybridzoo.comm import Parallel
from hybridzoo.errors import ConfigError
from hybridzoo.layers import LayerConfig, Param
from hybridzoo.layers.init import constant, normal
from hybridzoo.layers.legend import Shared, legend_entry, shared_layer
from hybridzoo.layers.norm import NormKind
from hybridzoo.options import check_fields, read_file, read_options, shown
from hybridzoo.pattern import Pattern
from hybridzoo.sharding import Part, Split, check_tp

MAX_PARAMS = 10**13


@dataclass(frozen=True)
class Branch:
    """One layer of one place: letter, hyperparameters and, of shared weights, their name."""

    letter: str
    config: LayerConfig
    shared: str | None = None


@dataclass(frozen=True, kw_only=True)
class HybridConfig:
    """One architecture.

    Attributes:
        d_model: width of the residual stream.
        vocab_size: rows of the embedding and of the head.
        pattern: which layer stands where, in the grammar of pattern.py.
        layers: the pattern's legend: letter -> kind and hyperparameters, or {shared: name}.
        layers_at: hyperparameters that differ at single places, by 0-based index; by letter as well
            at a parallel place.
        shared: weights that several places use, by name.
        name: the model's name.
        norm: of every block and the final one: rms_norm, or layer_norm, which has a bias too.
        norm_weight_fp32: multiply by an rms_norm's weight before the cast from fp32 back to the
            model's dtype (Nemotron-H, mamba_ssm) rather than after it; changes rounding only.
        norm_eps: eps of every block's norm and of the final one.
        tie_embeddings: the head reads the embedding's weight.
        residual_fp32: keep the residual stream in fp32 whatever the model's dtype.
        residual_multiplier: scales every sublayer's output.
        embedding_multiplier: scales the embeddings.
        logits_multiplier: scales the logits.
        dropout: probability, in training, of dropping an element of a sublayer's output.
        tokenizer: "bytes", or a tokenizers JSON's file name beside the weights.
        eos_token_id: ends a text; generation stops at it when the caller asks.
        source_layout: what an imported checkpoint's files looked like, so that export writes the
            same bytes.
    """

    d_model: int
    vocab_size: int
    pattern: str
    layers: dict[str, Any]
    layers_at: dict[int, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    name: str = "unnamed"
    norm: NormKind = "rms_norm"
    norm_weight_fp32: bool = False
    norm_eps: float = field(default=1e-5, metadata={"min": 0})
    tie_embeddings: bool = True
    residual_fp32: bool = False
    residual_multiplier: float = 1.0
    embedding_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    dropout: float = field(default=0.0, metadata={"min": 0, "max": 0.99})
    tokenizer: str = "bytes"
    eos_token_id: int | None = field(default=None, metadata={"min": 0})
    source_layout: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Read the legend into typed configs and check all that needs no tensor."""
        check_fields("config", self)
        if self.norm_weight_fp32 and self.norm != "rms_norm":
            rule = "it is a rounding of rms_norm, and layer_norm knows no other"
            raise ConfigError(f"norm_weight_fp32: true with norm ({self.norm}); {rule}. Drop it.")
        layers = {k: legend_entry(f"layers.{k}", v) for k, v in self.layers.items()}
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "shared", {k: shared_layer(k, v) for k, v in self.shared.items()})
        object.__setattr__(self, "layers_at", {_place(k): v for k, v in self.layers_at.items()})
        self._check_places()
        if self.n_params() > MAX_PARAMS:
            raise ConfigError(
                f"config: {self.n_params():,} parameters; more than {MAX_PARAMS:,} are a typing "
                "error. Check d_model, vocab_size and the layers' widths."
            )

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a YAML or JSON file; ConfigError says which file, key and value is wrong."""
        options = read_file(path)
        try:
            return cls.from_dict(options)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, options: Any) -> Self:
        """Build from a mapping with the fields as keys."""
        return read_options(cls, "", options, of="a model config")

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as plain values.

        from_dict reads them back equal.
        """
        plain: dict[str, Any] = {"name": self.name}
        for f in fields(self):
            value = getattr(self, f.name)
            if value != (f.default_factory() if callable(f.default_factory) else f.default):
                plain[f.name] = value
        for entries in ("layers", "shared"):
            if entries in plain:
                plain[entries] = {k: v.to_dict() for k, v in plain[entries].items()}
        return copy.deepcopy(plain)

    @cached_property
    def expanded(self) -> Pattern:
        """The parsed pattern: one place a residual sublayer, and the pipeline cuts."""
        return Pattern.parse(self.pattern)

    @cached_property
    def places(self) -> tuple[tuple[Branch, ...], ...]:
        """For each residual sublayer its branches, overrides applied."""
        return tuple(
            tuple(self._branch(i, letter, len(letters) > 1) for letter in letters)
            for i, letters in enumerate(self.expanded.places)
        )

    def params(self) -> Iterator[tuple[str, Param]]:
        """Every canonical parameter of the model by its checkpoint name, each once."""
        rows = Split(0, (self._vocab,))
        embed = Param((self.vocab_size, self.d_model), normal(0.02), rows)
        norm = {"norm.weight": Param((self.d_model,), constant(1.0), decay=False)}
        if self.norm == "layer_norm":
            norm["norm.bias"] = Param((self.d_model,), constant(0.0), decay=False)
        yield "embed.weight", embed
        for i, place in enumerate(self.places):
            yield from ((f"blocks.{i}.{k}", p) for k, p in norm.items())
            for branch in place:
                if branch.shared is None:
                    prefix = branch_prefix(i, branch.letter, len(place) > 1)
                    own = branch.config.params(self.d_model)
                    yield from ((prefix + k, p) for k, p in own.items())
        for name, layer in self.shared.items():
            yield from ((f"shared.{name}.{k}", p) for k, p in layer.params(self.d_model).items())
        yield from norm.items()
        if not self.tie_embeddings:
            yield "head.weight", embed

    def n_params(self) -> int:
        """Parameters, each shared one once.

        A router's correction bias is not counted, as in the papers' totals.
        """
        return sum(math.prod(p.shape) for _, p in self.params() if p.trained)

    def n_active_params(self) -> int:
        """Parameters that one token uses: of experts, the top_k picked.

        Shared weights count once.
        """
        return sum(
            math.prod(p.shape) * p.active[0] // p.active[1] for _, p in self.params() if p.trained
        )

    def flops_per_token(self, context: int = 0) -> int:
        """Forward floating-point operations for one token after `context` others, head included.

        Training costs 3 times it.
        """
        layers = sum(b.config.flops(self.d_model, context) for place in self.places for b in place)
        return layers + 2 * self.d_model * self.vocab_size

    def state_bytes(self, context: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of all states of `batch` sequences of `context` tokens in a model of `dtype`."""
        layers = (b.config for place in self.places for b in place)
        specs = (s for c in layers for s in c.state(self.d_model, batch, context).values())
        return sum(math.prod(s.shape) * s.dtype_in(dtype).itemsize for s in specs)

    def check_parallel(self, parallel: Parallel) -> None:
        """Raise ConfigError, naming what is legal, when the ranks cannot share this model."""
        tp, ep = parallel.tp.world, parallel.ep.world
        check_tp("embed", [Split(0, (self._vocab,))], tp)
        for i, place in enumerate(self.places):
            for branch in place:
                where = f"blocks.{i} ({branch.config.kind})"
                branch.config.check_tp(where, self.d_model, tp)
                branch.config.check_ep(where, self.d_model, ep)

    def vocab_ranges(self, tp: int) -> list[range]:
        """The ids whose rows of embedding and head each of `tp` ranks holds."""
        spans = [self._vocab.range(tp, rank) for rank in range(tp)]
        return [range(start, start + n) for start, n in spans]

    @property
    def _vocab(self) -> Part:
        return Part(self.vocab_size, self.vocab_size, "vocab_size", uneven=True)

    def _branch(self, place: int, letter: str, is_parallel: bool) -> Branch:
        entry = self.layers[letter]
        if isinstance(entry, Shared):
            return Branch(letter, self.shared[entry.shared], entry.shared)
        if place not in self.layers_at:
            return Branch(letter, entry)
        change, where = self.layers_at[place], f"layers_at.{place}"
        if is_parallel:
            change, where = change.get(letter, {}), f"{where}.{letter}"
        change, base = (
            _mapping(where, change),
            {f.name: getattr(entry, f.name) for f in fields(entry)},
        )
        if "kind" in change:
            what = f"a place keeps its letter's kind ({entry.kind})"
            raise ConfigError(f"{where}.kind: {what}. Write another letter there in the pattern.")
        merged = type(entry).from_dict(where, base | change)
        merged.check(where, self.d_model)
        return Branch(letter, merged)

    def _check_places(self) -> None:
        for letter in self.expanded.letters:
            if letter not in self.layers:
                what = f"letter {letter} has no entry in layers ({_names(self.layers)})"
                raise ConfigError(f"pattern: {what}. Add 'layers.{letter}'.")
        for letter, entry in self.layers.items():
            if not isinstance(entry, Shared):
                entry.check(f"layers.{letter}", self.d_model)
            elif entry.shared not in self.shared:
                what = f"no entry ({entry.shared!r}) in shared; it has: {_names(self.shared)}"
                raise ConfigError(f"layers.{letter}.shared: {what}. Add it.")
        for name, layer in self.shared.items():
            layer.check(f"shared.{name}", self.d_model)
        for place, change in self.layers_at.items():
            self._check_override(place, change)
        self.places  # noqa: B018  (reads every override, so that a bad one is refused now)

    def _check_override(self, place: Any, change: Any) -> None:
        n, where = len(self.expanded), f"layers_at.{place}"
        if type(place) is not int or not 0 <= place < n:
            rule = f"the pattern has places 0..{n - 1}"
            raise ConfigError(f"layers_at: no such place ({place!r}); {rule}. Use one of them.")
        letters, changed = self.expanded.places[place], list(_mapping(where, change))
        if len(letters) == 1:
            changed = list(letters)
        elif not set(changed) <= set(letters):
            rule = f"the place has branches {', '.join(letters)}"
            raise ConfigError(f"{where}: {rule}; give {{letter: {{key: value}}}}.")
        for letter in changed:
            if isinstance(self.layers[letter], Shared):
                rule = "they cannot differ at one place"
                raise ConfigError(f"{where}: its weights are shared ({letter}); {rule}. Drop it.")

    def with_options(self, **changes: Any) -> Self:
        """A copy with some fields replaced."""
        return replace(self, **changes)


def branch_prefix(place: int, letter: str, is_parallel: bool) -> str:
    """Checkpoint name prefix of one layer's parameters."""
    return f"blocks.{place}.branch.{letter}." if is_parallel else f"blocks.{place}.layer."


def _mapping(where: str, change: Any) -> dict[str, Any]:
    if not isinstance(change, Mapping):
        what = f"expected hyperparameters ({shown(change)})"
        raise ConfigError(f"{where}: {what}; write a mapping of key: value.")
    return dict(change)


def _names(entries: Mapping[str, Any]) -> str:
    return ", ".join(entries) or "none"


def _place(key: Any) -> Any:
    # JSON has no other keys than text
    return int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key
