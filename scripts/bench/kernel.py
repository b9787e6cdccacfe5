"""Our kernels beside their peers on one GPU: checked against float64, then timed, in one call.

    python scripts/bench/kernel.py [scan conv step norm] [--out FILE] [--kernels op=backend,...]
        [--shape 8,4096,2048,16] [--budget MS] [--device cpu --tiny]

Each side gets its own layout, the same values and dtypes and gives the same outputs. Times are the
device's, medians in the order ours, peer, ours; inputs rotate over sets that together are larger
than the L2 cache. Errors are those of the call that is timed, on 64 channels, or rows of a norm,
spread over all of them. A peer that is not installed is named in its row. The whole of it takes
some minutes; results are written after every row.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from cases import Case, Make, Peer, conv, n_sets, norm, scan, text
from gradients import conv_gradients, norm_gradients, scan_gradients
from measure import (
    FAILURES,
    Clock,
    Times,
    captured,
    error,
    geometric_mean,
    machine,
    print_table,
    sample,
    save,
    sync,
)
from steps import conv_step, step

from hybridzoo.kernels.dispatch import parse_backends, set_backends

SCANS = [
    (1, 1536, 2048, 16), (8, 4096, 2048, 16), (32, 1536, 2048, 16), (64, 1536, 512, 16),
    (1, 8192, 8192, 16), (1, 8192, 16384, 16), (1, 4096, 65536, 16), (4, 16384, 4096, 16),
    (4, 2048, 1000, 16), (8, 4096, 100, 16), (2, 256, 2048, 16), (4, 2048, 2048, 64),
]  # fmt: skip
# part: its ops with their shapes. scan: b, i, l, n; conv: b, l, i; step: b, i, n; conv_step: b, i;
# norm: rows, d, bits of the residual; but for the steps once forward, once forward and backward
CONVS = [(8, 2048, 4096), (1, 65536, 4096), (4, 1000, 2048), (8, 100, 4096)]
NORMS = [(16384, 4096, 32), (16384, 4096, 16), (8, 2048, 32), (8, 2048, 16)]
PARTS: dict[str, list[tuple[Make, list[tuple[int, ...]]]]] = {
    "scan": [(scan, SCANS), (scan_gradients, SCANS)],
    "conv": [(conv, CONVS), (conv_gradients, CONVS)],
    "step": [
        (step, [(1, 8192, 16), (64, 8192, 16), (256, 8192, 16)]),
        (conv_step, [(1, 8192), (64, 8192), (256, 8192)]),
    ],
    "norm": [(norm, NORMS), (norm_gradients, NORMS)],
}
TINY: dict[str, list[tuple[Make, list[tuple[int, ...]]]]] = {
    "scan": [(make, [(2, 6, 37, 5)]) for make in (scan, scan_gradients)],
    "conv": [(conv, [(2, 37, 6)]), (conv_gradients, [(2, 37, 6)])],
    "step": [(step, [(3, 6, 5)]), (conv_step, [(3, 6)])],
    "norm": [(make, [(5, 24, 32), (5, 24, 16)]) for make in (norm, norm_gradients)],
}


def timed(calls: list, case: Case, args: argparse.Namespace) -> Times:
    """One pass over one side: calls as they are, or all of them as one graph."""
    if not case.is_in_place or args.device.type != "cuda":
        return sample(calls, args.device, args.budget)
    whole = sample([captured(calls)], args.device, args.budget)
    return Times(*(t / len(calls) for t in whole[:3]), whole.n, whole.host_us / len(calls))


def checked(side: Peer, case: Case, args: argparse.Namespace) -> dict:
    """Errors of a side's first call, its seconds with compilation, and whether it repeats."""
    sync(args.device)
    start = time.perf_counter()
    found = side.outputs(side.calls[0]())
    sync(args.device)
    row = {"first_call_s": time.perf_counter() - start}
    row["error"] = {name: error(found[name], truth) for name, truth in case.truth.items()}
    if not case.is_in_place:
        again = [side.outputs(side.calls[0]()) for _ in range(4)]
        row["repeats"] = all(torch.equal(o[name], found[name]) for o in again for name in found)
    return row


def measured(case: Case, args: argparse.Namespace) -> list[dict]:
    """One row a peer."""
    row = {"op": case.op, "shape": case.shape, "backend": case.backend, "n_bytes": case.n_bytes}
    row |= checked(case.ours, case, args) | {"floor_ms": floors(case, args)}
    rows = [
        row | {"peer": peer.name} | beside(case, peer, row["error"], args) for peer in case.peers
    ]
    for row in rows:
        best = row["ours"]["ms"]
        row["of_floor"] = {name: floor / best for name, floor in row["floor_ms"].items()}
    return rows


def beside(case: Case, peer: Peer, errors: dict, args: argparse.Namespace) -> dict:
    """A peer's errors and times with ours; ours alone where it is missing or fails."""
    if peer.missing:
        return {"missing": peer.missing, "ours": timed(case.ours.calls, case, args)._asdict()}
    try:
        theirs = checked(peer, case, args)["error"]
        found = a_b_a(case, peer, args)
    # ours is measured all the same
    except FAILURES as problem:
        return beside(case, Peer(peer.name, missing=f"fails: {problem!r}"), errors, args)
    # what is only moved has no error on either side
    ratios = [e["norm"] / max(theirs[name]["norm"], 1e-12) for name, e in errors.items()]
    return {"peer_error": theirs, "error_ratio": max(ratios)} | found


