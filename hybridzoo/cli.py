"""The command line: parses, calls, prints. Heavy imports stay inside the commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hybridzoo.errors import HybridzooError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Hybrid language models (Mamba, attention, MoE) from one line of layer letters.",
)

COLOURS = {"mamba1": "cyan", "mamba2": "blue", "attention": "red", "mlp": "green", "moe": "yellow"}

Source = Annotated[str, typer.Argument(help="A zoo name, or a directory that holds a checkpoint.")]
Kernels = Annotated[str, typer.Option(help="Backends by op, such as ssd=reference,attention=sdpa.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto takes a GPU when there is one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def main() -> None:
    """Run the command line; a user's mistake becomes one sentence on stderr and exit code 2."""
    is_debug = "--debug" in sys.argv
    if is_debug:
        sys.argv.remove("--debug")
    try:
        app()
    except HybridzooError as error:
        if is_debug:
            raise
        typer.echo(f"hybridzoo: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        if is_debug:
            raise
        where = f"{error.filename}: " if error.filename else ""
        typer.echo(f"hybridzoo: {where}{error.strerror or error}. Check the path, its rights and the disk's room.", err=True)
        sys.exit(2)


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if version:
        from hybridzoo import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command(name="list")
def list_(as_json: AsJson = False) -> None:
    """Show the zoo: every model with its pattern, size and where its weights are."""
    from rich.table import Table

    from hybridzoo.zoo import list_models

    models = list_models()
    if as_json:
        typer.echo(json.dumps([m.to_dict() for m in models], indent=2))
        return
    table = Table("model", "pattern", "parameters", "active", "licence", "weights")
    for m in models:
        table.add_row(m.name, m.pattern, _count(m.n_params), _count(m.n_active_params), m.licence, m.weights)
    _console().print(table)


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="A zoo name, a config (.yaml, .json) or a checkpoint's directory.")],
    as_json: AsJson = False,
) -> None:
    """Draw a model's stack and count its parameters, operations and state."""
    from hybridzoo.describe import facts
    from hybridzoo.zoo import find_config

    config = find_config(model)
    found = facts(config)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    console = _console()
    console.print(f"[bold]{found['name']}[/]  {found['pattern']}", highlight=False)
    for line in _stack(config):
        console.print(line, highlight=False, overflow="ignore", no_wrap=True)
    console.print(_legend(found))
    console.print(_figures(found))
    console.print(f"beside a transformer: {found['transformer']}, same d_model; one sequence, bf16", style="dim", highlight=False)


@app.command()
def generate(
    model: Source = "shakespeare",
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "\n",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Keep the k best tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the best tokens up to this probability.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop tokens below this share of the best one's.")] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: repeat less.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the draw; the same seed gives the same text.")] = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or stored; auto is fp32 on a CPU, stored on a GPU.")] = "auto",
    device: Device = "auto",
    kernels: Kernels = "",
    quiet: Annotated[bool, typer.Option("--quiet", help="No line on stderr about device and backends.")] = False,
) -> None:
    """Continue a prompt; only the text goes to stdout."""
    from hybridzoo.inference.generate import stream
    from hybridzoo.tokenizer import Decoder
    from hybridzoo.zoo import load, load_tokenizer_of

    place = _device(device)
    _use_kernels(kernels)
    lm = load(model, dtype=_dtype(dtype, place), device=place)
    tokenizer = load_tokenizer_of(model, lm.config)
    if not quiet:
        typer.echo(_run_line(lm, place), err=True)
    import torch

    ids = torch.tensor([tokenizer.encode(prompt)], device=place)
    decoder = Decoder(tokenizer)
    typer.echo(prompt, nl=False)
    steps = stream(
        lm, ids, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, stop=lm.config.eos_token_id, seed=seed,
    )  # fmt: skip
    for step in steps:
        typer.echo(decoder.push(int(step)), nl=False)
        sys.stdout.flush()
    typer.echo(decoder.flush())


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A checkpoint's directory, ours or a family's.")],
    target: Annotated[Path, typer.Argument(help="The directory to write; it must not exist or be empty.")],
    layout: Annotated[str, typer.Option(help="native, or the family to write, such as jamba.")] = "native",
) -> None:
    """Rewrite a checkpoint in another layout, tensor by tensor."""
    from hybridzoo.checkpoint import convert

    convert(source, target, layout=layout)
    typer.echo(f"{target}: written in the {layout} layout")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as configs/train/tiny.yaml.")],
    output: Annotated[Path | None, typer.Option(help="Where checkpoints and logs go; the recipe's choice if left out.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the output directory.")] = False,
    kernels: Kernels = "",
) -> None:
    """Train a model from a recipe; stop it whenever you like and go on with --resume."""
    from hybridzoo.train.loop import train
    from hybridzoo.train.recipe import Recipe

    _use_kernels(kernels)
    changes = {} if output is None else {"output": str(output)}
    train(Recipe.load(recipe, **changes), resume=resume)


