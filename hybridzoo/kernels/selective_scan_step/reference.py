"""selective_scan_step as the scan of a sequence of length one."""

from math import inf

import torch
from torch import Tensor

from hybridzoo.kernels.selective_scan import reference
from hybridzoo.kernels.slots import read_rows, write_rows_


def available(device: torch.device) -> None:
    """Everywhere."""


def why_not(*_: object, **__: object) -> None:
    """Never refuses."""


def run(
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
    """See `hybridzoo.kernels.selective_scan_step.selective_scan_step`."""
    if A_is_log:
        A = -A.to(torch.promote_types(A.dtype, torch.float32)).exp()
    y, state = reference.run(
        x[:, None], dt[:, None], A, B[:, None], C[:, None], D=D,
        z=None if z is None else z[:, None], dt_bias=dt_bias, dt_softplus=dt_softplus,
        dt_limit=dt_limit, initial_state=read_rows(ssm_state, slots),
    )  # fmt: skip
    write_rows_(ssm_state, state, slots)
    y = y[:, 0]
    return y if slots is None else y.masked_fill(slots[:, None] < 0, 0.0)
