"""Forward and backward in one call, of the ops whose backward is a kernel: cases of kernel.py."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from cases import HALF, Case, Peer, n_sets, normal, picks, text
from measure import Call, import_peer
from torch import Tensor

from hybridzoo.kernels.causal_conv1d import causal_conv1d
from hybridzoo.kernels.dispatch import use
from hybridzoo.kernels.rms_norm import rms_norm


def both_ways(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], dys: Sequence[Tensor]
) -> Call:
    """A call that gives the outputs and the gradients of the inputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]

    def call() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            outputs = function(*leaves)
            return (*outputs, *torch.autograd.grad(outputs, leaves, dys))

    return call


def conv_gradients(shape: tuple[int, ...], device: torch.device) -> Case:
    """causal_conv1d, width 4, silu; reads x and writes y, reads x and dy and writes dx."""
    b, l, i = shape
    n_bytes = 2 * 5 * b * l * i
    sets = [
        [normal(b, l, i, device=device) for _ in range(2)] for _ in range(n_sets(n_bytes, device))
    ]
    weight, bias = normal(i, 4, device=device) / 2, normal(i, device=device) / 2
    at = picks(i, device)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
        return (causal_conv1d(x, weight, bias, activation="silu")[0],)

    def outputs(found: tuple[Tensor, ...], at: Tensor = at) -> dict[str, Tensor]:
        y, dx, dweight, dbias = found
        return {"y": y[..., at], "dx": dx[..., at], "dweight": dweight[at], "dbias": dbias[at]}

    few = [t.double() for t in (sets[0][0][..., at], weight[at], bias[at], sets[0][1][..., at])]
    with use(causal_conv1d="reference"):
        truth = both_ways(ours, few[:3], few[3:])()
    backend = causal_conv1d.op.pick(
        sets[0][0], weight, bias, activation="silu", initial_state=None, cu_seqlens=None
    )
    calls = [both_ways(ours, (x, weight, bias), (dy,)) for x, dy in sets]
    return Case(
        "conv fwd+bwd", text(shape), backend, Peer("ours", calls, outputs),
        [_conv_peer(sets, weight, bias, outputs, is_last) for is_last in (False, True)],
        outputs(truth, torch.arange(len(at), device=device)), n_bytes,
    )  # fmt: skip


def _conv_peer(
    sets: list[list[Tensor]], weight: Tensor, bias: Tensor, outputs: Callable, is_last: bool
) -> Peer:
    name = "causal_conv1d channel-last" if is_last else "causal_conv1d (b,d,l)"
    peer, why = import_peer("causal_conv1d", "causal_conv1d_fn")
    if peer is None:
        return Peer(name, missing=why)

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
        return (peer(x, weight, bias, activation="silu"),)

    laid = [[t.transpose(1, 2) if is_last else t.mT.contiguous() for t in s] for s in sets]
    calls = [both_ways(theirs, (x, weight, bias), (dy,)) for x, dy in laid]
    return Peer(name, calls, lambda o: outputs((o[0].mT, o[1].mT, *o[2:])))


def norm_gradients(shape: tuple[int, ...], device: torch.device) -> Case:
    """Residual add and RMSNorm: y, h; back from dy and dh to x, the residual and the weight."""
    rows, d, bits = shape
    wide, eps = {16: HALF, 32: torch.float32}[bits], 1e-5
    # x, residual -> y, h; h, dy, dh -> one gradient of the stream, and x's where it is narrower
    n_bytes = rows * d * (4 + 2 * wide.itemsize + 2 + 3 * wide.itemsize + 2 * (bits == 32))
    weight = 1 + 0.1 * normal(d, device=device)
    sets = [
        [normal(rows, d, device=device, dtype=t) for t in (HALF, wide, HALF, wide)]
        for _ in range(n_sets(n_bytes, device))
    ]
    some = picks(rows, device)

    def ours(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm(x, weight, eps=eps, residual=residual)

    def in_torch(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        h = residual + x
        return F.rms_norm(h, (d,), weight.to(wide), eps).to(HALF), h

    peer, why = import_peer("mamba_ssm.ops.triton.layer_norm", "layer_norm_fn")
    options = {"eps": eps, "prenorm": True, "residual_in_fp32": bits == 32, "is_rms_norm": True}

    def in_mamba(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return peer(x, weight, None, residual=residual, **options)

    def outputs(found: tuple[Tensor, ...]) -> dict[str, Tensor]:
        y, h, dx, dweight, dresidual = found
        return {
            "y": y[some], "h": h[some], "dx": dx[some], "dresidual": dresidual[some],
            "dweight": dweight,
        }  # fmt: skip

    def calls(function: Callable[..., tuple[Tensor, ...]]) -> list[Call]:
        return [both_ways(function, (x, weight, r), (dy, dh)) for x, r, dy, dh in sets]

    # every row, as the weight's gradient is a sum over them
    x, residual, *dys = (t.double() for t in sets[0])
    with use(rms_norm="reference"):
        truth = both_ways(ours, (x, weight.double(), residual), dys)()
    backend = rms_norm.op.pick(sets[0][0], weight, eps=eps, residual=sets[0][1], weight_fp32=False)
    return Case(
        "norm fwd+bwd", text(shape), backend, Peer("ours", calls(ours), outputs),
        [
            Peer("torch", calls(in_torch), outputs),
            Peer("mamba_ssm", calls(in_mamba) if peer else [], outputs, why),
        ],
        outputs(truth), n_bytes,
    )  # fmt: skip
