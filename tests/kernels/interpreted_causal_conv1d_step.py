"""causal_conv1d_step's Triton backend in the interpreter."""

import itertools
from functools import partial

import torch

from hybridzoo.kernels.causal_conv1d import triton as whole
from hybridzoo.kernels.causal_conv1d_step import causal_conv1d_step, triton
from tests.kernels.compare import Call, randn
from tests.kernels.interpreted import allow_cpu, check_graphs
from tests.kernels.test_causal_conv1d import conv_inputs
from tests.kernels.test_causal_conv1d_step import (
    SHAPES,
    check_negative_slots,
    check_steps,
    check_views,
    walk,
)

allow_cpu(triton)


def check_bits():
    """A decoded sequence is the prefilled one, to the bit: both sum in one order."""
    call = conv_inputs((2, 9, 6, 4), torch.bfloat16)
    assert all(map(torch.equal, walk(triton.run, call), whole.run(**call.arguments)))


def check_op():
    x, state, weight = randn(3, 6, seed=0), randn(4, 3, 6, seed=1), randn(6, 4, seed=2)
    op = torch.ops.hybridzoo.causal_conv1d_step_triton
    torch.library.opcheck(op, (x, state, weight, randn(6, seed=3), torch.tensor([2, -1, 0]), True))
    torch.library.opcheck(op, (x, state[:3], weight, None, None, False))


def check_refusals():
    """What it leaves to the reference."""
    x, state = randn(3, 6, seed=0), randn(3, 3, 6, seed=1)
    pick = causal_conv1d_step.op.pick
    assert pick(x, state, randn(6, 4, seed=2)) == "triton"
    assert pick(x, state, randn(6, 5, seed=2)) == "reference"
    assert pick(x, state.double(), randn(6, 4, seed=2)) == "reference"


def cases():
    # every width that it takes
    shapes = [shape for shape in SHAPES if shape[3] <= 4]
    for given in itertools.product(shapes, [torch.float32, torch.bfloat16], ["cpu"], [False, True]):
        yield str(given), partial(check_steps, triton.run, *given)
    for index in (torch.int32, torch.int64):
        yield f"negative slots, {index}", partial(check_negative_slots, triton.run, index)
    yield "views", partial(check_views, triton.run)
    yield "bits", check_bits
    yield "opcheck", check_op
    yield "refusals", check_refusals
    names, tensors = ("x", "conv_state", "weight"), ((3, 6), (4, 3, 6), (6, 4))
    call = Call({name: randn(*shape, seed=0) for name, shape in zip(names, tensors, strict=True)})
    call = call.having(slots=torch.tensor([2, -1, 0]), activation="silu")
    yield "graphs", partial(check_graphs, causal_conv1d_step, call)
