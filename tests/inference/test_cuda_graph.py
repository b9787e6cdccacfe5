"""The captured step: same tokens as the eager one; elsewhere it says why not."""

import pytest
import torch

from hybridzoo import HybridConfig, HybridLM
from hybridzoo.inference import generate as module
from hybridzoo.inference.cuda_graph import N_WARM, CapturedStep, why_not

LAYERS = {
    "M": {"kind": "mamba1", "d_state": 8},
    "N": {"kind": "mamba2", "d_state": 8, "head_dim": 16},
    "A": {"kind": "attention", "n_heads": 4, "n_kv_heads": 2, "rope_fraction": 1.0},
    "F": {"kind": "mlp", "d_ff": 64},
    "E": {"kind": "moe", "d_ff": 64, "n_experts": 4, "top_k": 2},
}


def small_model(pattern, **where):
    config = HybridConfig(
        d_model=64, vocab_size=80, pattern=pattern, layers=LAYERS, tie_embeddings=False
    )
    return HybridLM(config, **where)


def test_on_the_cpu_the_step_stays_eager_and_the_reason_names_the_device():
    assert why_not(small_model("MFAF")) == "graphs need CUDA, the model is on cpu"


@pytest.mark.gpu
def test_moe_whose_backend_reads_on_the_host_stays_eager():
    assert "on the host" in why_not(small_model("ME", device="cuda"))
    assert why_not(small_model("ME", device="cuda", dtype=torch.bfloat16)) is None


@pytest.mark.gpu
@pytest.mark.parametrize(
    "pattern, dtype", [("MF NF AF", torch.float32), ("ME AE", torch.bfloat16)], ids=["fp32", "bf16"]
)
def test_captured_tokens_are_the_eager_ones(pattern, dtype, monkeypatch):
    """Rows of several lengths in one captured step; 60 steps, of which all but 3 are replays."""
    model = small_model(pattern, device="cuda", dtype=dtype)
    ids = torch.randint(80, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1, :4] = False
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(1) or replay(graph)
    )
    options = {"attention_mask": mask, "max_new_tokens": 60, "seed": 1, "stop": [[7, 7, 7]]}
    captured = module.generate(model, ids, **options)
    # one token needs no step: the last is not fed back
    assert len(replays) == captured.shape[1] - 9 - 1 - N_WARM
    monkeypatch.setattr(module, "MIN_CAPTURED", 10**9)
    eager = module.generate(model, ids, **options)
    assert captured.tolist() == eager.tolist()


@pytest.mark.gpu
def test_every_call_is_one_step_the_warm_ones_too():
    total = torch.zeros(2, 1, dtype=torch.int64, device="cuda")

    def step(ids):
        total.add_(ids)
        return total.float()

    captured = CapturedStep(step, 2, total.device)
    sums = [captured(torch.full((2, 1), i, device="cuda")).tolist() for i in range(1, 7)]
    assert sums == [[[float(i * (i + 1) // 2)]] * 2 for i in range(1, 7)]
