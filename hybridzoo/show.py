"""What the command line prints: tables, drawings and bars of rich, from plain values."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from hybridzoo.describe import draw, facts, row_name
from hybridzoo.kernels.dispatch import explain
from hybridzoo.tokenizer import Decoder

if TYPE_CHECKING:
    from torch import Tensor

    from hybridzoo.config import HybridConfig
    from hybridzoo.kernels.dispatch import Row
    from hybridzoo.kernels.loader import Status
    from hybridzoo.tokenizer import Tokenizer

_STATUS = {"ok": "green", "failed": "bold red", "not there": "dim", "not run": "yellow"}
COLOURS = {"mamba1": "cyan", "mamba2": "blue", "attention": "red", "mlp": "green", "moe": "yellow"}


def console() -> Console:
    """Standard output; a pipe has no width, so it gets one at which no table is cut."""
    return Console() if sys.stdout.isatty() else Console(width=140)


def zoo(models: Iterable[Any], width: int | None = None) -> Table:
    """One line a model, kin together and the smaller first: ModelEntry of zoo.

    A narrow console cuts the pattern; below 120 columns the licence goes, and the repository is
    "hub": --json has all of it.
    """
    is_wide = (width or console().width) >= 120
    table = Table(box=None)
    table.add_column("model", no_wrap=True)
    table.add_column("pattern")
    table.add_column("params", justify="right", no_wrap=True)
    table.add_column("active", justify="right", no_wrap=True)
    for name in ("licence", "weights") if is_wide else ("weights",):
        table.add_column(name, no_wrap=True)
    for m in sorted(models, key=lambda m: (m.name.split("-")[0], m.n_params, m.name)):
        pattern = Text(m.pattern, no_wrap=True, overflow="ellipsis")
        active = count(m.n_active_params) if m.n_active_params < m.n_params else ""
        near = m.weights if "/" not in m.weights else "hub"
        place = (m.licence, m.weights) if is_wide else (near,)
        table.add_row(m.name, pattern, count(m.n_params), active, *place)
    return table


def model(config: HybridConfig) -> Group:
    """A config's stack, letter by letter, its legend and its figures."""
    found = facts(config)
    title = Text.assemble((found["name"], "bold"), "  ", found["pattern"])
    twin = f"transformer: {found['transformer']}, same d_model; states of one sequence in bf16"
    return Group(title, *_stack(config), _legend(found), _figures(found), Text(twin, style="dim"))


def backends(rows: Iterable[Row]) -> Table:
    """One row a backend of every op: whether it runs, and why not."""
    table = Table("op", "backend", "runs here", "why not")
    for r in rows:
        runs = "[green]chosen[/]" if r.chosen else "yes" if r.reason is None else "no"
        table.add_row(r.op, r.backend, runs, r.reason or "")
    return table


def cuda_sources(status: Status) -> Text:
    """One line: where the code of csrc comes from on this device, or why it does not run."""
    if status.reason is not None:
        return Text(f"CUDA sources: not used, {status.reason}")
    ways = [f"packaged for {', '.join(status.packaged)}"] if status.packaged else []
    if status.compiler:
        kept = f"{status.n_cached} kernel{'' if status.n_cached == 1 else 's'}"
        how = f"compiled at first use by NVRTC {status.compiler}, cached in {status.cache} ({kept})"
        ways.append(how)
    return Text(f"CUDA sources: {', else '.join(ways)}")


def findings(found: Iterable[Any]) -> Table:
    """One row a finding: Finding of checkpoint.verify."""
    table = Table("check", "", "what was seen")
    for f in found:
        table.add_row(f.check, Text(f.status, _STATUS[f.status]), Text(f.detail))
    return table


def upload(found: Any) -> Group:
    """What was published or would be: Published of zoo.publish."""
    table = Table("file", "size")
    for name, n_bytes in found.files.items():
        table.add_row(Text(name), size(n_bytes))
    done = f"commit {found.commit}" if found.commit else "a dry run: nothing was uploaded"
    seen = "private" if found.private else "public"
    lines = [Text(f"{found.repo} ({seen}): {done}")]
    for what, names in (("removed there", found.removed), ("left out", found.left_out)):
        lines += [Text(f"{what}: {', '.join(names)}", style="dim")] if names else []
    return Group(table, *lines)


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal's stderr for each word that is told, with bytes done and bytes in all."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn()
    bars: dict[str, TaskID] = {}
    stderr = Console(stderr=True)
    off = not stderr.is_terminal
    with Progress(*columns, console=stderr, transient=True, disable=off) as shown:

        def tell(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = shown.add_task(what, total=total)
            shown.update(bars[what], completed=done, total=total)

        yield tell


def run_line(config: HybridConfig, weight: Tensor) -> str:
    """What generates: model, size, device, dtype and the backend of each op."""
    chosen = ", ".join(f"{r.op} {r.backend}" for r in explain(weight.device) if r.chosen)
    dtype = str(weight.dtype).removeprefix("torch.")
    size = f"{count(config.n_params())} parameters"
    return f"{config.name}: {size}, {weight.device}, {dtype}; kernels: {chosen}"


def texts(prompt: str, steps: Iterable[Tensor], tokenizer: Tokenizer) -> Iterator[str]:
    """A prompt and what follows it, a piece a token as soon as its characters are whole."""
    decoder = Decoder(tokenizer)
    yield prompt
    yield from (decoder.push(int(step)) for step in steps)
    yield decoder.flush() + "\n"


def count(n: int) -> str:
    """A number of parameters in K, M or B."""
    return next((f"{n / size:.2f} {u}" for u, size in _COUNTS if n >= size), str(n))


def size(n: int) -> str:
    """A number of bytes in KiB, MiB or GiB."""
    return next((f"{n / unit:,.2f} {u}" for u, unit in _SIZES if n >= unit), f"{n} B")


_COUNTS = (("B", 10**9), ("M", 10**6), ("K", 10**3))
_SIZES = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def _stack(config: HybridConfig) -> list[Text]:
    kinds = {b.letter: b.config.kind for place in config.places for b in place}
    lines = []
    for first, places in draw(config):
        line = Text(f"{first:>4} ", style="dim")
        for cell in places:
            line.append(" ")
            for character in cell:
                style = COLOURS.get(kinds[character], "magenta") if character in kinds else "bold"
                line.append(character, style)
        lines.append(line)
    return lines


def _legend(found: dict[str, Any]) -> Table:
    table = Table("letter", "kind", "places", "parameters each", "options")
    for row in found["layers"]:
        options = ", ".join(f"{k}={v}" for k, v in row["options"].items())
        letter = Text(row_name(row), COLOURS.get(row["kind"], "magenta"))
        kind = row["kind"] + (f" (shared.{row['shared']})" if "shared" in row else "")
        table.add_row(letter, kind, str(row["count"]), count(row["n_params"]), Text(options))
    return table


def _figures(found: dict[str, Any]) -> Table:
    table = Table("", "this model", "transformer", "ratio")
    n, active = found["n_params"], found["n_active_params"]
    table.add_row("parameters", f"{n:,}", "", "")
    table.add_row("active for one token", f"{active:,}", "", "")
    table.add_row("weights in bf16", size(found["weight_bytes"]), "", "")
    for context, mine in found["state_bytes"].items():
        other = found["transformer_state_bytes"][context]
        ratio = f"{other / mine:.1f}x" if mine else ""
        table.add_row(f"state after {context // 1024}K tokens", size(mine), size(other), ratio)
    for context, flops in found["flops_per_token"].items():
        table.add_row(f"GFLOP for token {context // 1024}K", f"{flops / 1e9:,.3f}", "", "")
    return table
