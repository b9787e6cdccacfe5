"""The command line: parses, calls, prints. Heavy imports stay inside the commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from hybridzoo import __version__
from hybridzoo.arguments import (
    AsJson,
    Device,
    Kernels,
    Revision,
    UsageError,
    encode,
    find,
    load,
    parse_device,
    sentence,
    served,
    use_kernels,
    write,
)
from hybridzoo.errors import CheckpointError, ConfigError, HybridzooError
from hybridzoo.launcher import is_launched

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Hybrid language models (Mamba, attention, MoE) from one line of layer letters.",
)


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake is one sentence on stderr and exit code 2.

    Args:
        words: of the command; None is what was typed.
    """
    words = sys.argv[1:] if words is None else words
    is_debug = "--debug" in words
    arguments = [a for a in words if a != "--debug"] or ["--help"]
    mistakes = (HybridzooError, OSError, UsageError)
    command = partial(app, arguments, prog_name="hybridzoo", standalone_mode=False)
    if is_launched():
        from hybridzoo.parallel.launched import run

        run(command, sentence, mistakes, is_debug=is_debug)
    try:
        sys.exit(command())
    except mistakes as error:
        if is_debug:
            raise
        typer.echo(f"hybridzoo: {sentence(error)}", err=True)
        sys.exit(2)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it, end."),
    ] = False,
    # main reads this one, because it is main that catches the errors
    debug: Annotated[bool, typer.Option("--debug", help="Show an error's traceback.")] = False,
) -> None:
    pass


@app.command(name="list")
def list_(as_json: AsJson = False) -> None:
    """Show the zoo: every model with its pattern, size and where its weights are."""
    from hybridzoo import show
    from hybridzoo.zoo import list_models

    models = list_models()
    if as_json:
        typer.echo(json.dumps([m.to_dict() for m in models], indent=2))
    else:
        show.console().print(show.zoo(models))


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="A zoo name, file, directory or org/repo.")],
    as_json: AsJson = False,
    revision: Revision = None,
) -> None:
    """Draw a model's stack and count its parameters, operations and state."""
    from hybridzoo import show
    from hybridzoo.describe import facts
    from hybridzoo.zoo import find_config

    config = find_config(model, revision=revision)
    if as_json:
        typer.echo(json.dumps(facts(config), indent=2))
    else:
        show.console().print(show.model(config))


@app.command()
def generate(
    model: Annotated[
        str, typer.Argument(help="A zoo name, a directory or org/repo.")
    ] = "shakespeare",
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "\n",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Keep the k best tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the best up to this mass.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Keep this share of the best's.")] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: repeat less.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16, stored; auto: fp32 on a CPU.")] = "auto",
    device: Device = "auto",
    kernels: Kernels = "",
    revision: Revision = None,
    tp: Annotated[int, typer.Option("--tp", help="Ranks that share it, started by torchrun.")] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", help="Nothing but the text.")] = False,
) -> None:
    """Continue a prompt; only the text, prompt included, goes to stdout."""
    from hybridzoo import show
    from hybridzoo.inference.generate import stream

    use_kernels(kernels)
    lm, tokenizer = load(model, revision, tp=tp, device=device, dtype=dtype, quiet=quiet)
    steps = stream(
        lm, encode(prompt, tokenizer), max_new_tokens=max_new_tokens, temperature=temperature,
        top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
        stop=lm.config.eos_token_id, seed=seed,
    )  # fmt: skip
    # before a word is printed: what a backend refuses, it refuses at the first step
    first = next(steps)
    # all ranks draw the same tokens
    is_first = lm.parallel.tp.rank == 0
    if is_first and not quiet:
        typer.echo(show.run_line(lm.config, lm.embed.weight), err=True)
    write(show.texts(prompt, chain([first], steps), tokenizer), aloud=is_first)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A directory, a zoo name or org/repo.")],
    target: Annotated[Path, typer.Argument(help="The directory to write.")],
    layout: Annotated[str, typer.Option(help="native, or a family such as jamba.")] = "native",
    from_pickle: Annotated[bool, typer.Option("--from-pickle", help="Read .bin files.")] = False,
    unpad_vocab: Annotated[
        bool, typer.Option("--unpad-vocab", help="Leave out rows that no token has (state_spaces).")
    ] = False,
    revision: Revision = None,
) -> None:
    """Rewrite a checkpoint in another layout, tensor by tensor."""
    target = target.expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(
            f"{target}: exists and is not empty; convert writes a new directory. Choose another."
        )
    from hybridzoo.checkpoint import convert

    directory = find(source, revision, pickles=from_pickle)
    convert(directory, target, layout=layout, from_pickle=from_pickle, unpad_vocab=unpad_vocab)
    typer.echo(f"{target}: written in the {layout} layout")


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="A directory, a zoo name or org/repo.")],
    as_json: AsJson = False,
    device: Device = "auto",
    kernels: Kernels = "",
    revision: Revision = None,
) -> None:
    """Check a checkpoint: files, tensors, NaN and Inf, checksums, tokenizer, golden outputs."""
    from hybridzoo import show
    from hybridzoo.checkpoint.verify import verify

    directory, place = find(model, revision), parse_device(device)
    use_kernels(kernels)
    with show.progress() as progress:
        findings = verify(directory, device=place, progress=progress)
    if as_json:
        typer.echo(json.dumps([f.to_dict() for f in findings], indent=2))
    else:
        show.console().print(show.findings(findings))
    if failed := [f.detail for f in findings if f.status == "failed"]:
        raise CheckpointError(failed[0])


