"""What kernel.py times: inputs, our call, the peers' calls, float64's answer, bytes."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from measure import Call, import_peer
from torch import Tensor

from hybridzoo.kernels.causal_conv1d import causal_conv1d
from hybridzoo.kernels.dispatch import use
from hybridzoo.kernels.rms_norm import rms_norm
from hybridzoo.kernels.selective_scan import selective_scan

HALF = torch.bfloat16
# channels that are compared with float64, spread over all of them
N_CHECKED = 64
# sets of inputs: three, or as many as make three L2 caches, but no more than a model has layers
MIN_SETS, MAX_SETS, ROTATED_BYTES = 3, 48, 180 * 2**20


@dataclass
class Peer:
    """One side: its calls, one a set of inputs, and its outputs named and laid out as ours."""

    name: str
    calls: list[Call] = field(default_factory=list)
    outputs: Callable[[Any], dict[str, Tensor]] = dict
    missing: str = ""


@dataclass
class Case:
    """One op at one shape.

    `truth` is what float64 gives for the first set, where checked; a call that is in place is timed
    inside one CUDA graph of all sets, as decoding runs it.
    """

    op: str
    shape: str
    backend: str
    ours: Peer
    peers: list[Peer]
    truth: dict[str, Tensor]
    n_bytes: int
    n_exp: int = 0
    is_in_place: bool = False


Make = Callable[[tuple[int, ...], torch.device], Case]


def text(shape: tuple[int, ...]) -> str:
    return ",".join(map(str, shape))


def n_sets(n_bytes: int, device: torch.device) -> int:
    if device.type != "cuda":
        return MIN_SETS
    return min(max(MIN_SETS, math.ceil(ROTATED_BYTES / n_bytes)), MAX_SETS)


def picks(n: int, device: torch.device) -> Tensor:
    """Channels to check, the first and the last among them."""
    return torch.linspace(0, n - 1, min(n, N_CHECKED), device=device).round().long()


def normal(*shape: int, device: torch.device, dtype: torch.dtype = HALF) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def scan_weights(i: int, n: int, device: torch.device) -> dict[str, Tensor]:
    """A near -(1..n), steps log-uniform in [1e-3, 0.1], D near 1: as a trained model's."""
    step = torch.exp(torch.empty(i, device=device).uniform_(math.log(1e-3), math.log(0.1)))
    A = -torch.arange(1, n + 1, device=device) * torch.empty(i, n, device=device).uniform_(
        0.8, 1.25
    )
    return {
        "A": A,
        "D": 1 + 0.1 * torch.randn(i, device=device),
        # the inverse of softplus
        "dt_bias": step + torch.log(-torch.expm1(-step)),
    }


def double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() for name, t in tensors.items()}


def scan(shape: tuple[int, ...], device: torch.device) -> Case:
    """selective_scan's forward with z, D, dt_bias and softplus; y and the final state."""
    b, i, l, n = shape
    n_bytes = 2 * (4 * b * l * i + 2 * b * l * n) + 4 * b * i * n
    weights, sets = scan_weights(i, n, device), []
    for _ in range(n_sets(n_bytes, device)):
        wide = {name: normal(b, l, i, device=device) for name in ("x", "dt", "z")}
        wide["dt"] *= 0.5
        sets.append(wide | {name: normal(b, l, n, device=device) for name in ("B", "C")})
    at = picks(i, device)
    few = {k: t[..., at] if k in ("x", "dt", "z") else t for k, t in sets[0].items()}
    few_weights = {k: t[at] for k, t in weights.items()}
    with use(selective_scan="reference"):
        y, state = scan_call(double(few_weights), double(few))()
    checked = lambda o: {"y": o[0][..., at], "state": o[1][:, at]}  # noqa: E731
    ours = Peer("ours", [scan_call(weights, s) for s in sets], checked)
    peer, truth = _scan_peer(weights, sets, at), {"y": y, "state": state}
    backend = scan_call(weights, sets[0], selective_scan.op.pick)()
    n_exp = (n + 3) * b * l * i
    return Case("scan", text(shape), backend, ours, [peer], truth, n_bytes, n_exp)


def scan_call(
    weights: dict[str, Tensor], s: dict[str, Tensor], function: Callable = selective_scan
) -> Call:
    args = (s["x"], s["dt"], weights["A"], s["B"][:, :, None], s["C"][:, :, None])
    options = {"D": weights["D"], "z": s["z"], "dt_bias": weights["dt_bias"], "dt_softplus": True}
    return lambda: function(*args, **options)


