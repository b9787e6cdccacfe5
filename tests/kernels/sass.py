"""What compiled kernels cost, read off their machine code: no GPU is needed.

`compiled(monkeypatch, arch, call)` gives the cubins of the kernels that `call` would launch, with
the very signature, constants and alignments of that launch; `read` counts what is in a cubin.
"""

import functools
import re
import subprocess
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

from hybridzoo.kernels import loader, sources
from hybridzoo.kernels.jit import triton

LINE = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(@!?U?P\w+ +)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
USAGE = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)")
BRANCH = re.compile(r"(.*?)0x([0-9a-f]+)\s*$")


class Code(NamedTuple):
    """One kernel.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread in local memory.
        n_spills: instructions of the core that reach for it.
        load_bits: widest load from global memory.
        n_special: of the core, exponentials, reciprocals and what else the same unit makes. The
            core is the loop with the most of them, or the whole kernel where no loop has any.
        slots: instructions of the core for each of those.
    """

    registers: int
    stack: int
    n_spills: int
    load_bits: int
    n_special: int
    slots: float


class Line(NamedTuple):
    """An instruction: where, what, where it may branch to, whether the next may follow."""

    at: int
    op: str
    target: int | None
    goes_on: bool


END = Line(2**62, "", None, False)
# what launches ask of an H100 or H200 (torch.cuda.get_device_properties)
HOPPER = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=232448)


def read(cubin: bytes, folder: Path) -> dict[str, Code]:
    """Every kernel of a cubin by name."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    usage = {name: (int(r), int(s)) for name, r, s in USAGE.findall(_tool("-res-usage", path))}
    texts = re.split(r"Function : (\w+)", _tool("-sass", path))[1:]
    found = {}
    for name, text in zip(texts[::2], texts[1::2], strict=True):
        lines = [_line(*parts) for parts in LINE.findall(text)]
        (first, last), n_special, n_slots = _core(lines)
        core = [line.op for line in lines if first <= line.at <= last]
        widths = [_bits(line.op) for line in lines if line.op.startswith(("LDG", "LDGSTS"))]
        n_spills = sum(op.startswith(("LDL", "STL")) for op in core)
        slots = n_slots / max(1, n_special)
        found[name] = Code(*usage[name], n_spills, max(widths, default=0), n_special, slots)
    return found


def _line(at: str, guard: str, op: str, rest: str) -> Line:
    branch = BRANCH.search(rest) if op.startswith("BRA") else None
    ends = op in ("EXIT", "RET") or (branch is not None and not branch[1].strip())
    return Line(int(at, 16), op, int(branch[2], 16) if branch else None, bool(guard) or not ends)


def _core(lines: list[Line]) -> tuple[tuple[int, int], int, int]:
    """(first and last place, special functions, instructions) of the core."""
    branches = ((line.target, line.at) for line in lines)
    loops = [(target, at) for target, at in branches if target is not None and target <= at]
    costs = {loop: _way(lines, loop, loops) for loop in loops}
    core = max(costs, key=costs.get, default=None)
    if core is None or costs[core][0] == 0:
        core = (lines[0].at, lines[-1].at)
    return core, *_way(lines, core, loops)


def _way(lines: list[Line], loop: tuple[int, int], loops: list[tuple[int, int]]) -> tuple[int, int]:
    """(special functions, instructions) of the way once through a loop that has most of them.

    A way takes one of two branches, as in a scan a tile goes by the fast path or by the rare one.
    What loops inside this one hold is left out: they go round some other number of times.
    """
    first, last = loop
    inside = [(a, b) for a, b in loops if first <= a <= b <= last and (a, b) != loop]
    arrived = {first: (0, 0)}
    most = (0, 0)
    for line, after in pairwise([*lines, END]):
        if line.at not in arrived or line.at > last:
            continue
        n_special, n_slots = arrived[line.at]
        if line.op != "NOP" and not any(a <= line.at <= b for a, b in inside):
            n_special, n_slots = n_special + line.op.startswith("MUFU"), n_slots + 1
        most = max(most, (n_special, n_slots))
        for place in (after.at if line.goes_on else None, line.target):
            if place is not None and place > line.at:
                arrived[place] = max(arrived.get(place, (0, 0)), (n_special, n_slots))
    return most


def _bits(op: str) -> int:
    parts = op.split(".")
    for name, bits in (("128", 128), ("64", 64), ("U16", 16), ("S16", 16), ("U8", 8)):
        if name in parts:
            return bits
    return 32


def _tool(option: str, path: Path) -> str:
    """cuobjdump as Triton's wheel brings it."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, path], check=True, capture_output=True, text=True).stdout


def compiled(monkeypatch, arch: int, call) -> dict[str, bytes]:
    """The cubins of what `call` launches on an arch such as 90, by `<op>.<kernel>`."""
    found: dict[str, bytes] = {}
    if triton is not None:
        _catch_triton(monkeypatch, arch, found)
    _catch_cuda(monkeypatch, arch, found)
    call()
    return found


def _catch_triton(monkeypatch, arch: int, found: dict[str, bytes]) -> None:
    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    # a device number that no machine has: Triton keeps what it compiled by that number
    driver = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 1000 + arch,
        get_current_stream=lambda _: 0,
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    run = triton.runtime.jit.JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found[f"{self.module.split('.')[-2]}.{self.__name__}"] = kernel.asm["cubin"]

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", compile_only)


def _catch_cuda(monkeypatch, arch: int, found: dict[str, bytes]) -> None:
    def load(source: str, name: str, defines: sources.Defines, device: torch.device):
        cubin = _compile(source, frozenset(defines.items()), f"sm_{arch}")
        found[f"{source.split('/')[0]}.{name}"] = cubin
        return lambda *_: None

    monkeypatch.setattr(loader, "load", load)


@functools.cache
def _compile(source: str, defines: frozenset, arch: str) -> bytes:
    """Once for cases that ask for the same code."""
    return sources.compile_source(source, dict(defines), arch)
