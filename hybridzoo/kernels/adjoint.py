"""Gradients of a raw launch: whether a call needs any, and its op again as plain torch.

A launch that has a kernel for them is two custom ops without formulas, joined by a
torch.autograd.Function that `run` applies where `needs_gradient`: torch's own joint of an op and
its formula costs the host three times as much a call. The second op having none, a second
derivative raises.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hybridzoo.kernels.dispatch import no_autocast


def needs_gradient(*inputs: Tensor | None) -> bool:
    """Whether autograd records a call with these inputs."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


def recomputed_gradients(
    function: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor],
) -> list[Tensor]:
    """Gradients of `function(*inputs)`, for the body of a torch.library.custom_op.

    Args:
        function: of tensors or None, to a tensor or a tuple of them, differentiable.
        inputs: its arguments; every tensor of them gets a gradient.
        cotangents: one an output.

    Returns:
        A contiguous tensor an input, none of which shares memory with another or with a cotangent;
        an empty one, shape (0,), where the input is None.
    """
    # a custom op's body runs below autograd, grad mode or not; leaving inference mode lifts that
    with torch.inference_mode(False), no_autocast(cotangents[0].device):
        leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        present = [leaf for leaf in leaves if leaf is not None]
        grads = torch.autograd.grad(outputs, present, list(cotangents), materialize_grads=True)
    taken = {t.untyped_storage().data_ptr() for t in cotangents}
    found, rest = [], iter(grads)
    for leaf in leaves:
        grad = cotangents[0].new_empty(0) if leaf is None else next(rest)
        if grad.numel() and grad.untyped_storage().data_ptr() in taken:
            grad = grad.clone(memory_format=torch.contiguous_format)
        grad = grad.contiguous()
        taken.add(grad.untyped_storage().data_ptr())
        found.append(grad)
    return found
