"""What scripts/bench/train.py decides by: kernels' names, and gradients against float64's."""

from argparse import Namespace

import pytest
import torch

from tests.test_bench import BENCH

NAMES = {
    "projections": [
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x64>",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64",
    ],
    "scan": [
        "selective_scan_fwd",
        "selective_scan_ends",
        "selective_scan_bwd",
        "selective_scan_carries",
        "_scan_kernel",
        "_scan_backward_kernel",
        "void selective_scan_bwd_kernel<Selective_Scan_bwd_kernel_traits<128, 16, true, true>>",
    ],
    "conv": [
        "_conv_kernel",
        "_conv_edges_kernel",
        "_conv_backward_kernel",
        "void causal_conv1d_bwd_kernel<Causal_conv1d_bwd_kernel_traits<128, 4, true, bfloat16>>",
    ],
    "norms": ["_norm_kernel", "_layer_norm_fwd_1pass_kernel", "_layer_norm_bwd_kernel"],
    "rest": [
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>",
        "void at_cuda_detail::cub::DeviceScanByKeyKernel<at_cuda_detail::cub::DeviceScanPolicy>",
        "void at::native::convert_something",
        "Memcpy DtoD (Device -> Device)",
        "a_kernel_of_tomorrow",
    ],
}


def test_kernels_fall_into_parts_by_their_names(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    from breakdown import part_of

    for part, names in NAMES.items():
        for name in names:
            assert part_of("forward", name) == part, name
            assert part_of("backward", name) == part, name
            assert part_of("head backward", name) == "head + loss"
            assert part_of("optimizer", name) == "optimizer"


def test_a_wrong_gradient_is_found(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import checked

    honest, calls = checked._gradients, []

    def third_one_lies(*given):
        found = honest(*given)
        calls.append(found)
        # float64's, plain torch's, then those of the chosen kernels
        if len(calls) == 3:
            found["blocks.1.layer.D"] *= -1
        return found

    monkeypatch.setattr(checked, "_gradients", third_one_lies)
    found = checked.check(Namespace(device=torch.device("cpu"), tiny=True))
    assert not found["is_right"]
    # one of four layers has an error of 2
    assert found["errors"]["blocks.layer.D"]["ours"] == pytest.approx(1, rel=0.02)
    assert found["errors"]["blocks.layer.A_log"]["ours"] < 0.05
