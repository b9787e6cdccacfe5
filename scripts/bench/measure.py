"""What the benches share: device time, errors, the machine's own rates, peers, tables and JSON."""

import importlib
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybridzoo.errors import BackendError
from hybridzoo.kernels.jit import triton

Call = Callable[[], Any]

# the host stays this far ahead of the device, so that no launch latency lies between two events:
# before a burst of calls the device spins, for LEAD_S at least
BURST, LEAD_CYCLES, LEAD_S = 20, 8_000_000, 3e-3
MUFU_PER_CLOCK = 16

# of a kernel that does not compile, asks for too much or refuses its arguments
FAILURES = (
    BackendError, RuntimeError, ValueError, TypeError, AssertionError,
    *([triton.TritonError] if triton else []),
)  # fmt: skip

# kind of kernel: words of its name
KINDS = {
    "gemm": "gemm|gemv|cutlass|nvjet|xmma|cublas|splitk",
    "scan": "scan|state_update",
    "conv": "conv",
    "norm": "norm",
    "copy": "copy|cat|fill|elementwise",
}


class Times(NamedTuple):
    """Milliseconds of one call: median, 20th and 80th percentile, of how many; the host's share."""

    ms: float
    low: float
    high: float
    n: int
    host_us: float


def spread(samples: Sequence[float], host_us: float) -> Times:
    ordered = sorted(samples)
    at = [ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.8)]
    return Times(statistics.median(ordered), *at, len(ordered), host_us)


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sample(calls: Sequence[Call], device: torch.device, budget_ms: float) -> Times:
    """Time calls in turn, each with inputs of its own, for about `budget_ms`.

    On CUDA the times are the device's, between events: the host enqueues a burst behind a kernel
    that spins, and `host_us` says what it takes to enqueue one call.
    """
    for call in calls:
        call()
    sync(device)
    start = time.perf_counter()
    for i in range(3):
        calls[i % len(calls)]()
    enqueued = time.perf_counter() - start
    sync(device)
    estimate = max((time.perf_counter() - start) / 3 * 1e3, 1e-3)
    n = min(max(int(budget_ms / estimate), 5), 300)
    if device.type != "cuda":
        return spread([_wall_ms(calls[i % len(calls)]) for i in range(n)], enqueued / 3 * 1e6)
    # twice the time that the host took, as hosts falter
    burst = min(max(int(LEAD_S / (2 * enqueued / 3)), 1), BURST)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
    host = []
    for i, (before, after) in enumerate(events):
        if i % burst == 0 and estimate < 2:
            torch.cuda._sleep(LEAD_CYCLES)
        before.record()
        start = time.perf_counter()
        calls[i % len(calls)]()
        host.append(time.perf_counter() - start)
        after.record()
    sync(device)
    times = [before.elapsed_time(after) for before, after in events]
    return spread(times, statistics.median(host) * 1e6)


def _wall_ms(call: Call) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def captured(calls: Sequence[Call]) -> Call:
    """All calls, in turn, as one CUDA graph; the caller divides its time by their number."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for call in calls:
            call()
    return graph.replay


def kernels(call: Call, device: torch.device) -> Counter[str]:
    """Milliseconds of each kernel that a call launches."""
    is_cuda = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if is_cuda else activity.CPU]) as seen:
        call()
        sync(device)
    found: Counter[str] = Counter()
    for event in seen.key_averages():
        # the host's events carry the time of the kernels that they launched once more
        if event.device_type.name.lower() == device.type:
            spent = event.self_device_time_total if is_cuda else event.self_cpu_time_total
            found[event.key] += spent / 1e3
    return found


def by_part(found: Counter[str]) -> dict[str, Any]:
    """Milliseconds by kind of kernel, and the ten longest by name."""
    sums: Counter[str] = Counter()
    for name, ms in found.items():
        kind = next((k for k, words in KINDS.items() if re.search(words, name.lower())), "other")
        sums[kind] += ms
    longest = {name[:120]: ms for name, ms in found.most_common(10)}
    return {"total": sum(sums.values()), **dict(sums.most_common()), "longest": longest}


def error(got: Tensor, truth: Tensor) -> dict[str, float]:
    """Of a result against float64: relative in norm, and the largest over the largest value."""
    difference = got.double() - truth
    return {
        "norm": float(difference.norm() / truth.norm()),
        "max": float(difference.abs().max() / truth.abs().max()),
    }


def copy_bytes_per_s(device: torch.device, n_bytes: int) -> float:
    """Bytes read and written a second by a copy of `n_bytes`."""
    x = torch.randint(-99, 99, (n_bytes,), dtype=torch.int8, device=device)
    y = torch.empty_like(x)
    return 2 * n_bytes / sample([lambda: y.copy_(x)], device, 200).ms * 1e3


def exp_per_s(device: torch.device) -> float | None:
    """How many exponentials the device's special-function units finish a second."""
    if device.type != "cuda":
        return None
    n_sm = torch.cuda.get_device_properties(device).multi_processor_count
    return n_sm * MUFU_PER_CLOCK * Clock(device).read_max() * 1e6


