"""The zoo: models by name, by path and from the hub.

Names, cards and licences are read without torch.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridzoo.errors import ConfigError
from hybridzoo.options import suggest
from hybridzoo.tokenizer import Tokenizer, load_tokenizer
from hybridzoo.zoo.entries import ModelEntry, list_models

__all__ = [
    "ModelEntry",
    "find_config",
    "find_directory",
    "find_repository",
    "list_models",
    "load",
    "load_tokenizer_of",
]

if TYPE_CHECKING:
    import torch

    from hybridzoo.comm import Parallel
    from hybridzoo.config import HybridConfig
    from hybridzoo.model import HybridLM

# not a file: these have endings
_REPOSITORY = re.compile(r"(?!\.)[\w.-]+/(?!.*\.(ya?ml|json|safetensors|bin)$)[\w.-]*\w", re.ASCII)


def load(
    source: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    parallel: Parallel | None = None,
) -> HybridLM:
    """Load a model with its weights.

    Args:
        source: a name of the zoo, or a directory: ours or one that a family published. A name wins
            over a directory called alike; write ./name for that. Or owner/name of a repository on
            the hub, where no directory is called so: it is downloaded once.
        revision: the repository's branch, tag or commit; None is main.
        dtype: of the parameters, A_log, D and dt_bias staying at least fp32; None: as stored.
        device: where they go; None is the CPU.
        parallel: this process's place among tensor-parallel ranks; None is alone.

    Returns:
        The model in eval mode: dropout starts with model.train().

    Raises:
        ConfigError: there is no such name or directory, or the name's weights are not here.
        CheckpointError: the directory's files are not a whole checkpoint.
        HubError: the hub has no such repository, or cannot be reached.
    """
    # looked up first: a name that does not exist is refused before torch is imported
    directory = find_directory(source, revision=revision)

    from hybridzoo.checkpoint import load as load_checkpoint
    from hybridzoo.comm import SINGLE

    return load_checkpoint(directory, dtype=dtype, device=device, parallel=parallel or SINGLE)


def find_config(source: str | Path, *, revision: str | None = None) -> HybridConfig:
    """The config of a zoo name, a YAML or JSON file, a checkpoint's directory or a repository.

    Raises:
        ConfigError: there is none, or it has a mistake.
        HubError: the hub has no such repository, or cannot be reached.
    """
    entry = _entry(source)
    if entry is not None:
        if revision is not None:
            raise _without_revision(source, revision)
        return entry.config
    repo = _repository(source, revision)

    from hybridzoo.checkpoint import read_config
    from hybridzoo.config import HybridConfig

    if repo is not None:
        from hybridzoo.zoo.hub import download

        return read_config(download(repo, revision=revision, only_config=True))
    path = _existing(source)
    return read_config(path) if path.is_dir() else HybridConfig.load(path)


def find_directory(source: str | Path, *, revision: str | None = None, **options: Any) -> Path:
    """The checkpoint's directory of a zoo name, a path, or a repository, which is downloaded.

    A zoo name's weights are embedded or were downloaded: tens of GB do not come unasked.

    Args:
        source: as in load.
        revision: as in load.
        options: of a download, as in hub.fetch.

    Raises:
        ConfigError: there is none.
        HubError: the hub has no such repository, or cannot be reached.
    """
    entry = _entry(source)
    if entry is not None:
        return _weights_of(entry, revision)
    repo = _repository(source, revision)
    if repo is not None:
        from hybridzoo.zoo.hub import download

        return download(repo, revision=revision, **options)
    path = _existing(source)
    if path.is_file():
        way_out = (
            f"For random weights build HybridLM(HybridConfig.load({str(path)!r}))"
            if path.suffix in (".yaml", ".yml", ".json")
            else f"Pass its directory ({path.parent})"
        )
        raise ConfigError(f"{path}: is a file; a checkpoint is a directory. {way_out}.")
    return path


def find_repository(source: str) -> str:
    """The repository on the hub of a zoo name or of owner/name.

    Raises:
        ConfigError: it has none, or is neither.
    """
    entry = _entry(source)
    if entry is None:
        if _REPOSITORY.fullmatch(source):
            return source
        _existing(source)
        raise ConfigError(
            f"{source}: is here already; a download is of a name of the zoo or of owner/name on "
            "the hub. Use it as it is."
        )
    if entry.front.hub is None:
        what = "its weights are in the package" if entry.has_weights else "no weights are published"
        way_out = (
            "Use it as it is" if entry.has_weights else "Train it, or build it with random ones"
        )
        raise ConfigError(f"{entry.name}: {what}; there is nothing to download. {way_out}.")
    return entry.front.hub


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
            "the model was published, or as its card says."
        )
    return load_tokenizer(path)


def _entry(source: str | Path) -> ModelEntry | None:
    return next((e for e in list_models() if e.name == source), None)


def _repository(source: str | Path, revision: str | None) -> str | None:
    """`source` if it is no path here but owner/name of a repository."""
    is_one = isinstance(source, str) and _REPOSITORY.fullmatch(source) is not None
    # runs/tinny beside runs/tiny is a slip of the pen, not somebody's repository
    if is_one and not Path(source).exists() and not Path(source).parent.is_dir():
        return str(source)
    if revision is not None:
        raise _without_revision(source, revision)
    return None


def _without_revision(source: str | Path, revision: str) -> ConfigError:
    return ConfigError(
        f"revision: {source} is here and has none ({revision}); repositories on the hub have. "
        "Leave it out."
    )


def _weights_of(entry: ModelEntry, revision: str | None) -> Path:
    if entry.has_weights:
        if revision is not None:
            raise _without_revision(entry.name, revision)
        return entry.weights_path
    if entry.front.hub is not None:
        from hybridzoo.zoo.cache import cached

        found = cached(entry.front.hub, revision)
        if found is not None:
            return found.path
    raise ConfigError(_without_weights(entry))


def _existing(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if str(source) and path.exists():
        return path
    if isinstance(source, Path) or os.sep in source or source.startswith("~"):
        raise ConfigError(
            f"{source}: no such file or directory; a model is a name of the zoo, a checkpoint's "
            "directory, or owner/name of a repository on the hub. Check the path."
        )
    names = [entry.name for entry in list_models()]
    raise ConfigError(
        f"{source!r} is not a model of the zoo, nor a directory; {suggest(source, names)}"
        f"`hybridzoo list` names all {len(names)}. Use one of them, or a path."
    )


def _without_weights(entry: ModelEntry) -> str:
    hub = entry.front.hub
    where = f"they are published at https://huggingface.co/{hub}" if hub else "none are published"
    download = f"Run `hybridzoo download {entry.name}`, or " if hub else ""
    if Path(entry.name).is_dir():
        download = f"Write ./{entry.name} for the directory of that name, or "
    start = "build" if download else "Build"
    return (
        f"{entry.name}: its weights do not ship with hybridzoo ({entry.n_params:,} parameters, "
        f"licence {entry.licence}); {where}. {download}{start} it with random ones: "
        f"HybridLM(HybridConfig.load({str(entry.config_path)!r}))."
    )
