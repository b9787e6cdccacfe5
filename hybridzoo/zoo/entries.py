"""The models that have a name: their configs, cards and embedded weights.

Names, cards and licences are read without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridzoo.zoo.card import Card, FrontMatter

if TYPE_CHECKING:
    from hybridzoo.config import HybridConfig

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


def _shipped(folder: str) -> Path:
    # a wheel holds these folders inside the package, a checkout beside it
    inside = _PACKAGE / folder
    return inside if inside.is_dir() else _PACKAGE.parent / folder
