"""The one-token ops that kernel.py times; see cases.py."""

from collections.abc import Callable

import torch
from cases import Case, Peer, double, n_sets, normal, scan_weights, text
from measure import Call, import_peer
from torch import Tensor

from hybridzoo.kernels.causal_conv1d_step import causal_conv1d_step
from hybridzoo.kernels.dispatch import use
from hybridzoo.kernels.selective_scan_step import selective_scan_step


def step(shape: tuple[int, ...], device: torch.device) -> Case:
    """selective_scan_step: one token against fp32 states, a set a layer, all in one graph."""
    b, i, n = shape
    # the state, read and written; x, dt, z and y; B and C; A
    n_bytes = 2 * b * i * n * 4 + 4 * b * i * 2 + 2 * b * n * 2 + i * n * 4
    weights, sets = scan_weights(i, n, device), []
    for _ in range(n_sets(n_bytes, device)):
        wide = {name: normal(b, i, device=device) for name in ("x", "dt", "z")}
        wide |= {name: normal(b, 1, n, device=device) for name in ("B", "C")}
        sets.append(wide | {"state": normal(b, i, n, device=device, dtype=torch.float32)})
    exact = double(sets[0])
    with use(selective_scan_step="reference"):
        truth = {"y": _step(double(weights), exact)(), "state": exact["state"]}
    ours = Peer(
        "ours", [_step(weights, s) for s in sets], lambda y: {"y": y, "state": sets[0]["state"]}
    )
    backend = _step(weights, sets[0], selective_scan_step.op.pick)()
    return Case(
        "step", text(shape), backend, ours, [_step_peer(weights, sets)], truth, n_bytes,
        n_exp=(n + 3) * b * i, is_in_place=True,
    )  # fmt: skip


def _step(
    weights: dict[str, Tensor], s: dict[str, Tensor], function: Callable = selective_scan_step
) -> Call:
    args = (s["x"], s["state"], s["dt"], weights["A"], s["B"], s["C"])
    options = {"D": weights["D"], "z": s["z"], "dt_bias": weights["dt_bias"], "dt_softplus": True}
    return lambda: function(*args, **options)


def _step_peer(weights: dict[str, Tensor], sets: list[dict[str, Tensor]]) -> Peer:
    path = "mamba_ssm.ops.triton.selective_state_update"
    peer, why = import_peer(path, "selective_state_update")
    if peer is None:
        return Peer("mamba_ssm", missing=why)

    def call(state: Tensor, s: dict[str, Tensor]) -> Call:
        return lambda: peer(
            state, s["x"], s["dt"], weights["A"], s["B"][:, 0], s["C"][:, 0], weights["D"],
            z=s["z"], dt_bias=weights["dt_bias"], dt_softplus=True,
        )  # fmt: skip

    states = [s["state"].clone() for s in sets]
    calls = [call(state, s) for state, s in zip(states, sets, strict=True)]
    return Peer("mamba_ssm", calls, lambda y: {"y": y, "state": states[0]})


def conv_step(shape: tuple[int, ...], device: torch.device) -> Case:
    """causal_conv1d_step: one token against the three before it, bf16, all sets in one graph."""
    b, i = shape
    # three tokens' state, read and written; x and y; weight and bias
    n_bytes = 2 * b * i * 6 + 2 * b * i * 2 + i * 10
    weight, bias = normal(i, 4, device=device) / 2, normal(i, device=device) / 2
    sets = [
        (normal(b, i, device=device), normal(b, 3, i, device=device))
        for _ in range(n_sets(n_bytes, device))
    ]
    copies = [(x, state.clone()) for x, state in sets]
    exact = tuple(t.double() for t in sets[0])
    with use(causal_conv1d_step="reference"):
        y = causal_conv1d_step(*exact, weight.double(), bias.double(), activation="silu")
    calls = [lambda s=s: causal_conv1d_step(*s, weight, bias, activation="silu") for s in sets]
    backend = causal_conv1d_step.op.pick(*sets[0], weight, bias, activation="silu")
    peer, why = import_peer("causal_conv1d", "causal_conv1d_update")
    states = [state.transpose(1, 2).contiguous() for _, state in copies]
    theirs = [
        lambda x=x, state=state: peer(x, state, weight, bias, activation="silu")
        for (x, _), state in (zip(copies, states, strict=True) if peer else ())
    ]
    their_outputs = lambda y: {"y": y, "state": states[0].transpose(1, 2)}  # noqa: E731
    return Case(
        "conv_step", text(shape), backend,
        Peer("ours", calls, lambda y: {"y": y, "state": sets[0][1]}),
        [Peer("causal_conv1d", theirs, their_outputs, why)],
        {"y": y, "state": exact[1]}, n_bytes, is_in_place=True,
    )  # fmt: skip
