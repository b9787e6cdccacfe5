"""A legend: an entry of a file becomes a kind's config, or the name of shared weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from hybridzoo.errors import ConfigError
from hybridzoo.layers import LayerConfig, kind_config
from hybridzoo.options import read_options, shown


@dataclass(frozen=True)
class Shared:
    """A legend entry whose places all use the weights `shared.{name}`; each has its own state."""

    shared: str

    def to_dict(self) -> dict[str, Any]:
        """As it is written in a file."""
        return {"shared": self.shared}


def _layer(where: str, entry: Any) -> LayerConfig:
    if isinstance(entry, LayerConfig):
        return entry
    if not isinstance(entry, Mapping):
        what = f"expected a kind and its hyperparameters ({shown(entry)})"
        raise ConfigError(f"{where}: {what}; write {{kind: mamba2, ...}}.")
    cls = kind_config(where, entry.get("kind"))
    return cls.from_dict(where, {k: v for k, v in entry.items() if k != "kind"})


def shared_layer(name: str, entry: Any) -> LayerConfig:
    """The config of an entry of `shared`; ConfigError says what is wrong with it."""
    # the name becomes an attribute of a ModuleDict and a part of the weights' names
    if not str(name).isidentifier() or hasattr(nn.ModuleDict(), str(name)):
        rule = "it must be letters, digits and _"
        raise ConfigError(f"shared.{name}: not a usable name ({name!r}); {rule}. Rename it.")
    return _layer(f"shared.{name}", entry)


def legend_entry(where: str, entry: Any) -> LayerConfig | Shared:
    """What a letter stands for; `where` is layers.{letter}. ConfigError says what is wrong."""
    letter = where.rpartition(".")[2]
    if not (len(letter) == 1 and letter.isascii() and letter.isalpha()):
        raise ConfigError(f"{where}: a legend's key is one letter ({letter!r}). Rename it.")
    if isinstance(entry, Shared):
        return entry
    if isinstance(entry, Mapping) and "shared" in entry:
        return read_options(Shared, where, entry, of="a shared entry")
    return _layer(where, entry)
