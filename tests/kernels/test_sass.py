"""Every kernel as machine code, without a GPU: it compiles, spills nothing, and its core is short.

A case launches an op's backend as a model would, with its real widths; what would reach the GPU is
compiled for each architecture and counted (`sass.py`). The bounds are a little above what was
counted when they were written: a kernel that needs more has become slower, or says here why not.
"""

import ast
import re
from collections.abc import Callable
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from hybridzoo.kernels import sources
from hybridzoo.kernels.causal_conv1d import triton as conv
from hybridzoo.kernels.causal_conv1d_step import triton as conv_step
from hybridzoo.kernels.jit import triton
from hybridzoo.kernels.rms_norm import triton as norm
from hybridzoo.kernels.selective_scan import cuda
from hybridzoo.kernels.selective_scan import triton as scan
from hybridzoo.kernels.selective_scan_step import triton as step
from tests.kernels import sass

KERNELS = Path(sources.__file__).parent
# Hopper, for which the kernels are tuned, and the oldest that they run on
ARCHS = (90, 80)
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


class Bound(NamedTuple):
    """Most registers; most instructions of the core an exponential; widest load from memory."""

    registers: int
    slots: float | None = None
    load_bits: int = 128


class Case(NamedTuple):
    """A launch, and a bound for each kernel of it, by `<op>.<kernel>`."""

    name: str
    call: Callable[[], object]
    bounds: dict[str, Bound]


def zeros(*shape, dtype=BF16):
    return torch.zeros(shape, dtype=dtype)


def run_conv(b, l, i, **options):
    conv.run(zeros(b, l, i), zeros(i, 4), zeros(i), activation="silu", **options)


def run_conv_step(b, i):
    conv_step.run(zeros(b, i), zeros(b, 3, i), zeros(i, 4), zeros(i), activation="silu")


def run_norm(rows, d, residual):
    norm.run(zeros(rows, d), zeros(d), eps=1e-5, residual=zeros(rows, d, dtype=residual))


def scan_inputs(b, l, i, n, dtype=BF16):
    wide, maps = zeros(b, l, i, dtype=dtype), zeros(b, l, 1, n, dtype=dtype)
    return wide, wide, zeros(i, n, dtype=FP32), maps, maps


def options_of(i, z):
    weight = zeros(i, dtype=FP32)
    return {"D": weight, "z": z, "dt_bias": weight, "dt_softplus": True}


def run_scan(b, l, i, n):
    x, *rest = scan_inputs(b, l, i, n)
    scan.run(x, *rest, **options_of(i, x))


def run_step(b, i, n):
    x, maps, A = zeros(b, i), zeros(b, 1, n), zeros(i, n, dtype=FP32)
    step.run(x, zeros(b, i, n, dtype=FP32), x, A, maps, maps, A_is_log=True, **options_of(i, x))


def run_cuda(b, l, i, n, dtype=BF16, is_packed=False, n_segments=None):
    """On meta tensors: launch() is plain Python, and its choice reads the true sizes."""
    with torch.device("meta"):
        x, *rest = scan_inputs(b, l, i, n, dtype)
        weight, ends = zeros(i, dtype=FP32), torch.zeros(3, dtype=torch.int32)
    mapping = cuda.choose(b, l, i, n, x.device)
    if n_segments:
        mapping = mapping._replace(n_segments=n_segments)
    packed = ends if is_packed else None
    cuda.launch(x, *rest, weight, x, weight, None, packed, True, 0.0, inf, mapping=mapping)


def pack():
    return torch.tensor([0, 5, 9], dtype=torch.int32)


