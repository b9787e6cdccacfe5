"""Decay groups, the schedule and the average."""

import dataclasses
import math

import pytest
import torch

from hybridzoo.parallel import optim
from tests.train import runs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return runs.recipe(tmp_path_factory.mktemp("recipe"))


@pytest.mark.parametrize("tied", [True, False])
def test_groups_hold_every_trained_parameter_once(tied):
    model = runs.model(tie_embeddings=tied)
    decayed, exempt = optim.decay_groups(model)
    grouped = [id(p) for group in (decayed, exempt) for p in group.values()]
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trained)


@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_only_matrices_decay(norm):
    """What Mamba and Jamba exempt: norms, biases, and the scan's A_log, D and dt_bias."""
    decayed, exempt = optim.decay_groups(runs.model(norm=norm))
    assert ("norm.bias" in exempt) == (norm == "layer_norm")
    spared = ("norm.weight", "bias", "A_log", "D")
    assert all(name.endswith(spared) for name in exempt)
    assert not any(name.endswith(spared) for name in decayed)
    assert "embed.weight" in decayed
    # mamba1's A_log is a matrix: a rule by number of dimensions would decay it
    assert exempt["blocks.0.layer.A_log"].dim() == 2
    assert decayed["blocks.0.layer.conv_weight"].dim() == 2


def test_an_untrained_table_is_in_no_group():
    layers = {"E": {"kind": "moe", "d_ff": 8, "n_experts": 4, "top_k": 1, "correction_bias": True}}
    model = runs.model(pattern="E", layers=layers)
    names = {name for group in optim.decay_groups(model) for name in group}
    assert names == {"embed.weight", "norm.weight", "blocks.0.norm.weight"} | {
        f"blocks.0.layer.{p}" for p in ("expert_up_weight", "expert_down_weight", "router_weight")
    }


def test_the_optimizer_decays_only_the_decayed(base):
    """With zero gradients AdamW shrinks decayed weights by lr * decay and leaves the others."""
    model = runs.model()
    optimizer = optim.build_optimizer(model, dataclasses.replace(base, lr=0.5, weight_decay=0.25))
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    decayed, exempt = optim.decay_groups(model)
    for name, p in decayed.items():
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.5 * 0.25))
    for name, p in exempt.items():
        assert torch.equal(p, before[name])


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        # 10 steps, 2 of them warm-up; from 1.0 down to 0.1
        ("constant", [0.5, 1.0, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("wsd", [0.5, 1.0, 1, 1, 1, 1, 1, 0.7, 0.4, 0.1]),
        (
            "cosine",
            [0.5, 1.0] + [0.1 + 0.45 * (1 + math.cos(math.pi * i / 7)) for i in range(8)],
        ),
    ],
)
def test_schedule(base, schedule, rates):
    changes = {"lr": 2.0, "steps": 10, "warmup_steps": 2, "decay_ratio": 0.4, "min_lr_ratio": 0.1}
    recipe = dataclasses.replace(base, schedule=schedule, **changes)
    got = [optim.lr_at(recipe, step) for step in range(10)]
    assert got == pytest.approx([2 * r for r in rates])


def test_a_schedule_of_one_step_is_defined(base):
    recipe = dataclasses.replace(base, steps=1, warmup_steps=0)
    assert optim.lr_at(recipe, 0) == recipe.lr


def test_average_is_the_recurrence_and_leaves_the_weights():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    average = optim.Average({"w": weight}, 0.3)
    expected = weight.detach().clone()
    for n in range(1, 6):
        with torch.no_grad():
            weight += n
        average.update(n)
        decay = min(0.3, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weight.detach()
    torch.testing.assert_close(average.tensors["w"], expected)
    with pytest.raises(KeyError), average.applied():
        torch.testing.assert_close(weight.detach(), expected)
        raise KeyError
    assert weight.tolist() == [16.0, 17.0]
