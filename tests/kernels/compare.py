"""How a backend is judged: twice the error of plain arithmetic in the same dtype, and a floor."""

import inspect
from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hybridzoo.kernels.dispatch import use

MATMULS = {torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.baddbmm}


@dataclass(frozen=True)
class Call:
    """Arguments by name; tensors and options alike."""

    arguments: dict

    def to(self, dtype):
        """A copy whose floating tensors are `dtype`, as leaves of a graph."""
        return Call({name: _leaf(value, dtype) for name, value in self.arguments.items()})

    def leaves(self):
        return {n: t for n, t in self.arguments.items() if is_floating(t)}

    def having(self, **changed):
        return Call({**self.arguments, **changed})


class RoundOperands(TorchDispatchMode):
    """Round what enters a matrix product to `dtype` and keep its fp32 sum: what tensor cores do."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in MATMULS:
            args = [a.to(self.dtype).to(a.dtype) if is_floating(a) else a for a in args]
        return func(*args, **(kwargs or {}))


def is_floating(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def randn(*shape, seed, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def pack(lengths, device="cpu"):
    """cu_seqlens of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def skip_unless_supported(function, backend, call):
    """Skip with the backend's own reason."""
    bound = inspect.signature(function).bind(**call.arguments)
    reason = function.op.load(backend).why_not(*bound.args, **bound.kwargs)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def run_fwd_bwd(function, call, backend=None):
    """Outputs and the gradients of every floating argument, in float64 on the CPU."""
    call = call.to(None)
    if backend is None:
        outputs = function(**call.arguments)
    else:
        with use(**{function.op.name: backend}):
            outputs = function(**call.arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # the same cotangents whatever the dtype, so that gradients can be compared
    cotangents = [randn(*o.shape, seed=99 + k).to(o) for k, o in enumerate(outputs)]
    leaves = call.leaves()
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
    found = {f"out{k}": output for k, output in enumerate(outputs)}
    for name, leaf, grad in zip(leaves, leaves.values(), grads, strict=True):
        found[f"d{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return {name: t.detach().cpu().double() for name, t in found.items()}


def check_backend(function, naive, backend, call, dtype):
    """Judge one backend of an op against its oracle in float64, or skip with its reason.

    The baseline is the reference with rounded operands, which a float64 test holds to the oracle;
    the reference itself has the oracle for a baseline, or it would be its own judge.
    """
    skip_unless_supported(function, backend, call)
    truth = run_fwd_bwd(naive, call.to(torch.float64))
    with RoundOperands(dtype):
        wide = call.to(torch.float32)
        if backend == "reference":
            same_dtype = run_fwd_bwd(naive, wide)
        else:
            same_dtype = run_fwd_bwd(function, wide, "reference")
    same_dtype = {name: t.to(dtype).double() for name, t in same_dtype.items()}
    assert_within(run_fwd_bwd(function, call, backend), same_dtype, truth, dtype)


def assert_within(got, same_dtype, truth, dtype, factor=2.0):
    """|got - truth| <= factor |same_dtype - truth| + floor, each the largest of its tensor.

    The floor is one unit of the dtype at the tensor's largest value, the rounding of the result,
    where the baseline is exact by luck; and 8 units of fp32 at that value or at 1, the size of the
    inputs, for sums that go in another order or cancel to zero.
    """
    assert got.keys() == truth.keys() == same_dtype.keys()
    for name, want in truth.items():
        assert got[name].shape == want.shape, name
        if want.numel() == 0:
            continue
        error = (got[name] - want).abs().max().item()
        allowed = factor * (same_dtype[name] - want).abs().max().item()
        largest = want.abs().max().item()
        allowed += torch.finfo(dtype).eps * largest
        allowed += 8 * torch.finfo(torch.float32).eps * max(largest, 1.0)
        # not error > allowed, so that a NaN fails
        assert error <= allowed, f"{name}: off by {error:.3g}, {allowed:.3g} allowed"


def assert_same(got, want, tolerance=1e-11):
    """Equal to float64 rounding: sums of some hundred terms of size one, in another order."""
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=tolerance, atol=tolerance, msg=name)


def _leaf(value, dtype):
    if not is_floating(value):
        return value
    return value.detach().to(dtype or value.dtype, copy=True).requires_grad_()