CONV, EDGES = "causal_conv1d._conv_kernel", "causal_conv1d._edges_kernel"
SCAN, FWD = "selective_scan._kernel", "selective_scan.selective_scan_fwd"
ENDS = "selective_scan.selective_scan_ends"
CASES = [
    Case("conv", lambda: run_conv(8, 2048, 4096), {CONV: Bound(128, 14.6)}),
    Case("conv-short", lambda: run_conv(8, 100, 4096), {CONV: Bound(128, 14.6)}),
    Case(
        "conv-packed",
        lambda: run_conv(1, 2048, 4096, cu_seqlens=pack()),
        {CONV: Bound(128, 14.6), EDGES: Bound(96)},
    ),
    Case(
        "conv-step", lambda: run_conv_step(64, 8192), {"causal_conv1d_step._step_kernel": Bound(64)}
    ),
    Case("norm-fp32", lambda: run_norm(16, 4096, FP32), {"rms_norm._norm_kernel": Bound(48)}),
    Case("norm-bf16", lambda: run_norm(16, 2048, BF16), {"rms_norm._norm_kernel": Bound(48)}),
    Case("scan-triton", lambda: run_scan(8, 4, 4096, 16), {SCAN: Bound(128, 12.5)}),
    Case("scan-triton-few", lambda: run_scan(1, 4, 4096, 16), {SCAN: Bound(80, 23)}),
    Case("scan-triton-64", lambda: run_scan(8, 4, 4096, 64), {SCAN: Bound(255, 9.5)}),
    Case(
        "scan-triton-plain",
        lambda: scan.run(*scan_inputs(1, 9, 4096, 16), cu_seqlens=pack()),
        {SCAN: Bound(96, 22.0)},
    ),
    Case(
        "scan-step", lambda: run_step(256, 8192, 16), {"selective_scan_step._kernel": Bound(64, 19)}
    ),
    Case("scan", lambda: run_cuda(8, 2048, 4096, 16), {FWD: Bound(128, 8.0)}),
    Case("scan-fp16", lambda: run_cuda(8, 2048, 4096, 16, FP16), {FWD: Bound(128, 8.0)}),
    Case("scan-fp32", lambda: run_cuda(8, 2048, 4096, 16, FP32), {FWD: Bound(128, 8.0)}),
    Case("scan-n8", lambda: run_cuda(8, 2048, 4096, 8), {FWD: Bound(128, 8.7)}),
    Case("scan-n64", lambda: run_cuda(4, 2048, 2048, 64), {FWD: Bound(128, 7.8)}),
    Case("scan-n5", lambda: run_cuda(2, 37, 255, 5), {FWD: Bound(128, 10.4, 32)}),
    Case("scan-packed", lambda: run_cuda(1, 2048, 4096, 16, BF16, True), {FWD: Bound(128, 10.3)}),
    Case(
        "scan-segments",
        lambda: run_cuda(1, 65536, 4096, 16, n_segments=8),
        {FWD: Bound(128, 8.0), ENDS: Bound(128, 5.8)},
    ),
]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_fit(case, arch, monkeypatch, tmp_path):
    for reason in ("triton is not installed" if triton is None else None, no_compiler(case)):
        if reason:
            pytest.skip(reason)
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    cubins = sass.compiled(monkeypatch, arch, case.call)
    assert cubins.keys() == case.bounds.keys()
    for name, cubin in cubins.items():
        (code,) = sass.read(cubin, tmp_path).values()
        bound = case.bounds[name]
        assert (code.stack, code.n_spills) == (0, 0), code
        assert code.registers <= bound.registers, code
        assert code.load_bits >= bound.load_bits, code
        if bound.slots is not None:
            # a core without exponentials would be another loop than the one that was meant
            assert code.n_exp > 0 and code.slots <= bound.slots, code


def no_compiler(case):
    is_cuda = not {FWD, ENDS}.isdisjoint(case.bounds)
    return sources.find_compiler().reason if is_cuda else None


def launched(path):
    """Names of the kernels that a Triton backend launches: name[grid](...)."""
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    return {
        f"{path.parent.name}.{call.func.value.id}"
        for call in calls
        if isinstance(call.func, ast.Subscript) and isinstance(call.func.value, ast.Name)
    }


def test_every_kernel_has_a_case():
    """Those of each triton.py, and each source of csrc."""
    bounds = {name for case in CASES for name in case.bounds}
    in_triton = set().union(*(launched(path) for path in KERNELS.glob("*/triton.py")))
    assert in_triton
    assert in_triton <= bounds
    in_cuda = set().union(*(functions(path) for path in sources.csrc().rglob("*.cu")))
    assert in_cuda
    assert in_cuda <= bounds


def functions(path):
    """Names of the kernels of a source, which begin with its op's; each opens a line."""
    op = path.parent.name
    opening = re.compile(rf'^(?:extern "C" __global__ .*?)?({op}_\w+)\(?$', re.MULTILINE)
    return {f"{op}.{name}" for name in opening.findall(path.read_text())}


LOOPS = """
        Function : looping
        /*0000*/                   MOV R1, c[0x0][0x28] ;   /* 0x00000a00ff017b82 */
        /*0010*/                   MUFU.EX2 R2, R1 ;        /* 0x0 */
        /*0020*/                   LDG.E.128 R4, [R2.64] ;  /* 0x0 */
        /*0030*/                   MUFU.EX2 R2, R1 ;        /* 0x0 */
        /*0040*/                   MUFU.EX2 R3, R1 ;        /* 0x0 */
        /*0050*/               @P0 FMUL R3, R1, R2 ;        /* 0x0 */
        /*0060*/              @!P1 BRA 0x30 ;               /* 0x0 */
        /*0070*/                   STL [R1], R2 ;           /* 0x0 */
        /*0080*/               @P0 BRA 0x10 ;               /* 0x0 */
        /*0090*/                   NOP ;                    /* 0x0 */
        /*00a0*/                   BRA 0xa0;                /* 0x0 */
"""


def test_the_core_is_the_innermost_loop_with_most_exponentials(monkeypatch, tmp_path):
    usage = " Function looping:\n  REG:40 STACK:8 SHARED:0 LOCAL:0"
    texts = {"-sass": LOOPS, "-res-usage": usage}
    monkeypatch.setattr(sass, "_tool", lambda option, _: texts[option])
    # two exponentials, the multiplication and the branch
    wanted = sass.Code(registers=40, stack=8, n_spills=1, load_bits=128, n_exp=2, slots=2.0)
    assert sass.read(b"", tmp_path) == {"looping": wanted}
