"""Layer kinds: one line a kind."""

from __future__ import annotations

from importlib import import_module

from hybridzoo.errors import ConfigError
from hybridzoo.layers import init
from hybridzoo.layers.base import Layer, LayerConfig, Param, Sequence, State, StateTensor
from hybridzoo.options import suggest

__all__ = [
    "KINDS",
    "Layer",
    "LayerConfig",
    "Param",
    "Sequence",
    "State",
    "StateTensor",
    "init",
    "kind_config",
    "register",
]

KINDS = {
    "attention": "hybridzoo.layers.attention:AttentionConfig",
    "mamba1": "hybridzoo.layers.mamba1:Mamba1Config",
    "mamba2": "hybridzoo.layers.mamba2:Mamba2Config",
    "mlp": "hybridzoo.layers.mlp:MLPConfig",
    "moe": "hybridzoo.layers.moe:MoEConfig",
}


def register(kind: str, path: str) -> None:
    """Add a kind kept outside the package.

    Args:
        kind: its name in a config.
        path: "module:ConfigClass".

    Raises:
        ConfigError: the name is taken.
    """
    if KINDS.get(kind, path) != path:
        raise ConfigError(
            f"kind {kind} is registered already ({KINDS[kind]}); choose another name."
        )
    KINDS[kind] = path


def kind_config(where: str, kind: object) -> type[LayerConfig]:
    """The config class of a kind; ConfigError names the nearest kind and all of them."""
    if not isinstance(kind, str) or kind not in KINDS:
        known = ", ".join(sorted(KINDS))
        if kind is None:
            raise ConfigError(f"{where}.kind is missing; use one of: {known}.")
        near = suggest(str(kind), KINDS)
        raise ConfigError(f"{where}.kind: unknown kind ({kind!r}); {near}use one of: {known}.")
    module, name = KINDS[kind].split(":")
    found: type[LayerConfig] = getattr(import_module(module), name)
    return found
