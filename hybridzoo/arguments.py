"""What the commands share: options, their words as values, errors as sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hybridzoo.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import torch

    from hybridzoo.comm import Parallel
    from hybridzoo.model import HybridLM
    from hybridzoo.tokenizer import Tokenizer
    from hybridzoo.zoo.cache import Snapshot

# an unknown command or option, or a value that is no number; typer exports only this child of it
UsageError = typer.BadParameter.__mro__[1]

AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto: a GPU if there is one.")]
Kernels = Annotated[str, typer.Option(help="Backends by op: ssd=reference,attention=sdpa.")]
Revision = Annotated[str | None, typer.Option(help="Of org/repo: a branch, tag or commit.")]


def sentence(error: Exception) -> str:
    """What a user reads of an error that the command line catches."""
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        reason = error.strerror or str(error)
        return f"{where}{reason}. Check the path, its rights and the room on the disk."
    if isinstance(error, UsageError):
        path = error.ctx.command_path if error.ctx else "hybridzoo"
        return f"{error.format_message().rstrip('.')}. Try `{path} --help`."
    return str(error)


def parse_device(name: str) -> torch.device:
    """--device as a device of this machine; ConfigError if it is none."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, colon, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (colon and not (kind == "cuda" and index.isdigit())):
        raise ConfigError(f"--device: unknown device ({name}); use auto, cpu, cuda or cuda:N.")
    n_gpus = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= n_gpus:
        raise ConfigError(f"--device: no such GPU ({name}); torch sees {n_gpus}. Use auto or cpu.")
    return torch.device(name)


def parse_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """--dtype as a dtype, None for as stored; ConfigError for an unknown word."""
    import torch

    known = {"fp32": torch.float32, "bf16": torch.bfloat16, "stored": None}
    # a CPU computes bf16 slowly and the step-by-step recurrence deserves the bits
    known["auto"] = torch.float32 if device.type == "cpu" else None
    if name not in known:
        raise ConfigError(f"--dtype: unknown dtype ({name}); use auto, fp32, bf16 or stored.")
    return known[name]


def use_kernels(text: str) -> None:
    """Ask for the backends that --kernels names."""
    from hybridzoo.kernels.dispatch import parse_backends, set_backends

    set_backends(parse_backends(text))


def find(model: str, revision: str | None, *, pickles: bool = False, quiet: bool = False) -> Path:
    """A model's directory; one from the hub is downloaded, and stderr says which commit it is."""
    from hybridzoo import show
    from hybridzoo.zoo import find_directory

    def report(got: Snapshot) -> None:
        if not quiet:
            typer.echo(served(got), err=True)

    with show.progress() as progress:
        return find_directory(
            model, revision=revision, pickles=pickles, progress=progress, report=report
        )


def served(got: Snapshot) -> str:
    """Which commit of a repository it is, in a line."""
    return f"{got.repo}: commit {got.commit}{', from the cache' if got.was_cached else ''}"


def load(
    model: str, revision: str | None, *, tp: int, device: str, dtype: str, quiet: bool
) -> tuple[HybridLM, Tokenizer]:
    """A model and its tokenizer; of tp ranks each gets its part, and the first one downloads.

    Raises:
        ConfigError: the launcher started other ranks, or --device names one GPU for all of them.
    """
    from hybridzoo.parallel.agree import from_first
    from hybridzoo.zoo import load as load_model
    from hybridzoo.zoo import load_tokenizer_of

    parallel, place = _join(tp, parse_device(device))
    directory = from_first(lambda: find(model, revision, quiet=quiet))
    lm = load_model(directory, dtype=parse_dtype(dtype, place), device=place, parallel=parallel)
    return lm, load_tokenizer_of(directory, lm.config)


def _join(tp: int, device: torch.device) -> tuple[Parallel, torch.device]:
    """This process's place among the ranks of --tp, and its device."""
    import torch

    from hybridzoo.comm import SINGLE
    from hybridzoo.launcher import is_launched
    from hybridzoo.parallel.groups import init

    if tp == 1 and not is_launched():
        return SINGLE, device
    if device.index is not None:
        rule = "each rank has a GPU of its own"
        raise ConfigError(f"--device: one GPU ({device}) with --tp {tp}; {rule}. Use auto or cuda.")
    # the others wait while the first downloads, for hours; one that dies is the launcher's to tell
    parallel = init(tp=tp, device=device, timeout_s=86_400)
    if parallel.dp.world > 1:
        n = parallel.dp.world * tp
        rule = "all of them share one model"
        raise ConfigError(f"--tp: {tp} of {n} ranks would share a model; {rule}. Use --tp {n}.")
    is_gpu = device.type == "cuda"
    return parallel, torch.device("cuda", torch.cuda.current_device()) if is_gpu else device


def encode(prompt: str, tokenizer: Tokenizer) -> torch.Tensor:
    """--prompt as ids (1, l); ConfigError where there would be none."""
    import torch

    ids = tokenizer.encode_prompt(prompt)
    if not ids:
        raise ConfigError(
            "--prompt: empty (''); this model's tokenizer has no token that starts a text. Write a "
            "word or two to continue."
        )
    return torch.tensor([ids])


def write(texts: Iterable[str], *, aloud: bool = True) -> None:
    """Text to stdout, piece by piece; if not aloud, the pieces are only made."""
    # bytes: whatever the locale, and argv's raw bytes as they came; echo flushes
    for text in texts:
        if aloud:
            typer.echo(text.encode("utf-8", "surrogateescape"), nl=False)
