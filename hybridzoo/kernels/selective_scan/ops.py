"""The two custom ops of a compiled scan, whose backend brings the launches.

Neither has an autograd formula: a backend joins them by a torch.autograd.Function, and a second
derivative raises.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hybridzoo.kernels.selective_scan.fwd import Arguments

Outputs = tuple[Tensor, Tensor, Tensor]


def define_forward(
    backend: str,
    launch: Callable[[Arguments[Tensor], bool], Outputs],
    outputs: Callable[[Tensor, Tensor, Tensor | None, bool], Outputs],
) -> Any:
    """The op hybridzoo::selective_scan_<backend>: y, final_state and, if asked for, checkpoints.

    Args:
        backend: its name.
        launch: of the arguments, and whether checkpoints are asked for.
        outputs: what it fills, of x, A, cu_seqlens and the same.
    """

    def scan(
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        dt_softplus: bool,
        dt_min: float,
        dt_max: float,
        has_checkpoints: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        given = Arguments(
            x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, dt_min, dt_max
        )
        return launch(given, has_checkpoints)

    def fake(*given: Any) -> Outputs:
        *known, has_checkpoints = given
        arguments: Arguments[Any] = Arguments(*known)
        return outputs(arguments.x, arguments.A, arguments.cu_seqlens, has_checkpoints)

    op = torch.library.custom_op(f"hybridzoo::selective_scan_{backend}", scan, mutates_args=())
    op.register_fake(fake)
    return op


def define_backward(
    backend: str,
    launch: Callable[[Arguments[Tensor], Tensor, Tensor | None, Tensor], list[Tensor]],
) -> Any:
    """The op hybridzoo::selective_scan_<backend>_backward: gradients of the scan's first nine.

    Of dy, dfinal_state (None is zero), what the scan took, and its checkpoints. An absent tensor's
    gradient is empty, shape (0,).
    """

    def scan_backward(
        dy: Tensor,
        dfinal_state: Tensor | None,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        checkpoints: Tensor,
        dt_softplus: bool,
        dt_min: float,
        dt_max: float,
    ) -> list[Tensor]:
        given = Arguments(
            x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, dt_min, dt_max
        )
        return launch(given, dy, dfinal_state, checkpoints)

    def fake(dy: Tensor, dfinal_state: Tensor | None, *given: Any) -> list[Tensor]:
        return [dy.new_empty(0) if t is None else t.new_empty(t.shape) for t in given[:9]]

    name = f"hybridzoo::selective_scan_{backend}_backward"
    op = torch.library.custom_op(name, scan_backward, mutates_args=())
    op.register_fake(fake)
    return op