@app.command()
def doctor(device: Device = "auto", as_json: AsJson = False) -> None:
    """Say which backend each op would use on this machine, and why not the others."""
    import platform

    import torch
    from rich.table import Table

    from hybridzoo.kernels.dispatch import explain

    place = _device(device)
    rows = explain(place)
    if as_json:
        typer.echo(json.dumps([r._asdict() for r in rows], indent=2))
        return
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else platform.processor() or platform.machine()
    console = _console()
    console.print(f"python {platform.python_version()}, torch {torch.__version__}, {place} ({name})", highlight=False)
    table = Table("op", "backend", "runs here", "why not")
    for r in rows:
        table.add_row(r.op, r.backend, "[green]chosen[/]" if r.chosen else "yes" if r.reason is None else "no", r.reason or "")
    console.print(table)


def _console() -> Any:
    from rich.console import Console

    # a pipe has no width: wide enough that no table is cut there.
    return Console() if sys.stdout.isatty() else Console(width=120)


def _device(name: str) -> Any:
    import torch

    from hybridzoo.errors import ConfigError

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ConfigError(f"--device: unknown device ({name}); use auto, cpu, cuda or cuda:N.")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device: no such GPU ({name}); this torch sees {torch.cuda.device_count()}. Use auto or cpu.")
    return torch.device(name)


def _dtype(name: str, device: Any) -> Any:
    import torch

    from hybridzoo.errors import ConfigError

    known = {"fp32": torch.float32, "bf16": torch.bfloat16, "stored": None}
    if name == "auto":
        return torch.float32 if device.type == "cpu" else None
    if name not in known:
        raise ConfigError(f"--dtype: unknown dtype ({name}); use auto, {', '.join(known)}.")
    return known[name]


def _use_kernels(text: str) -> None:
    from hybridzoo.kernels.dispatch import parse_backends, set_backends

    if text:
        set_backends(parse_backends(text))


def _run_line(lm: Any, device: Any) -> str:
    from hybridzoo.kernels.dispatch import explain

    chosen = ", ".join(f"{r.op}={r.backend}" for r in explain(device) if r.chosen)
    dtype = str(lm.embed.weight.dtype).removeprefix("torch.")
    return f"{lm.config.name}: {_count(lm.config.n_params())} parameters, {device}, {dtype}; {chosen}"


def _stack(config: Any) -> list[str]:
    from hybridzoo.describe import draw

    kinds = {b.letter: b.config.kind for place in config.places for b in place}
    lines = []
    for first, places in draw(config):
        cells = []
        for text in places:
            letters = [f"[{COLOURS.get(kinds[c], 'magenta')}]{c}[/]" if c in kinds else _literal(c) for c in text]
            cells.append("".join(letters))
        lines.append(f"[dim]{first:>4}[/]  {' '.join(cells)}")
    return lines


def _literal(character: str) -> str:
    return {"[": "\\[", "|": "[bold]│[/]"}.get(character, character)


def _legend(found: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table("letter", "kind", "places", "parameters each", "options")
    for row in found["layers"]:
        options = ", ".join(f"{k}={v}" for k, v in row["options"].items())
        letter = f"[{COLOURS.get(row['kind'], 'magenta')}]{row['letter']}[/]"
        kind = row["kind"] + (f" (shared.{row['shared']})" if "shared" in row else "")
        table.add_row(letter, kind, str(row["count"]), _count(row["n_params"]), options)
    return table


def _figures(found: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(show_header=False)
    table.add_row("parameters", f"{found['n_params']:,}", f"active {found['n_active_params']:,}")
    table.add_row("weights in bf16", _bytes(found["weight_bytes"]), "")
    for n, flops in found["flops_per_token"].items():
        mine, other = found["state_bytes"][n], found["transformer_state_bytes"][n]
        saved = f"transformer {_bytes(other)}, {other / mine:.1f}x" if mine else ""
        table.add_row(f"state at {n // 1024}K", _bytes(mine), saved)
        table.add_row(f"forward at {n // 1024}K", f"{flops / 1e9:,.3f} GFLOP a token", "")
    return table


def _count(n: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return str(n)


def _bytes(n: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= size:
            return f"{n / size:,.2f} {unit}"
    return f"{n} B"


if __name__ == "__main__":
    main()
