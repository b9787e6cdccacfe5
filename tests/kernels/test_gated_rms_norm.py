"""gated_rms_norm: every backend against its formula, in both orders and any grouping."""

import pytest
import torch
import torch.nn.functional as F

from hybridzoo.errors import BackendError
from hybridzoo.kernels.gated_rms_norm import gated_rms_norm
from tests.kernels.compare import (
    Call,
    assert_same,
    check_backend,
    randn,
    run_fwd_bwd,
)

EPS = 0.1  # large enough to show in every value


def norm_inputs(dtype, device="cpu", **options):
    return Call(
        {
            "x": randn(2, 5, 36, seed=0, dtype=dtype, device=device),
            "z": randn(2, 5, 36, seed=1, dtype=dtype, device=device),
            "weight": randn(36, seed=2, dtype=dtype, device=device),
            "eps": EPS,
            **options,
        }
    )


def naive(x, z, weight, *, eps, group_size=None, norm_before_gate=False):
    x = x if norm_before_gate else x * F.silu(z)
    group_size = group_size or x.shape[-1]
    parts = []
    for part in x.split(group_size, -1):
        parts.append(part / (part.pow(2).sum(-1, keepdim=True) / group_size + eps).sqrt())
    y = torch.cat(parts, -1) * weight
    return y * F.silu(z) if norm_before_gate else y


@pytest.mark.parametrize("norm_before_gate", [False, True], ids=["gate-norm", "norm-gate"])
@pytest.mark.parametrize("group_size", [None, 36, 12, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", gated_rms_norm.op.backends)
def test_backend_is_the_formula(backend, dtype, group_size, norm_before_gate, device):
    call = norm_inputs(dtype, device, group_size=group_size, norm_before_gate=norm_before_gate)
    check_backend(gated_rms_norm, naive, backend, call, dtype)


@pytest.mark.parametrize("norm_before_gate", [False, True], ids=["gate-norm", "norm-gate"])
def test_reference_is_exact_in_float64(norm_before_gate):
    call = norm_inputs(torch.float64, group_size=9, norm_before_gate=norm_before_gate)
    assert_same(run_fwd_bwd(gated_rms_norm, call), run_fwd_bwd(naive, call))


@pytest.mark.parametrize("norm_before_gate", [False, True], ids=["gate-norm", "norm-gate"])
def test_bf16_is_rounded_once(norm_before_gate):
    """As Mamba-2's own kernel does: neither before the weight nor before the gate."""
    call = norm_inputs(torch.bfloat16, group_size=9, norm_before_gate=norm_before_gate).arguments
    wide = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    assert torch.equal(gated_rms_norm(**call), gated_rms_norm(**wide).bfloat16())


def test_groups_must_divide_the_channels():
    with pytest.raises(BackendError, match=r"group_size \(5\) does not divide 36 channels"):
        gated_rms_norm(**norm_inputs(torch.float32, group_size=5).arguments)