class Clock:
    """The SM clock while work runs: nvidia-smi is started before it and read after it."""

    def __init__(self, device: torch.device) -> None:
        self.is_there = device.type == "cuda" and shutil.which("nvidia-smi") is not None
        self._uuid = ""
        if self.is_there:
            self._uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"

    def start(self, field: str = "clocks.sm") -> "subprocess.Popen[str] | None":
        if not self.is_there:
            return None
        command = ["nvidia-smi", f"--id={self._uuid}", f"--query-gpu={field}"]
        command.append("--format=csv,noheader,nounits")
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def read(self, started: "subprocess.Popen[str] | None") -> str | None:
        return None if started is None else started.communicate()[0].strip()

    def read_max(self) -> float:
        """The highest SM clock in MHz; an H100's or H200's where nvidia-smi is missing."""
        text = self.read(self.start("clocks.max.sm"))
        return float(text) if text and text.replace(".", "").isdigit() else 1980.0


def import_peer(name: str, attribute: str) -> tuple[Any, str]:
    """(attribute of a peer's module, ""), or (None, why it is not there)."""
    try:
        return getattr(importlib.import_module(name), attribute), ""
    except (ImportError, OSError, AttributeError) as problem:
        return None, f"{name} cannot be imported: {problem}"


def machine(device: torch.device, copy_size: int) -> dict[str, Any]:
    """Device, versions, and the two rates that floors are made of."""
    found: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "commit": _commit(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": {
            name: _version(name)
            for name in ("torch", "triton", "cuda-core", "mamba_ssm", "causal_conv1d", "numpy")
        },
    }
    if device.type == "cuda":
        clock = Clock(device)
        field = "name,driver_version,clocks.max.sm,clocks.max.mem,clocks.sm,power.limit"
        found["device"] = torch.cuda.get_device_name(device)
        found["nvidia-smi"] = {field: clock.read(clock.start(field))}
        properties = torch.cuda.get_device_properties(device)
        found["n_sm"], found["l2_bytes"] = (
            properties.multi_processor_count,
            properties.L2_cache_size,
        )
        # the clock settles under load
        copy_bytes_per_s(device, copy_size)
    found["copy_bytes_per_s"] = copy_bytes_per_s(device, copy_size)
    found["exp_per_s"] = exp_per_s(device)
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        # peers built elsewhere and unpacked leave no metadata
        return import_peer(name, "__version__")[0]


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    if shutil.which("git") is None:
        return None
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.strip() or None


def save(report: dict[str, Any], path: Path | None) -> None:
    """Write the report so far; a reader never sees half a file."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1, default=str))
    os.replace(part, path)


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell, in Markdown."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    for row in (head, rule, *rows):
        cells = " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(f"| {cells} |")


def print_parts(title: str, parts: dict[str, Any]) -> None:
    """What `by_part` gives."""
    print(title, "ms:", {k: round(v, 3) for k, v in parts.items() if k != "longest"})
    for name, ms in parts["longest"].items():
        print(f"    {ms:9.4f} {name}")
