"""Card: a model card, YAML front matter as the hub reads it and Markdown below."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import yaml

from hybridzoo.errors import CheckpointError, ConfigError
from hybridzoo.options import check_fields, read_options, shown

if TYPE_CHECKING:
    from hybridzoo.config import HybridConfig

_FENCE = "---\n"
_FORMS = {
    "license": (r"[a-z0-9][a-z0-9.+-]*", "a licence id of the hub, in lower case as apache-2.0"),
    "hub": (r"[\w.-]+/[\w.-]+", "owner/name of a repository on the hub"),
    "base_model": (r"[\w.-]+/[\w.-]+", "owner/name of a repository on the hub"),
    "paper": (r"arxiv:\d{4}\.\d{4,5}|https://\S+", "arxiv:NNNN.NNNNN or an https address"),
    "license_link": (r"https://\S+", "an https address"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FrontMatter:
    """What programs read of a card; the hub's own keys, and `hub`, `paper` and `context` of ours.

    Attributes:
        license: the weights' licence, by the hub's id.
        library_name: hybridzoo, so that the hub shows how to load it.
        pipeline_tag: the task.
        tags: words to find it by.
        language: ISO 639 codes.
        license_name: name of a licence whose id is "other".
        license_link: its text.
        datasets: the hub's data sets that it was trained on.
        metrics: what the card measures.
        base_model: the repository on the hub whose weights these were made from.
        hub: the repository on the hub where the weights are published; null for none.
        paper: where the architecture was published.
        context: longest sequence that the weights are meant for, in tokens.
    """

    license: str
    library_name: Literal["hybridzoo"]
    pipeline_tag: Literal["text-generation"]
    tags: tuple[str, ...]
    language: tuple[str, ...] = ()
    license_name: str | None = None
    license_link: str | None = None
    datasets: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    base_model: str | None = None
    hub: str | None = None
    paper: str | None = None
    context: int | None = None

    def __post_init__(self) -> None:
        """Refuse values of a wrong type or form."""
        check_fields("card", self)
        for name, (form, rule) in _FORMS.items():
            value = getattr(self, name)
            if value is not None and not re.fullmatch(form, value):
                raise ConfigError(f"{name}: wrong form ({value!r}); it is {rule}. Correct it.")
        if self.license == "other" and not (self.license_name and self.license_link):
            raise ConfigError(
                "license: 'other' needs a name and a text; license_name and license_link say them. "
                "Add both."
            )

    def to_dict(self) -> dict[str, Any]:
        """The keys that say something, as plain values in the order above."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}
        return {k: v for k, v in plain.items() if v not in (None, [])}


@dataclass(frozen=True)
class Card:
    """A model card.

    Attributes:
        front: the front matter.
        body: the Markdown below it.
    """

    front: FrontMatter
    body: str

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The card in a file.

        Raises:
            ConfigError: there is none, or a key of its front matter is missing, unknown or wrong.
        """
        path = Path(path)
        if not path.is_file():
            raise ConfigError(
                f"{path}: no such file; a model's card is a Markdown file with front matter. "
                "Check the path."
            )
        try:
            return cls.parse(path.read_text(encoding="utf-8"))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def parse(cls, text: str) -> Self:
        """The card that `text` holds; ConfigError as in read."""
        head, fence, body = text.removeprefix(_FENCE).partition("\n" + _FENCE)
        if not text.startswith(_FENCE) or not fence:
            raise ConfigError(
                "card: no front matter; it is YAML between two lines of --- at the top. Add it."
            )
        try:
            options = yaml.safe_load(head)
        except yaml.YAMLError as error:
            problem = " ".join(str(error).split())
            raise ConfigError(f"card: its front matter is not YAML ({problem}). Mend it.") from None
        return cls(read_options(FrontMatter, "", options, of="a model card"), body)

    def render(self) -> str:
        """The file's text; parse reads it back equal."""
        head = yaml.safe_dump(self.front.to_dict(), sort_keys=False, allow_unicode=True, width=1000)
        return f"{_FENCE}{head}{_FENCE}{self.body}"


def make_card(config: HybridConfig, repo: str, license: str) -> Card:
    """A short card of a model that is published without one."""
    kinds = {branch.config.kind for place in config.places for branch in place}
    front = FrontMatter(
        license=license,
        library_name="hybridzoo",
        pipeline_tag="text-generation",
        tags=tuple(sorted(kinds)),
    )
    body = (
        f"# {config.name}\n\nA hybrid language model of hybridzoo: `{config.pattern}`, "
        f"{config.n_params():,} parameters, d_model {config.d_model}.\n\n## Use\n\n"
        f'```python\nimport hybridzoo\n\nmodel = hybridzoo.load("{repo}")\n```\n'
    )
    return Card(front, body)


def check_licence(path: Path, license: str | None) -> None:
    """Refuse a card, ours or anybody's, without a licence or with another than `license`."""
    head, fence, _ = path.read_text(encoding="utf-8").removeprefix("---\n").partition("\n---")
    try:
        front = yaml.safe_load(head) if fence else None
    except yaml.YAMLError as error:
        front = " ".join(str(error).split())
    if not isinstance(front, dict) or not front.get("license"):
        raise CheckpointError(
            f"{path}: no licence in its front matter ({shown(front)}); the hub shows that. "
            "Begin the card with a line of ---, a line such as license: apache-2.0, and ---."
        )
    if license not in (None, front["license"]):
        raise CheckpointError(
            f"{path}: its licence is {shown(front['license'])}, not {shown(license)}; a card that "
            "is there is not written over. Change it there, or leave out --license."
        )
