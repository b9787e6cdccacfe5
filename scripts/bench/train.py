"""Training a Mamba-1 beside mamba-ssm's on one GPU: the model, its parts, one layer, the losses.

    python scripts/bench/train.py [--parts model,layer,curve] [--out FILE] [--budget SECONDS]
        [--steps 12] [--curve shakespeare|FILE] [--kernels op=backend,...] [--device cpu --tiny]

model: 1.37 B parameters (d_model 2,048, 48 layers, vocabulary 50,280, tied), bf16, 4 x 2,048
random tokens: forward, cross entropy of all logits in fp32, backward, fused AdamW; the same
weights, tokens and loss on both sides. Each pass has the device for itself; the order is ours,
theirs, ours, then ours in two other ways. Of the first two the kernels are timed by part.
layer: one layer, forward and backward, and the bytes that autograd keeps between them.
curve: 300 steps of a small one on text, by the chosen kernels and by plain torch, into OUT.png too.

Every row is written when it ends; one that fails leaves its reason. No row is begun after the
budget.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from breakdown import DIRECTIONS, PARTS, breakdown, print_rest
from checked import check
from curve import NOISE, RUNS, CurveSize, compare, is_finite, plot, run
from layer import layer
from measure import FAILURES, machine, print_table, sample, save
from training import MFU, PEAK_FLOPS, Size, in_pieces, measured, ours, recomputing, summary
from training import theirs as mamba_ssm

from hybridzoo.kernels.dispatch import parse_backends, set_backends

Row = dict[str, Any]
Job = tuple[str, str, Callable[[], Row]]

# mamba-ssm's forward and backward, without an optimizer, of this model on an H100: research note
REFERENCE_TOKENS_PER_S = 29_800


def jobs(args: argparse.Namespace) -> list[Job]:
    """(part, row, what measures it), in order."""
    size = Size(32, 2, 64, 2, 16, 1) if args.tiny else Size()
    curve = CurveSize(16, 1, 6, 64, 6) if args.tiny else CurveSize()
    shapes = [(2, 16), (1, 33)] if args.tiny else [(4, 2048), (1, 16384)]
    found: list[Job] = [
        ("model", "check", lambda: check(args)),
        ("model", "ours", lambda: measured(ours, size, args, breakdown)),
        ("model", "mamba-ssm", lambda: measured(mamba_ssm, size, args, breakdown)),
        ("model", "ours again", lambda: measured(ours, size, args)),
        ("model", "ours, recompute: mixer", lambda: measured(recomputing, size, args)),
        ("model", "ours, loss in pieces", lambda: measured(in_pieces, size, args)),
        *(("layer", f"{b}, {l}", partial(layer, (b, l), size.d_model, args)) for b, l in shapes),
        *(("curve", name, partial(run, name, curve, args)) for name in RUNS),
    ]
    return [job for job in found if job[0] in args.parts]


def done(job: Job, args: argparse.Namespace, spent: float) -> Row:
    """A job's row; one that fails, or comes after the budget, says so and lets the others run."""
    part, name, call = job
    row = {"part": part, "row": name}
    if spent > args.budget:
        return row | {"skipped": f"{spent:.0f} s are over, of {args.budget:.0f}"}
    start = time.perf_counter()
    try:
        row |= call()
    # the other rows are worth their time
    except FAILURES as problem:
        traceback.print_exc()
        row["failed"] = repr(problem)[:2000]
    return row | {"seconds": time.perf_counter() - start}


def rows_of(report: dict[str, Any], part: str) -> dict[str, Row]:
    return {row["row"]: row for row in report["rows"] if row["part"] == part}


def show_model(report: dict[str, Any]) -> None:
    rows = rows_of(report, "model")
    if "errors" in rows.get("check", {}):
        print("gradients' errors to float64:", rows["check"]["errors"])
    for name, row in rows.items():
        if "breakdown" in row:
            print_rest(f"{name}, {row['ms']:.2f} ms a step", row["breakdown"])
    show_parts(rows)
    head = "pass|ms|20 to 80 %|forward|backward|optimizer|tokens/s|without AdamW|MFU|peak GiB"
    cells = []
    for name, row in rows.items():
        if "ms" in row:
            spread = f"{row['low']:.2f} to {row['high']:.2f}"
            cells.append([name, f"{row['ms']:.2f}", spread])
            cells[-1] += [f"{ms:.2f}" for ms in row["phases_ms"].values()]
            cells[-1] += [f"{row['tokens_per_s']:.0f}"]
            cells[-1] += [f"{row['tokens_per_s_without_optimizer']:.0f}"]
            cells[-1] += [f"{row['model_flops_per_s'] / PEAK_FLOPS:.1%}"]
            cells[-1] += [f"{row['peak_gib']:.2f}" if row["peak_gib"] is not None else ""]
    if cells:
        print_table(head.split("|"), cells)
    print(MFU, "The same by the matrix rate of this call:", by_matrix_rate(report))
    print("backends:", rows.get("ours", {}).get("backends"))
    for name in ("ours", "mamba-ssm"):
        print(f"parameters of {name}:", rows.get(name, {}).get("n_by_dtype"))
    print("summary:", report["summary"].get("model"))
    print(
        "reference, measured elsewhere, on an H100, without AdamW: mamba-ssm "
        f"{REFERENCE_TOKENS_PER_S} tokens/s."
    )


def by_matrix_rate(report: dict[str, Any]) -> dict[str, str]:
    rate = report["machine"]["matmul_flops_per_s"]
    rows = rows_of(report, "model")
    return {n: f"{r['model_flops_per_s'] / rate:.1%}" for n, r in rows.items() if "ms" in r}


