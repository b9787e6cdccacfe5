"""grouped_mm: every backend against one product a row."""

import pytest
import torch

from hybridzoo.kernels.grouped_mm import grouped_mm
from tests.kernels.compare import (
    Call,
    assert_same,
    check_backend,
    pack,
    randn,
    run_fwd_bwd,
)

SIZES = [[5, 0, 37, 1], [0, 0, 16, 0], [3], [0, 0]]


def mm_inputs(sizes, dtype, device="cpu"):
    return Call(
        {
            "x": randn(sum(sizes), 24, seed=0, dtype=dtype, device=device),
            "weight": randn(len(sizes), 40, 24, seed=1, dtype=dtype, device=device),
            "offsets": pack(sizes, device)[1:],
        }
    )


def naive(x, weight, offsets):
    owner = [sum(end <= t for end in offsets.tolist()) for t in range(x.shape[0])]
    return torch.einsum("tnk,tk->tn", weight[owner], x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("backend", grouped_mm.op.backends)
def test_backend_is_one_product_a_row(backend, sizes, dtype, device):
    call = mm_inputs(sizes, dtype, device)
    check_backend(grouped_mm, naive, backend, call, dtype)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_reference_is_exact_in_float64(sizes):
    call = mm_inputs(sizes, torch.float64)
    assert_same(run_fwd_bwd(grouped_mm, call), run_fwd_bwd(naive, call))


@pytest.mark.parametrize("sizes", [[5, 0, 3], [0, 0]], ids=str)
def test_empty_groups_get_zero_gradients(sizes, device):
    call = mm_inputs(sizes, torch.bfloat16, device).to(None)
    # a sum's gradient is one number with strides of 0, which torch's own backward refuses
    grouped_mm(**call.arguments).sum().backward()
    grad = call.arguments["weight"].grad
    assert [bool(g.abs().sum() > 0) for g in grad] == [size > 0 for size in sizes]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_compiled_graphs_trace_through_the_torch_backend():
    call = mm_inputs([5, 0, 37, 1], torch.bfloat16, "cuda")
    assert grouped_mm.op.pick(**call.arguments) == "torch"
    compiled = torch.compile(grouped_mm, fullgraph=True, backend="eager")
    assert torch.equal(compiled(**call.arguments), grouped_mm(**call.arguments))
