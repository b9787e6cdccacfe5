"""selective_scan_step: one token of Mamba-1's recurrence, on a pool of states, in place."""

from math import inf

import torch
from torch import Tensor

from hybridzoo.errors import BackendError
from hybridzoo.kernels.dispatch import Op

_selective_scan_step = Op(
    "selective_scan_step",
    {
        "triton": "hybridzoo.kernels.selective_scan_step.triton",
        "reference": "hybridzoo.kernels.selective_scan_step.reference",
    },
)


@_selective_scan_step.contract
def selective_scan_step(
    x: Tensor,
    ssm_state: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, inf),
    slots: Tensor | None = None,
    A_is_log: bool = False,
) -> Tensor:
    """`selective_scan` of one token; the states are updated in place, so it has no gradients.

        h = exp(dt A) h + dt B x          y = C h + D x

    Args:
        x: inputs, (b, i), fp32 / bf16 / fp16 / float64.
        ssm_state: h, (rows, i, n), fp32 or narrower, computed in fp32; rows is b without slots.
            MUTATED: the rows in use become those after this token.
        dt: raw step sizes, (b, i); dt_bias is added, then softplus and clamp, all in fp32.
        A: decays, (i, n), fp32, < 0; or what A_is_log says.
        B: input map, (b, g, n), x.dtype; g divides i, channel c uses group c // (i / g).
        C: output map, like B.
        D: skip weight a channel, (i,), fp32.
        z: gate, like x; y is multiplied by silu(z).
        dt_bias: (i,), fp32.
        dt_softplus: whether dt passes through softplus.
        dt_limit: bounds of the step size, after softplus.
        slots: (b,) integers, each sequence's row of ssm_state, none twice; a negative one leaves
            every state as it is and its y is zero. None: row k for sequence k.
        A_is_log: A is A_log, as models store it, and the decays are -exp(A): no kernels for them
            at every token, and no copy of them that could be out of date.

    Returns:
        y, (b, i), x.dtype.

    Raises:
        BackendError: no backend supports these dtypes, device or sizes; without slots ssm_state has
            other than b rows; or gradients are wanted.
    """
    if slots is None and ssm_state.shape[0] != x.shape[0]:
        raise BackendError(
            f"selective_scan_step: ssm_state has {ssm_state.shape[0]} rows for {x.shape[0]} "
            "sequences; without slots it has one a sequence. Pass slots, or those rows."
        )
    for tensor in (x, ssm_state, dt, A, B, C, D, z, dt_bias):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise BackendError(
                "selective_scan_step: an input requires a gradient; a step in place has none. "
                "Call it under torch.no_grad(), or selective_scan with a length of 1."
            )
    return _selective_scan_step(
        x, ssm_state, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus,
        dt_limit=dt_limit, slots=slots, A_is_log=A_is_log,
    )  # fmt: skip