def show_parts(rows: dict[str, Row]) -> None:
    """Milliseconds of device time by part, both sides."""
    sides = {name: row["breakdown"] for name, row in rows.items() if "breakdown" in row}
    if not sides:
        return
    head = ["device ms", *(f"{side}, {way}" for side in sides for way in DIRECTIONS)]
    cells = [
        [part, *(f"{found['parts'][part][w]:.3f}" for found in sides.values() for w in DIRECTIONS)]
        for part in PARTS
    ]
    sums = [sum(f["parts"][p][w] for p in PARTS) for f in sides.values() for w in DIRECTIONS]
    print_table(head, [*cells, ["all", *(f"{ms:.3f}" for ms in sums)]])
    for name, found in sides.items():
        gap = rows[name]["ms"] - found["total"]
        print(f"{name}: kernels {found['total']:.3f} ms, step less kernels {gap:.3f} ms")


def show_layer(report: dict[str, Any]) -> None:
    three = "|".join(f"{part}, ms|theirs|ratio" for part in ("forward", "backward", "both"))
    head = f"b, l|{three}|kept MiB|theirs"
    cells = []
    for name, row in rows_of(report, "layer").items():
        if "passes" not in row:
            continue
        cells.append([name])
        for part in ("forward", "backward", "whole"):
            found = [row[key].get(part) for key in ("ours_ms", "theirs_ms", "ratio")]
            cells[-1] += ["" if x is None else f"{x:.3f}" for x in found]
        kept = [row["passes"].get(side, {}).get("kept_bytes") for side in ("ours", "theirs")]
        cells[-1] += ["" if n is None else f"{n / 2**20:.1f}" for n in kept]
        print(name, "differences:", row.get("difference"), "backends:", row["backends"])
    if cells:
        print_table(head.split("|"), cells)


def show_curve(report: dict[str, Any]) -> None:
    rows, found = rows_of(report, "curve"), report["summary"].get("curve", {})
    cells = [
        [name, row["what"], f"{row['losses'][0]:.4f}", f"{row['losses'][-1]:.4f}"]
        + [f"{found[name][key]:.2e}" if name in found else "" for key in ("largest", "mean")]
        for name, row in rows.items()
        if "losses" in row
    ]
    if cells:
        print_table(["run", "what", "first loss", "last", "largest distance", "mean"], cells)
    print(NOISE, "Plot:", report["summary"].get("plot"))
    print("backends:", rows.get("chosen", {}).get("backends"))


def summed(report: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    found = {
        "model": summary(rows_of(report, "model")),
        "curve": compare(rows_of(report, "curve")),
    }
    if args.out and found["curve"]:
        found["plot"] = plot(rows_of(report, "curve"), args.out.with_suffix(".png"))
    return found


def is_wrong(report: dict[str, Any]) -> bool:
    """Whether something of ours failed, or computes something else."""
    rows = report["rows"]
    return (
        any("failed" in row and row["row"] != "mamba-ssm" for row in rows)
        or not all(row.get("is_right", True) for row in rows)
        or not report["summary"]["model"].get("is_right", True)
        or not all(is_finite(row) for row in rows if "losses" in row)
    )


def matmul_flops_per_s(args: argparse.Namespace) -> float:
    n = 128 if args.tiny else 8192
    a, b = torch.randn(2, n, n, device=args.device).bfloat16()
    return 2 * n**3 / sample([lambda: a @ b], args.device, 300).ms * 1e3


def parts_of(text: str) -> list[str]:
    parts = text.split(",")
    if unknown := sorted(set(parts) - {"model", "layer", "curve"}):
        raise argparse.ArgumentTypeError(f"{unknown[0]} is no part; they are model, layer, curve.")
    return parts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", type=parts_of, default="model,layer,curve")
    parser.add_argument("--out", type=Path, help="JSON, written after every row; a PNG beside it")
    parser.add_argument("--budget", type=float, default=420, help="seconds; no row begins later")
    parser.add_argument("--steps", type=int, help="timed steps a pass of the model")
    parser.add_argument("--curve", default="shakespeare", help="text: the corpus, or a file")
    parser.add_argument("--kernels", default="", help="op=backend,...: as hybridzoo's --kernels")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--tiny", action="store_true", help="a size that a CPU can do, for tests")
    args = parser.parse_args()
    args.steps = args.steps or (2 if args.tiny else 12)
    set_backends(parse_backends(args.kernels))
    start = time.perf_counter()
    rates = machine(args.device, 2**24 if args.tiny else 2**31)
    rates["matmul_flops_per_s"] = matmul_flops_per_s(args)
    report: dict[str, Any] = {"machine": rates, "kernels": args.kernels, "rows": []}
    for job in jobs(args):
        report["rows"].append(done(job, args, time.perf_counter() - start))
        report |= {"summary": summed(report, args), "seconds": time.perf_counter() - start}
        save(report, args.out)
        state = next((k for k in ("failed", "missing", "skipped") if k in report["rows"][-1]), "ok")
        print(*job[:2], state, f"{report['seconds']:.0f} s", file=sys.stderr, flush=True)
    for part, show in (("curve", show_curve), ("layer", show_layer), ("model", show_model)):
        if part in args.parts:
            print(f"\n{part}")
            show(report)
    for row in report["rows"]:
        for key in ("failed", "missing", "skipped"):
            if key in row:
                print(f"{row['part']} {row['row']}: {key}: {row[key]}")
    known = ("device", "date", "commit", "copy_bytes_per_s", "matmul_flops_per_s", "versions")
    print({key: rates.get(key) for key in known}, f"{report['seconds']:.0f} s")
    return is_wrong(report)


if __name__ == "__main__":
    sys.exit(main())
