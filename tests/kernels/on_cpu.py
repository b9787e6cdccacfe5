"""CUDA sources of csrc on the CPU: a thread of the host a thread of the block, one block at a time.

Nothing holds the lanes of a warp together here but what the source says, so ThreadSanitizer finds
the barriers that it lacks. Instructions written in PTX are replaced by C++ of the same meaning.
"""

import ctypes
import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from hybridzoo.kernels import sources

SHIM = Path(__file__).with_name("on_cpu.h")
# mnemonic in the source -> C++ with the operands, results first
PTX = {
    "ex2.approx": "{0} = std::exp2({1});",
    "rcp.approx": "{0} = 1.0f / {1};",
    "cvt.rn.bf16x2": "{0} = pack_bf16({1}, {2});",
    "cvt.rn.f16x2": "abort();",
    "cvt.f32.f16": "abort();",
    "prefetch": ";",
    '"+r"': ";",
}
_OPERAND = re.compile(r'"[=+]?[a-z]"\s*\(((?:[^()]|\([^()]*\))*)\)')


def loader(folder: Path, *flags: str) -> Callable:
    """In the place of `loader.load`: kernels built into `folder` with these flags of g++."""

    def load(source: str, name: str, defines: dict, device: torch.device) -> Callable:
        library = ctypes.CDLL(str(build(source, name, defines, folder, flags or ("-O1",))))

        def launch(grid: tuple, threads: int, shared_bytes: int, *args: object) -> None:
            assert library.shared_bytes() <= shared_bytes <= 2**18, "the memory of on_cpu.h"
            library.run(grid[0], grid[1], threads, *map(_in_c, args))

        return launch

    return load


def _in_c(value: object) -> object:
    if value is None or isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr() or None if value is not None else None)
    return (ctypes.c_float if isinstance(value, float) else ctypes.c_longlong)(value)


def translate(text: str) -> str:
    """A source or header with its PTX as C++."""

    def replaced(match: re.Match) -> str:
        (line,) = [cxx for name, cxx in PTX.items() if name in match[0]]
        return line.format(*_OPERAND.findall(match[0]))

    return re.sub(r"asm\s*(?:volatile)?\s*\(.*?\)\s*;", replaced, text, flags=re.DOTALL)


def build(source: str, name: str, defines: dict, folder: Path, flags: tuple[str, ...]) -> Path:
    """A shared library of one kernel; `run` in it takes the grid and the kernel's arguments."""
    options = sorted(f"-D{key}={value}" for key, value in defines.items())
    digest = hashlib.sha256(" ".join([name, *options, *flags]).encode()).hexdigest()[:16]
    library = folder / f"{digest}.so"
    if library.exists():
        return library
    for header in sources.csrc().rglob("*.cuh"):
        place = folder / header.relative_to(sources.csrc())
        place.parent.mkdir(exist_ok=True)
        # the shim has a barrier of its own
        place.write_text(translate(header.read_text()) if header.name != "barrier.cuh" else "")
    shutil.copy(SHIM, folder)
    text = translate((sources.csrc() / source).read_text())
    # the one signature, without its comments
    plain = re.sub(r"//.*", "", text[text.index('extern "C"') :])
    parameters = re.search(r"\(\s*((?:const )?element\*.*?)\)\s*\{", plain, re.DOTALL)[1]
    names = [p.split()[-1].lstrip("*") for p in parameters.split(",")]
    size = "sizeof(Shared)" if "extern __shared__" in text else "0"
    path = folder / f"{digest}.cpp"
    path.write_text(
        f'#include "on_cpu.h"\n{text}\n'
        f'extern "C" int shared_bytes() {{ return {size}; }}\n'
        f'extern "C" void run(int grid_x, int grid_y, int threads, {parameters}) {{\n'
        f"    on_cpu(grid_x, grid_y, threads, [&] {{ {name}({', '.join(names)}); }});\n}}\n"
    )
    command = ["g++", "-std=c++20", "-shared", "-fPIC", "-pthread", "-w", *flags, *options]
    subprocess.run([*command, f"-I{folder}", "-o", library, path], check=True)
    return library