@app.command()
def download(
    model: Annotated[str, typer.Argument(help="A zoo name or org/repo.")],
    revision: Revision = None,
    into: Annotated[Path | None, typer.Option("--dir", help="Here, not in the cache.")] = None,
    pickle: Annotated[
        bool, typer.Option("--pickle", help="Take .bin files where there is nothing else.")
    ] = False,
) -> None:
    """Download a model from the hub and check every file; its directory goes to stdout."""
    from hybridzoo import show
    from hybridzoo.zoo import find_repository
    from hybridzoo.zoo.hub import fetch

    repo = find_repository(model)
    with show.progress() as progress:
        got = fetch(repo, revision=revision, pickles=pickle, directory=into, progress=progress)
    typer.echo(served(got), err=True)
    typer.echo(got.path)


@app.command()
def publish(
    directory: Annotated[Path, typer.Argument(help="A checkpoint with its card, README.md.")],
    repo: Annotated[str, typer.Argument(help="org/repo; made if missing.")],
    public: Annotated[bool, typer.Option("--public", help="For all to see.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, and upload nothing.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch; made if missing.")] = None,
    license: Annotated[str | None, typer.Option(help="Of a card to write, as mit.")] = None,
) -> None:
    """Upload a checkpoint to the hub in one commit, private unless --public."""
    from huggingface_hub.utils import disable_progress_bars

    from hybridzoo import show
    from hybridzoo.zoo.publish import publish

    # an upload's are the client's own
    if not sys.stderr.isatty():
        disable_progress_bars()
    found = publish(
        directory, repo, private=not public, dry_run=dry_run, revision=revision, license=license
    )
    show.console().print(show.upload(found))


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="Such as configs/train/tiny.yaml.")],
    output: Annotated[Path | None, typer.Option(help="Instead of the recipe's output.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where it stopped.")] = False,
    kernels: Kernels = "",
) -> None:
    """Train a model from a recipe; stop it whenever you like and go on with --resume."""
    from hybridzoo.parallel.recipe import Recipe
    from hybridzoo.train.loop import train

    use_kernels(kernels)
    changes = {} if output is None else {"output": str(output)}
    train(Recipe.load(recipe, **changes), resume=resume)


@app.command()
def doctor(device: Device = "auto", as_json: AsJson = False) -> None:
    """Say which backend each op would use on this machine, and why not the others."""
    import platform

    import torch

    from hybridzoo import show
    from hybridzoo.kernels import loader
    from hybridzoo.kernels.dispatch import explain

    place = parse_device(device)
    rows, sources = explain(place), loader.status(place)
    if as_json:
        found = {"backends": [r._asdict() for r in rows], "cuda_sources": sources._asdict()}
        typer.echo(json.dumps(found, indent=2))
        return
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else platform.machine()
    console = show.console()
    versions = f"python {platform.python_version()}, torch {torch.__version__}"
    console.print(f"{versions}, {place} ({name})", highlight=False)
    console.print(show.backends(rows))
    console.print(show.cuda_sources(sources), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