def a_b_a(case: Case, peer: Peer, args: argparse.Namespace) -> dict:
    """Ours, the peer, ours again: the ratio is of the peer to the mean of the two."""
    clock = Clock(args.device)
    before = clock.start()
    first = timed(case.ours.calls, case, args)
    theirs = timed(peer.calls, case, args)
    after = clock.start()
    again = timed(case.ours.calls, case, args)
    both = {
        "ms": (first.ms + again.ms) / 2,
        "low": min(first.low, again.low),
        "high": max(first.high, again.high),
        "passes_ms": [first.ms, again.ms],
        "n": first.n + again.n,
        "host_us": min(first.host_us, again.host_us),
    }
    return {
        "ours": both,
        "theirs": theirs._asdict(),
        "ratio": theirs.ms / both["ms"],
        "sm_mhz": [clock.read(before), clock.read(after)],
    }


def floors(case: Case, args: argparse.Namespace) -> dict[str, float]:
    """The least milliseconds that its bytes and its exponentials allow.

    Bytes at the rate of a large copy, and by a copy of just as many, timed as the case is.
    """
    size = max(case.n_bytes // 2, 1)
    pairs = [
        torch.empty(2, size, dtype=torch.int8, device=args.device)
        for _ in range(n_sets(case.n_bytes, args.device))
    ]
    same = timed([lambda pair=pair: pair[0].copy_(pair[1]) for pair in pairs], case, args)
    found = {"copy": case.n_bytes / args.rates["copy_bytes_per_s"] * 1e3, "same copy": same.ms}
    if case.n_exp and args.rates["exp_per_s"]:
        found["exp"] = case.n_exp / args.rates["exp_per_s"] * 1e3
    return found


def summary(rows: list[dict]) -> list[dict]:
    """Geometric mean, least and greatest ratio of each op to each peer."""
    found = []
    compared = [r for r in rows if "ratio" in r]
    for op, peer in dict.fromkeys((r["op"], r["peer"]) for r in compared):
        mine = [r for r in compared if (r["op"], r["peer"]) == (op, peer)]
        ratios = [r["ratio"] for r in mine]
        means = {"geometric_mean": geometric_mean(ratios), "min": min(ratios), "max": max(ratios)}
        means["worst_error_over_its"] = max(r["error_ratio"] for r in mine)
        found.append({"op": op, "peer": peer, "shapes": len(ratios)} | means)
    return found


def cells(row: dict) -> list[str]:
    if "failed" in row:
        return [row["op"], row["shape"], row["failed"][:60], *[""] * 7]
    worst = max(row["error"].values(), key=lambda e: e["norm"])
    ours, theirs = row["ours"], row.get("theirs")
    found = [row["op"], row["shape"], row["backend"], f"{ours['ms']:.4f}"]
    found.append(f"{ours['low']:.4f}-{ours['high']:.4f}")
    if theirs is None:
        found += [f"{row['peer']}: missing", "", f"{ours['host_us']:.0f}", f"{worst['norm']:.1e}"]
    else:
        peer_worst = max(row["peer_error"].values(), key=lambda e: e["norm"])
        found += [f"{row['peer']} {theirs['ms']:.4f}", f"{row['ratio']:.2f}"]
        found += [
            f"{ours['host_us']:.0f} {theirs['host_us']:.0f}",
            f"{worst['norm']:.1e} {peer_worst['norm']:.1e}",
        ]
    return [*found, " ".join(f"{k} {v:.0%}" for k, v in row["of_floor"].items())]


HEAD = "op|shape|backend|ours ms|20-80 %|peer ms|ratio|host us, its|error, its|of floor"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="all unless named")
    parser.add_argument("--out", type=Path, help="JSON, written after every row")
    parser.add_argument("--kernels", default="", help="op=backend,...: as hybridzoo's --kernels")
    parser.add_argument("--shape", action="append", help="only this shape, as the table writes it")
    parser.add_argument("--budget", type=float, default=250, help="milliseconds a pass")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--tiny", action="store_true", help="shapes that a CPU can do, for tests")
    args = parser.parse_args()
    torch.manual_seed(0)
    set_backends(parse_backends(args.kernels))
    args.rates = machine(args.device, 2**24 if args.tiny else 2**31)
    report = {
        "machine": args.rates,
        "kernels": args.kernels,
        "rows": [],
        "summary": [],
        "seconds": 0,
    }
    start = time.perf_counter()
    for part in args.parts or PARTS:
        table = (TINY if args.tiny else PARTS)[part]
        for make, shape in ((make, shape) for make, shapes in table for shape in shapes):
            if args.shape and text(shape) not in args.shape:
                continue
            report["rows"] += one(make, shape, args)
            report |= {"summary": summary(report["rows"]), "seconds": time.perf_counter() - start}
            save(report, args.out)
    print_table(HEAD.split("|"), [cells(row) for row in report["rows"]])
    for line in report["summary"]:
        print(" ".join(f"{k}={v:.3f}" if isinstance(v, float) else str(v) for k, v in line.items()))
    known = ("device", "date", "commit", "copy_bytes_per_s", "exp_per_s", "nvidia-smi", "versions")
    print({key: args.rates.get(key) for key in known}, f"{report['seconds']:.0f} s")
    return any("failed" in row or not row.get("repeats", True) for row in report["rows"])


@torch.no_grad()
def one(make: Make, shape: tuple[int, ...], args: argparse.Namespace) -> list[dict]:
    """The rows of a shape; one that fails leaves its reason and lets the others run."""
    try:
        rows = measured(make(shape, args.device), args)
    # the other rows are worth their time
    except FAILURES as problem:
        rows = [{"op": make.__name__, "shape": text(shape), "failed": repr(problem)}]
    for row in rows:
        print(" ".join(cells(row)), file=sys.stderr, flush=True)
    if args.device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


if __name__ == "__main__":
    sys.exit(main())
