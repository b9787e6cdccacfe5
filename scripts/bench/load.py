"""How fast load() is, and what memory it takes, against `cat` of the same files; cold cache each.

    python scripts/bench/load.py DIR [--shard-gb 2] [--repeats 3] [--layers 64] [--layout native]
        [--device cpu] [--keep]

Writes a random checkpoint of falcon-mamba-7b's shape (14.6 GB of bf16 by default; --layers makes it
smaller) to DIR, tensor by tensor, and removes it at the end. Before every run the files leave the
page cache, which mincore() confirms. load() is timed in a process of its own, imports done, with
one element of every 4 KiB of every parameter then read; cat is timed whole. Afterwards every bit is
compared with what was written. "peak" is VmHWM, which counts mapped files.
"""

import argparse
import ctypes
import json
import mmap
import os
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch

from hybridzoo.checkpoint import NATIVE, load
from hybridzoo.checkpoint.store import Store
from hybridzoo.config import HybridConfig


def falcon_mamba(n_layers: int) -> HybridConfig:
    """falcon-mamba-7b (64 layers), or a lower one."""
    mamba = {"kind": "mamba1", "d_inner": 8192, "dt_rank": 256, "x_norm": "weightless"}
    return HybridConfig.from_dict(
        {
            "name": "random",
            "d_model": 4096,
            "vocab_size": 65024,
            "pattern": f"{n_layers}M",
            "layers": {"M": mamba},
            "tie_embeddings": False,
        }
    )


class Random:
    """Parameters nobody stores: each drawn anew from its name. See store.Parameters."""

    def __init__(self, config: HybridConfig) -> None:
        self.config, self.params = config, dict(config.params())

    def dtype(self, name: str) -> str:
        return "F32" if self.params[name].fp32 else "BF16"

    def fetch(self, name: str) -> torch.Tensor:
        """Random sign, mantissa and low exponent bits: finite, 2**-7 to 2**-3."""
        rng, shape = np.random.default_rng(zlib.crc32(name.encode())), self.params[name].shape
        n, is_fp32 = int(np.prod(shape)), self.params[name].fp32
        # a word of 64 bits holds two fp32 or four bf16; those are the upper halves of fp32
        words = rng.integers(2**64, size=-(-n // (2 if is_fp32 else 4)), dtype=np.uint64)
        keep, base = (0x81FFFFFF, 0x3C000000) if is_fp32 else (0x81FF, 0x3C00)
        bits = words.view(np.uint32 if is_fp32 else np.uint16)[:n]
        bits &= bits.dtype.type(keep)
        bits |= bits.dtype.type(base)
        raw = torch.from_numpy(bits.view(np.int32 if is_fp32 else np.int16))
        return raw.view(torch.float32 if is_fp32 else torch.bfloat16).view(shape)


def evict(files: list[Path]) -> None:
    """Drop files from the page cache, and see that they are gone."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        # dirty pages would stay
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    cached = sum(map(cached_bytes, files))
    assert cached == 0, f"still cached: {cached} bytes"


def cached_bytes(path: Path) -> int:
    """How much of a file is in the page cache."""
    with open(path, "rb") as file:
        content = np.memmap(file, np.uint8, "r")
    pages = np.empty(-(-len(content) // mmap.PAGESIZE), np.uint8)
    where = ctypes.c_void_p(content.ctypes.data), ctypes.c_size_t(len(content))
    assert ctypes.CDLL(None).mincore(*where, ctypes.c_void_p(pages.ctypes.data)) == 0
    return mmap.PAGESIZE * int((pages & 1).sum())


def status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))


def measure_load(directory: Path, device: str) -> None:
    """The child: load, touch, print; then compare with what was written."""
    before = status_bytes("VmHWM")
    if device != "cpu":
        torch.zeros(1, device=device)
    start = time.perf_counter()
    model = load(directory, device=device)
    loaded = time.perf_counter()
    # a view: reshape would copy; one element a page is enough to have the page read
    touched = sum(
        p.detach().view(-1)[:: 4096 // p.element_size()].sum() for p in model.parameters()
    )
    assert torch.isfinite(touched).item()
    done = time.perf_counter()
    found = {"seconds": done - start, "load_seconds": loaded - start}
    found |= {"peak": status_bytes("VmHWM"), "imports": before}
    random = Random(model.config)
    for name in random.params:
        assert torch.equal(model.get_parameter(name).cpu(), random.fetch(name)), name
    print(json.dumps(found))


def measure(directory: Path, files: list[Path], device: str) -> dict[str, float]:
    """One cold cat and one cold load."""
    evict(files)
    start = time.perf_counter()
    subprocess.run(f"cat {' '.join(map(str, files))} > /dev/null", shell=True, check=True)
    cat = time.perf_counter() - start
    evict(files)
    command = [sys.executable, __file__, str(directory), "--device", device, "--child"]
    found = json.loads(subprocess.check_output(command, text=True))
    size = sum(path.stat().st_size for path in files)
    found |= {"cat_seconds": cat, "ratio": cat / found["seconds"]}
    return found | {"cat_gb_s": size / cat / 1e9, "load_gb_s": size / found["seconds"] / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shard-gb", type=float, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--layout", default=NATIVE)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        measure_load(asked.directory, asked.device)
        return
    # a kept one is used again
    if not asked.directory.exists():
        store = Store(asked.directory, asked.layout, None, int(asked.shard_gb * 1e9))
        store.run(Random(falcon_mamba(asked.layers)), {})
    files = sorted(asked.directory.glob("*.safetensors"))
    sizes = [path.stat().st_size for path in files]
    about = {"bytes": sum(sizes), "shards": len(files), "largest_shard": max(sizes)}
    for _ in range(asked.repeats):
        run = about | measure(asked.directory, files, asked.device)
        run["peak_limit"] = about["bytes"] + about["largest_shard"]
        print(json.dumps(run))
        print(
            "{load_gb_s:.2f} GB/s, cat {cat_gb_s:.2f} GB/s, ratio {ratio:.2f}; ".format(**run)
            + f"peak {run['peak'] / 1e9:.2f} GB of {run['peak_limit'] / 1e9:.2f} allowed",
            flush=True,
        )
    if not asked.keep:
        shutil.rmtree(asked.directory)


if __name__ == "__main__":
    main()
