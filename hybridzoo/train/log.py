"""What a run tells: lines and a progress bar for people, JSON lines for programs, a curve."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hybridzoo.train.snapshot import replace_text

Record = dict[str, Any]


class Log:
    """A run's log.jsonl and its lines on the console.

    Args:
        root: directory of the run.
        console: where lines go; a terminal also gets a progress bar.
        steps: updates of the whole run.
        start: updates done; records after it are from a run that was cut off, and dropped.
    """

    def __init__(self, root: Path, console: Console, steps: int, start: int) -> None:
        self.path, self.console = root / "log.jsonl", console
        kept = [r for r in read_log(self.path) if r["step"] <= start]
        replace_text(self.path, "".join(json.dumps(r) + "\n" for r in kept))
        self._file = self.path.open("a", encoding="utf-8", buffering=1)
        self._val = ""
        self._bar = Progress(
            TextColumn("[bold]train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=steps, completed=start, text="")
        self._bar.start()

    def write(self, record: Record) -> None:
        """Append a record, and show it."""
        self._file.write(json.dumps(record) + "\n")
        if "val_loss" in record:
            self._val = f" · val {_value(record, 'val_')}"
        is_bar = self.console.is_terminal
        if is_bar and "loss" in record:
            text = f"loss {record['loss']:.4f}{self._val} · {_speed(record)}"
            self._bar.update(self._task, completed=record["step"], text=text)
        elif "loss" in record:
            norm = f"norm {record['grad_norm']:.3g}"
            self.say(f"step {record['step']} · {_value(record)} · {norm} · {_speed(record)}")
        if "val_loss" in record:
            best = " · best so far" if record["is_best"] else ""
            self.say(f"step {record['step']}{self._val}{best}")

    def say(self, line: str) -> None:
        """One line for people."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Stop the bar and close the file."""
        self._bar.stop()
        self._file.close()


class Silence(Log):
    """The log of every rank but the first: none."""

    def __init__(self) -> None:
        pass

    def write(self, record: Record) -> None:
        """Nothing."""

    def say(self, line: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def read_log(path: Path) -> list[Record]:
    """The records of a log.jsonl; lines that a kill or a power cut damaged are left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    # after the last newline stands nothing, or half a record
    return [record for line in lines[:-1] if (record := _record(line)) is not None]


def _record(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "step" in record else None


def plot(log_path: Path, image_path: Path) -> bool:
    """Draw the losses of a log.jsonl in bits a byte, or a token; False without matplotlib."""
    if find_spec("matplotlib") is None:
        return False
    # imported here because it costs most of a second and draws only at the end of a run
    from matplotlib.figure import Figure

    records = read_log(log_path)
    train, val = _curve(records, ""), _curve(records, "val_")
    is_bytes = any("bits_per_byte" in r for r in records)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), color="0.75", linewidth=0.8, label="train, one step")
        axes.plot(*zip(*_smooth(train), strict=True), color="C0", label="train, running mean")
    if val:
        step, bits = min(val, key=lambda point: point[1])
        label = f"held-out, best {bits:.3f} at step {step}"
        axes.plot(*zip(*val, strict=True), "o-", color="C1", markersize=3, label=label)
    points = _smooth(train) + val
    if points:
        # a long run's first steps would flatten all the rest
        start = max(step for step, _ in points) // 20
        low = min(bits for _, bits in points)
        high = max(bits for step, bits in points if step >= start)
        axes.set_ylim(low - 0.05 * (high - low) - 0.01, high + 0.05 * (high - low) + 0.01)
        axes.legend(frameon=False)
    axes.set(xlabel="step", ylabel="bits a byte" if is_bytes else "bits a token")
    axes.grid(alpha=0.25)
    half = image_path.with_name(f"tmp-{image_path.name}")
    figure.savefig(half, format="png")
    half.replace(image_path)
    return True


def _curve(records: list[Record], prefix: str) -> list[tuple[int, float]]:
    loss, bits = f"{prefix}loss", f"{prefix}bits_per_byte"
    return [(r["step"], r.get(bits, r[loss] / math.log(2))) for r in records if loss in r]


def _smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Mean over the last twentieth of the curve, so that the noise of single steps goes."""
    width = max(1, len(points) // 20)
    values = [v for _, v in points]
    means = [
        sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))
    ]
    return [(step, mean) for (step, _), mean in zip(points, means, strict=True)]


def _value(record: Record, prefix: str = "") -> str:
    bits = record.get(f"{prefix}bits_per_byte")
    nats = f"{record[f'{prefix}loss']:.4f} nats"
    return nats if bits is None else f"{nats}, {bits:.4f} bits a byte"


def _speed(record: Record) -> str:
    return f"lr {record['lr']:.2e} · {record['tokens_per_s']:,.0f} tokens/s"
