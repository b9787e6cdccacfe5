"""Where a training step's time goes: its kernels by part, phase by phase; see train.py."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from measure import kernels
from torch import Tensor
from training import Side, nats

# part: what its kernels' names look like, on either side; the first part that fits has a kernel.
# Before the scan come the words of cuBLAS, CUTLASS and their reductions; "selective_scan" in full,
# as sorting an embedding's gradient uses cub's scans, and what our Triton scan's begin with.
NAMES = {
    "projections": r"gemm|gemv|cutlass|nvjet|xmma|cublas|splitk|^aten::(mm|addmm|bmm)$",
    "scan": r"selective_scan|^_scan_",
    "conv": r"conv(?!ert)",
    "norms": r"norm",
}
REST = "rest"
# a phase is a part as a whole where names cannot tell its kernels from others': the head's product
# from a projection's
WHOLE = {"head forward": "head + loss", "head backward": "head + loss", "optimizer": "optimizer"}
PARTS = (*NAMES, "head + loss", "optimizer", REST)
DIRECTIONS = ("forward", "backward")
REPEATS = 2


def part_of(phase: str, name: str) -> str:
    if phase in WHOLE:
        return WHOLE[phase]
    return next((part for part, words in NAMES.items() if re.search(words, name.lower())), REST)


def breakdown(
    side: Side, ids: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer, device: torch.device
) -> dict[str, Any]:
    """Milliseconds of device time of a warm step, the mean of some.

    Returns:
        "parts", {part: {direction: ms}}, the optimizer's as forward; "kernels", every kernel with
        its phase and part, the longest first; "total", the sum of them all.
    """
    found: Counter[tuple[str, str]] = Counter()
    for _ in range(REPEATS):
        for phase, call in _phases(side, ids, labels, optimizer).items():
            for name, ms in kernels(call, device).items():
                found[phase, name] += ms / REPEATS
        optimizer.zero_grad(set_to_none=True)
    parts = {part: dict.fromkeys(DIRECTIONS, 0.0) for part in PARTS}
    listed = []
    for (phase, name), ms in found.most_common():
        part = part_of(phase, name)
        parts[part]["backward" if "backward" in phase else "forward"] += ms
        listed.append({"phase": phase, "part": part, "name": name, "ms": ms})
    return {"parts": parts, "kernels": listed, "total": sum(found.values())}


def _phases(
    side: Side, ids: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer
) -> dict[str, Callable[[], Any]]:
    """The step as calls in order: the same arithmetic, with the head and the loss apart."""
    kept: dict[str, Tensor] = {}

    def forward() -> None:
        kept["hidden"] = side.hidden(ids)

    def head_forward() -> None:
        kept["leaf"] = kept["hidden"].detach().requires_grad_()
        kept["loss"] = nats(side.head(kept["leaf"]), labels)

    return {
        "forward": forward,
        "head forward": head_forward,
        "head backward": lambda: kept["loss"].backward(),
        "backward": lambda: kept["hidden"].backward(kept["leaf"].grad),
        "optimizer": optimizer.step,
    }


def print_rest(title: str, found: dict[str, Any], n: int = 12) -> None:
    """The kernels that no part has, by name: the longest, and how many more with what sum."""
    rest: Counter[str] = Counter()
    for line in found["kernels"]:
        if line["part"] == REST:
            rest[f"{line['phase']}: {line['name'][:110]}"] += line["ms"]
    print(f"{title}, rest, ms:")
    for name, ms in rest.most_common(n):
        print(f"    {ms:9.4f} {name}")
    others = rest.most_common()[n:]
    print(f"    {sum(ms for _, ms in others):9.4f} {len(others)} others, named in the JSON")
