"""Forward and backward in one call, of the ops whose backward is a kernel: cases of kernel.py."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from cases import HALF, Case, Peer, n_sets, normal, picks, scan_call, scan_weights, text
from measure import Call, import_peer
from torch import Tensor

from hybridzoo.kernels.causal_conv1d import causal_conv1d
from hybridzoo.kernels.dispatch import use
from hybridzoo.kernels.rms_norm import rms_norm
from hybridzoo.kernels.selective_scan import selective_scan


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


# of float64's gradients of B and C all channels are a part, which larger shapes leave out
MAX_CHECKED = 2**26


def scan_gradients(shape: tuple[int, ...], device: torch.device) -> Case:
    """selective_scan with z, D, dt_bias and softplus: y, and the gradients of all it takes.

    Reads x, dt, z and writes y; reads these and dy and writes three gradients.
    """
    b, i, l, n = shape
    n_bytes = 2 * (11 * b * l * i + 6 * b * l * n)
    weights, sets = scan_weights(i, n, device), []
    for _ in range(n_sets(n_bytes, device)):
        x, dt, z, dy = (normal(b, l, i, device=device) for _ in range(4))
        B, C = (normal(b, l, n, device=device) for _ in range(2))
        sets.append({"x": x, "dt": dt / 2, "z": z, "B": B, "C": C, "dy": dy})
    is_whole = b * l * i <= MAX_CHECKED
    at = torch.arange(i, device=device) if is_whole else picks(i, device)

    def ours(*given: Tensor) -> tuple[Tensor]:
        x, dt, z, B, C, A, D, dt_bias = given
        options = {"D": D, "z": z, "dt_bias": dt_bias, "dt_softplus": True}
        return (selective_scan(x, dt, A, B[:, :, None], C[:, :, None], **options)[0],)

    def outputs(found: tuple[Tensor, ...], at: Tensor = at) -> dict[str, Tensor]:
        named = dict(zip(("y", *_SCANNED), found, strict=True))
        maps = {name: named.pop(name) for name in ("B", "C")}
        rows = {name: named.pop(name)[at] for name in ("A", "D", "dt_bias")}
        found_there = {name: t[..., at] for name, t in named.items()} | rows
        return found_there | (maps if is_whole else {})

    few = {k: t[..., at].double() if k not in "BC" else t.double() for k, t in sets[0].items()}
    few |= {k: t[at].double() for k, t in weights.items()}
    with use(selective_scan="reference"):
        truth = both_ways(ours, [few[k] for k in _SCANNED], (few["dy"],))()
    backend = scan_call(weights, sets[0], selective_scan.op.pick)()
    calls = [both_ways(ours, [(s | weights)[k] for k in _SCANNED], (s["dy"],)) for s in sets]
    n_exp = (2 * n + 7) * b * l * i
    return Case(
        "scan fwd+bwd", text(shape), backend, Peer("ours", calls, outputs),
        [_scan_peer(sets, weights, outputs)],
        outputs(truth, torch.arange(len(at), device=device)), n_bytes, n_exp,
    )  # fmt: skip


# what selective_scan is differentiated by
_SCANNED = ("x", "dt", "z", "B", "C", "A", "D", "dt_bias")


def _scan_peer(
    sets: list[dict[str, Tensor]], weights: dict[str, Tensor], outputs: Callable
) -> Peer:
    peer, why = import_peer("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
    if peer is None:
        return Peer("mamba_ssm", missing=why)

    def theirs(*given: Tensor) -> tuple[Tensor]:
        x, dt, z, B, C, A, D, dt_bias = given
        return (peer(x, dt, A, B, C, D, z=z, delta_bias=dt_bias, delta_softplus=True),)

    calls = []
    for s in sets:
        laid = {k: t.mT.contiguous() for k, t in s.items()}
        calls.append(both_ways(theirs, [(laid | weights)[k] for k in _SCANNED], (laid["dy"],)))
    # y, and the gradients of the first five, lie along l
    return Peer("mamba_ssm", calls, lambda o: outputs((*(t.mT for t in o[:6]), *o[6:])))


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