def _scan_peer(weights: dict[str, Tensor], sets: list[dict[str, Tensor]], at: Tensor) -> Peer:
    """mamba-ssm's, in (b, i, l), the last state asked for as well."""
    name = "mamba_ssm"
    peer, why = import_peer("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
    if peer is None:
        return Peer(name, missing=why)

    def call(**tensors: Tensor) -> Call:
        t = {k: v.transpose(1, 2).contiguous() for k, v in tensors.items()}
        return lambda: peer(
            t["x"], t["dt"], weights["A"], t["B"], t["C"], weights["D"], z=t["z"],
            delta_bias=weights["dt_bias"], delta_softplus=True, return_last_state=True,
        )  # fmt: skip

    outputs = lambda o: {"y": o[0][:, at].transpose(1, 2), "state": o[1][:, at]}  # noqa: E731
    return Peer(name, [call(**s) for s in sets], outputs)


def conv(shape: tuple[int, ...], device: torch.device) -> Case:
    """causal_conv1d's forward, width 4, silu; the final state too where the peer gives one."""
    b, l, i = shape
    n_bytes = 2 * 2 * b * l * i
    xs = [normal(b, l, i, device=device) for _ in range(n_sets(n_bytes, device))]
    weight, bias = normal(i, 4, device=device) / 2, normal(i, device=device) / 2
    at = picks(i, device)
    few = (xs[0][..., at].double(), weight[at].double(), bias[at].double())
    with use(causal_conv1d="reference"):
        truth, _ = causal_conv1d(*few, activation="silu")
    backend = causal_conv1d.op.pick(
        xs[0], weight, bias, activation="silu", initial_state=None, cu_seqlens=None
    )
    calls = [lambda x=x: causal_conv1d(x, weight, bias, activation="silu") for x in xs]
    return Case(
        "conv", text(shape), backend, Peer("ours", calls, lambda o: {"y": o[0][..., at]}),
        [_conv_peer(xs, weight, bias, at, is_last) for is_last in (False, True)],
        {"y": truth}, n_bytes,
    )  # fmt: skip


def _conv_peer(xs: list[Tensor], weight: Tensor, bias: Tensor, at: Tensor, is_last: bool) -> Peer:
    name = "causal_conv1d channel-last" if is_last else "causal_conv1d (b,d,l)"
    peer, why = import_peer("causal_conv1d", "causal_conv1d_fn")
    if peer is None:
        return Peer(name, missing=why)
    laid = [x.transpose(1, 2) if is_last else x.transpose(1, 2).contiguous() for x in xs]
    calls = [lambda x=x: peer(x, weight, bias, activation="silu") for x in laid]
    return Peer(name, calls, lambda y: {"y": y[:, at].transpose(1, 2)})


def norm(shape: tuple[int, ...], device: torch.device) -> Case:
    """Residual add and RMSNorm: y and the new residual; `shape` ends in the residual's bits."""
    rows, d, bits = shape
    wide = {16: HALF, 32: torch.float32}[bits]
    n_bytes = rows * d * 2 * (2 + bits // 8)
    weight, eps = 1 + 0.1 * normal(d, device=device), 1e-5
    sets = [
        (normal(rows, d, device=device), normal(rows, d, device=device, dtype=wide))
        for _ in range(n_sets(n_bytes, device))
    ]
    x, residual = sets[0]
    some = picks(rows, device)
    with use(rms_norm="reference"):
        y, h = rms_norm(
            x[some].double(), weight.double(), eps=eps, residual=residual[some].double()
        )
    backend = rms_norm.op.pick(x, weight, eps=eps, residual=residual, weight_fp32=False)

    def in_torch(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        h = residual + x
        return F.rms_norm(h, (d,), weight.to(wide), eps).to(HALF), h

    def outputs(found: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"y": found[0][some], "h": found[1][some]}

    peer, why = import_peer("mamba_ssm.ops.triton.layer_norm", "layer_norm_fn")
    options = {"eps": eps, "prenorm": True, "residual_in_fp32": bits == 32, "is_rms_norm": True}
    theirs = [
        lambda x=x, r=r: peer(x, weight, None, residual=r, **options)
        for x, r in (sets if peer else [])
    ]
    mine = [lambda x=x, r=r: rms_norm(x, weight, eps=eps, residual=r) for x, r in sets]
    return Case(
        "norm", text(shape), backend, Peer("ours", mine, outputs),
        [
            Peer("torch", [lambda x=x, r=r: in_torch(x, r) for x, r in sets], outputs),
            Peer("mamba_ssm", theirs, outputs, why),
        ],
        {"y": y, "h": h}, n_bytes,
    )  # fmt: skip
