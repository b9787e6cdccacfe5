"""The zoo: models by name, their configs, cards and embedded weights.

Names, cards and licences are read without torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridzoo.errors import ConfigError
from hybridzoo.options import suggest
from hybridzoo.tokenizer import Tokenizer, load_tokenizer
from hybridzoo.zoo.card import Card, FrontMatter

if TYPE_CHECKING:
    import torch

    from hybridzoo.comm import Parallel
    from hybridzoo.config import HybridConfig
    from hybridzoo.model import HybridLM

_PACKAGE = Path(__file__).resolve().parents[1]
_WEIGHTS = Path(__file__).resolve().parent / "weights"


@dataclass(frozen=True)
class ModelEntry:
    """One model of the zoo; its files are read when asked for.

    Attributes:
        name: its name, the stem of its files.
        config_path: its YAML.
        card_path: its model card.
        weights_path: where embedded weights are, if it has any.
    """

    name: str
    config_path: Path
    card_path: Path
    weights_path: Path

    @cached_property
    def config(self) -> HybridConfig:
        """The architecture; imports torch."""
        from hybridzoo.config import HybridConfig

        return HybridConfig.load(self.config_path)

    @cached_property
    def front(self) -> FrontMatter:
        """The card's front matter."""
        return Card.read(self.card_path).front

    @property
    def pattern(self) -> str:
        """Its layers, as the YAML writes them."""
        return self.config.pattern

    @cached_property
    def n_params(self) -> int:
        """Parameters."""
        return self.config.n_params()

    @cached_property
    def n_active_params(self) -> int:
        """Parameters that one token uses."""
        return self.config.n_active_params()

    @property
    def licence(self) -> str:
        """Of the weights; the name where the hub has no id for it."""
        return self.front.license_name or self.front.license

    @property
    def context(self) -> int | None:
        """Longest sequence that the weights are meant for, if the card says."""
        return self.front.context

    @property
    def has_weights(self) -> bool:
        """Whether the package holds its weights."""
        return (self.weights_path / "config.json").is_file()

    @property
    def weights(self) -> str:
        """Where its weights are: embedded, a repository on the hub, or nowhere (random)."""
        return "embedded" if self.has_weights else self.front.hub or "random"

    def to_dict(self) -> dict[str, Any]:
        """Everything above as plain values."""
        return {
            "name": self.name,
            "pattern": self.pattern,
            "n_params": self.n_params,
            "n_active_params": self.n_active_params,
            "context": self.context,
            "licence": self.licence,
            "weights": self.weights,
            "has_weights": self.has_weights,
            "config_path": str(self.config_path),
            "card_path": str(self.card_path),
        }


def list_models() -> list[ModelEntry]:
    """Every model of the zoo, by name."""
    configs, cards = _shipped("configs"), _shipped("model_cards")
    return [
        ModelEntry(path.stem, path, cards / f"{path.stem}.md", _WEIGHTS / path.stem)
        for path in sorted(configs.glob("*.yaml"))
    ]


def load(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    parallel: Parallel | None = None,
) -> HybridLM:
    """Load a model with its weights.

    Args:
        source: a name of the zoo, or a directory: ours or one that a family published. A name wins
            over a directory called alike; write ./name for that.
        dtype: of the parameters, A_log, D and dt_bias staying at least fp32; None: as stored.
        device: where they go; None is the CPU.
        parallel: this process's place among tensor-parallel ranks; None is alone.

    Returns:
        The model in eval mode: dropout starts with model.train().

    Raises:
        ConfigError: there is no such name or directory, or the name has no embedded weights.
        CheckpointError: the directory's files are not a whole checkpoint.
    """
    # looked up first: a name that does not exist is refused before torch is imported
    directory = find_directory(source)

    from hybridzoo.checkpoint import load as load_checkpoint
    from hybridzoo.comm import SINGLE

    return load_checkpoint(directory, dtype=dtype, device=device, parallel=parallel or SINGLE)


def find_config(source: str | Path) -> HybridConfig:
    """The config of a zoo name, of a YAML or JSON file, or of a checkpoint's directory.

    Raises:
        ConfigError: there is none, or it has a mistake.
    """
    entry = _entry(source)
    if entry is not None:
        return entry.config
    path = _existing(source)

    from hybridzoo.checkpoint import read_config
    from hybridzoo.config import HybridConfig

    return read_config(path) if path.is_dir() else HybridConfig.load(path)


def find_directory(source: str | Path) -> Path:
    """The checkpoint's directory of a zoo name with embedded weights, or of a path.

    Raises:
        ConfigError: there is none.
    """
    entry = _entry(source)
    if entry is not None:
        if not entry.has_weights:
            raise ConfigError(_without_weights(entry))
        return entry.weights_path
    path = _existing(source)
    if path.is_file():
        way_out = (
            f"For random weights build HybridLM(HybridConfig.load({str(path)!r}))"
            if path.suffix in (".yaml", ".yml", ".json")
            else f"Pass its directory ({path.parent})"
        )
        raise ConfigError(f"{path}: is a file; a checkpoint is a directory. {way_out}.")
    return path


def load_tokenizer_of(source: str | Path, config: HybridConfig) -> Tokenizer:
    """The tokenizer that the model `source`, of this config, was trained with.

    Raises:
        ConfigError: the file that the config names is not beside the weights.
        CheckpointError: it lies outside their directory.
    """
    if config.tokenizer == "bytes":
        return load_tokenizer("bytes")

    from hybridzoo.checkpoint.reader import resolve

    path = resolve(find_directory(source), config.tokenizer)
    if not path.is_file():
        raise ConfigError(
            f"{path}: missing; the model reads text through this file. Copy it there from where "
            "the model was published."
        )
    return load_tokenizer(path)


def _shipped(folder: str) -> Path:
    # a wheel holds these folders inside the package, a checkout beside it
    inside = _PACKAGE / folder
    return inside if inside.is_dir() else _PACKAGE.parent / folder


def _entry(source: str | Path) -> ModelEntry | None:
    return next((e for e in list_models() if e.name == source), None)


def _existing(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if str(source) and path.exists():
        return path
    if isinstance(source, Path) or os.sep in source or source.startswith("~"):
        raise ConfigError(
            f"{source}: no such file or directory; a model is a name of the zoo or a checkpoint's "
            "directory, and nothing is downloaded here. Check the path."
        )
    names = [entry.name for entry in list_models()]
    raise ConfigError(
        f"{source!r} is not a model of the zoo, nor a directory; {suggest(source, names)}"
        f"`hybridzoo list` names all {len(names)}. Use one of them, or a path."
    )


def _without_weights(entry: ModelEntry) -> str:
    hub = entry.front.hub
    where = f"they are published at https://huggingface.co/{hub}" if hub else "none are published"
    download = "Download them and pass their directory, or " if hub else ""
    if Path(entry.name).is_dir():
        download = f"Write ./{entry.name} for the directory of that name, or "
    start = "build" if download else "Build"
    return (
        f"{entry.name}: its weights do not ship with hybridzoo ({entry.n_params:,} parameters, "
        f"licence {entry.licence}); {where}. {download}{start} it with random ones: "
        f"HybridLM(HybridConfig.load({str(entry.config_path)!r}))."
    )
