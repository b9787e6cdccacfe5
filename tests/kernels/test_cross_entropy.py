"""cross_entropy: every backend against torch's own loss and the formula of the z-loss."""

import math

import pytest
import torch
import torch.nn.functional as F

from hybridzoo.kernels.cross_entropy import cross_entropy
from tests.kernels.compare import (
    Call,
    assert_same,
    check_backend,
    randn,
    run_fwd_bwd,
)


def loss_inputs(dtype, device="cpu", z_loss=0.1):
    targets = torch.randint(0, 37, (2, 11), generator=torch.Generator().manual_seed(3))
    targets[0, :4] = -100
    logits = 4 * randn(2, 11, 37, seed=0, dtype=dtype, device=device)
    return Call({"logits": logits, "targets": targets.to(device), "z_loss": z_loss})


def naive(logits, targets, z_loss):
    is_valid = targets != -100
    lse = logits.exp().sum(-1).log()[is_valid]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten()) + z_loss * (lse**2).mean()


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", cross_entropy.op.backends)
def test_backend_is_the_formula(backend, dtype, z_loss, device):
    call = loss_inputs(dtype, device, z_loss)
    check_backend(cross_entropy, naive, backend, call, dtype)


def test_reference_is_exact_in_float64():
    call = loss_inputs(torch.float64)
    assert_same(run_fwd_bwd(cross_entropy, call), run_fwd_bwd(naive, call))


def test_half_logits_give_a_wide_loss():
    call = loss_inputs(torch.bfloat16)
    assert cross_entropy(**call.arguments).dtype == torch.float32


def test_no_target_is_zero_loss_and_zero_gradient():
    call = loss_inputs(torch.float32).to(torch.float32)
    targets = torch.full((2, 11), -100)
    loss = cross_entropy(call.arguments["logits"], targets, z_loss=0.1)
    loss.backward()
    assert loss.item() == 0.0
    assert not call.arguments["logits"].grad.any()


def test_ignored_index_may_be_a_class():
    logits, targets = torch.zeros(3, 5), torch.tensor([0, 1, 0])
    logits[0] = torch.tensor([9.0, 1.0, 1.0, 1.0, 1.0])
    assert cross_entropy(logits, targets, ignore_index=0).item() == pytest.approx(math.log(5))


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[1e4, 0.0], [0.0, 1e4]])
    assert cross_entropy(logits, torch.tensor([0, 0])).item() == 5e3
