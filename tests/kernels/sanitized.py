"""Every kernel at small sizes on a GPU, forward and backward: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python -m tests.kernels.sanitized
    compute-sanitizer --tool racecheck python -m tests.kernels.sanitized every-lane

Results are not looked at, as the tests do; tails of tiles and blocks, packs and segments are there.
every-lane: barriers as racecheck understands them, see csrc/common/barrier.cuh.
"""

import sys

import torch

from hybridzoo.kernels import loader
from hybridzoo.kernels.causal_conv1d import causal_conv1d
from hybridzoo.kernels.dispatch import use
from hybridzoo.kernels.rms_norm import rms_norm
from hybridzoo.kernels.selective_scan import bwd, fwd, selective_scan
from tests.kernels.compare import pack, randn
from tests.kernels.test_bwd_on_cpu import CASES
from tests.kernels.test_on_cpu import LENGTHS, MAPPINGS, made

DEVICE = "cuda"


def on_gpu(given):
    return fwd.Arguments(*(t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in given))


def scans():
    """The CUDA kernels at every mapping, with and without packs."""
    for dtype in (torch.bfloat16, torch.float32):
        for mapping in MAPPINGS:
            n = 64 if mapping.channels > 1 else 16
            fwd.launch(on_gpu(made(2, 75, 40, n, dtype=dtype)), mapping, 16)
            fwd.launch(on_gpu(packed(n, dtype)), mapping, 16)
        for n, mapping in CASES:
            first = fwd.Mapping(8, 1, 4, 16) if n <= 32 else fwd.Mapping(8, 2, 4, 8)
            for given in (made(2, 75, 40, n, dtype=dtype), packed(n, dtype)):
                given = on_gpu(given)
                y, final_state, checkpoints = fwd.launch(given, first, mapping.tokens)
                bwd.launch(given, y, final_state, checkpoints, mapping)


def packed(n, dtype):
    rows, cu_seqlens = len(LENGTHS), pack(LENGTHS)
    return made(1, sum(LENGTHS), 40, n, dtype=dtype, rows=rows, cu_seqlens=cu_seqlens)


def leaf(*shape, seed, dtype=torch.bfloat16):
    return randn(*shape, seed=seed, dtype=dtype, device=DEVICE).requires_grad_()


def others():
    """The Triton kernels, by their ops."""
    given = on_gpu(made(2, 75, 40, 16, dtype=torch.bfloat16))
    leaves = [t.requires_grad_() for t in given[:5]]
    with use(selective_scan="triton"):
        y, _ = selective_scan(*leaves, z=given.z, dt_softplus=True)
    y.sum().backward()
    for cu_seqlens in (None, pack(LENGTHS, DEVICE)):
        y, _ = causal_conv1d(
            leaf(1, sum(LENGTHS), 40, seed=0), leaf(40, 4, seed=1), leaf(40, seed=2),
            activation="silu", cu_seqlens=cu_seqlens,
        )  # fmt: skip
        y.sum().backward()
    y, h = rms_norm(leaf(37, 40, seed=3), leaf(40, seed=4), eps=1e-5, residual=leaf(37, 40, seed=5))
    (y.sum() + h.sum()).backward()


def with_every_lane():
    """Kernels are compiled so from here on."""
    known = loader.load

    def load(source, name, defines, device):
        return known(source, name, {**defines, "EVERY_LANE_ARRIVES": 1}, device)

    loader.load = load


if __name__ == "__main__":
    if sys.argv[1:] == ["every-lane"]:
        with_every_lane()
    scans()
    others()
    torch.cuda.synchronize()
    sys.stdout.write("every kernel ran\n")
