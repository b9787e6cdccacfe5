"""What compiled kernels cost, read off their machine code: no GPU is needed.

`compiled(monkeypatch, arch, call)` gives the cubins of the kernels that `call` would launch, with
the very signature, constants and alignments of that launch; `read` counts what is in a cubin.
"""

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

from hybridzoo.kernels import loader, sources
from hybridzoo.kernels.jit import triton

LINE = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
USAGE = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)")
BRANCH = re.compile(r"0x([0-9a-f]+)\s*$")


class Code(NamedTuple):
    """One kernel.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread.
        n_spills: instructions that reach for local memory.
        load_bits: widest load from global memory.
        n_exp: exponentials in the core, the innermost loop with the most of them; 0 without one.
        slots: instructions of the core for each of its exponentials.
    """

    registers: int
    stack: int
    n_spills: int
    load_bits: int
    n_exp: int
    slots: float


def read(cubin: bytes, folder: Path) -> dict[str, Code]:
    """Every kernel of a cubin by name."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    usage = {name: (int(r), int(s)) for name, r, s in USAGE.findall(_tool("-res-usage", path))}
    texts = re.split(r"Function : (\w+)", _tool("-sass", path))[1:]
    found = {}
    for name, text in zip(texts[::2], texts[1::2], strict=True):
        lines = [(int(at, 16), op, rest) for at, op, rest in LINE.findall(text)]
        ops = [op for _, op, _ in lines if op != "NOP"]
        n_exp, slots = _core(lines)
        widths = [_bits(op) for op in ops if op.startswith(("LDG", "LDGSTS"))]
        n_spills = sum(op.startswith(("LDL", "STL")) for op in ops)
        found[name] = Code(*usage[name], n_spills, max(widths, default=0), n_exp, slots)
    return found


def _core(lines: list[tuple[int, str, str]]) -> tuple[int, float]:
    """(exponentials, instructions a exponential) of the innermost loop with most of them."""
    loops = []
    for at, op, rest in lines:
        target = BRANCH.search(rest) if op == "BRA" else None
        if target and int(target[1], 16) < at:
            loops.append((int(target[1], 16), at))
    best = (0, 0.0)
    for first, last in loops:
        if any(first <= a and b <= last and (a, b) != (first, last) for a, b in loops):
            continue
        body = [op for at, op, _ in lines if first <= at <= last and op != "NOP"]
        n_exp = body.count("MUFU.EX2")
        if n_exp > best[0]:
            best = (n_exp, len(body) / n_exp)
    return best


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
        cubin = sources.compile_source(source, defines, f"sm_{arch}")
        found[f"{source.split('/')[0]}.{name}"] = cubin
        return lambda *_: None

    monkeypatch.setattr(loader, "load", load)
