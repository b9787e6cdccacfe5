"""recompute: the same gradients to the bit from less memory, picks and losses taken once."""

import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hybridzoo.comm import SINGLE
from hybridzoo.layers import Sequence
from hybridzoo.layers.init import seeded
from tests import gloo
from tests.layers.cases import CASES
from tests.models import make_config, make_model, pieces, randint

PACK = {"cu_seqlens": torch.tensor([0, 5, 6, 12], dtype=torch.int32), "max_seqlen": 6}
every_mode = pytest.mark.parametrize("mode", ["mixer", "full"])


def with_mode(model, mode):
    for block in model.blocks:
        block.recompute = mode
    return model


def gradients(model, context=None, **options):
    """Loss and gradients of a plain and a packed forward; dropout drawn alike each time."""
    torch.manual_seed(4)
    loss = 0
    with context or nullcontext():
        for ids, more in ((randint(2, 12), {}), (randint(1, 12, seed=1), PACK)):
            ctx = Sequence.build(12, aux=[], **more)
            logits = model.logits(model.hidden(ids, None, ctx)).float()
            w = torch.randn(logits.shape, generator=seeded(3, str(logits.shape)))
            loss = loss + (logits * w).sum() + sum(ctx.aux)
    loss.backward()
    return loss.detach(), pieces(model, lambda p: p.grad)


def assert_equal_to_the_bit(got, expected):
    assert torch.equal(got[0], expected[0])
    for name, held in expected[1].items():
        for piece, grad in held.items():
            assert grad.any(), name
            assert torch.equal(got[1][name][piece], grad), name


def one_kind(name, **change):
    config = CASES[name].to_dict()
    return make_config(pattern="LL", layers={"L": config}, shared={}, layers_at={}, **change)


@every_mode
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_every_kind_are_equal_to_the_bit(name, mode):
    config = one_kind(name, dropout=0.2)
    plain = gradients(make_model(config, dtype=torch.float32))
    again = gradients(with_mode(make_model(config, dtype=torch.float32), mode))
    assert_equal_to_the_bit(again, plain)


@every_mode
def test_gradients_under_autocast_are_equal_to_the_bit(mode):
    config = make_config()
    found = [
        gradients(
            with_mode(make_model(config, dtype=torch.float32), m),
            torch.autocast("cpu", torch.bfloat16),
        )
        for m in ("none", mode)
    ]
    assert_equal_to_the_bit(*found)


def test_places_of_a_shared_weight_add_their_gradients_wide():
    """Under autocast each place casts for itself; one cast copy would sum the two in bf16."""
    config = make_config(pattern="SS", layers_at={})
    model = make_model(config, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        model(randint(2, 12)).float().square().sum().backward()
    grad = model.shared["base"].out_proj.weight.grad
    assert not torch.equal(grad, grad.bfloat16().float())


def gradients_of_rank(parallel, mode, sequence_parallel):
    parallel = replace(parallel, sequence_parallel=sequence_parallel)
    model = make_model(make_config(dropout=0.2), parallel, torch.float32)
    return gradients(with_mode(model, mode))


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "sequence"])
def test_gradients_on_ranks_are_equal_to_the_bit(sequence_parallel):
    plain = gloo.run(2, gradients_of_rank, "none", sequence_parallel)
    for mode in ("mixer", "full"):
        for got, expected in zip(
            gloo.run(2, gradients_of_rank, mode, sequence_parallel), plain, strict=True
        ):
            assert_equal_to_the_bit(got, expected)


def test_balance_losses_reach_the_caller_once():
    model = with_mode(make_model(one_kind("moe")), "full")
    ctx = Sequence(aux=[])
    hidden = model.hidden(randint(2, 9), None, ctx)
    assert len(ctx.aux) == 2
    hidden.sum().backward()
    assert len(ctx.aux) == 2


class Executed(TorchDispatchMode):
    """Counts the ops that run, beneath what a checkpoint answers from what it kept."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


@every_mode
def test_experts_are_picked_once(mode):
    model = with_mode(make_model(one_kind("moe")), mode)
    with Executed() as forward:
        loss = model(randint(2, 9)).sum()
    with Executed() as backward:
        loss.backward()
    picks = ["aten::topk", "aten::sort.stable"]
    assert all(forward.counts[name] >= 2 for name in picks)
    assert not any(backward.counts[name] for name in picks)
    # while the scores are computed again
    assert backward.counts["aten::sigmoid"]


def test_projections_run_again_in_full_mode_only():
    runs = {}
    for mode in ("none", "mixer", "full"):
        model = with_mode(make_model(one_kind("mamba2")), mode)
        loss = model(randint(2, 9)).sum()
        with Executed() as backward:
            loss.backward()
        runs[mode] = backward.counts["aten::mm"] + backward.counts["aten::addmm"]
    assert runs["mixer"] == runs["none"] < runs["full"]


class Alive(TorchDispatchMode):
    """Remembers every tensor's memory as long as somebody else does."""

    def __init__(self):
        super().__init__()
        self.memory = weakref.WeakValueDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.memory[storage.data_ptr()] = storage
        return out

    def bytes(self):
        return sum(storage.nbytes() for storage in self.memory.values())


@pytest.mark.parametrize("name", ["attention", "mamba1", "mamba2"])
def test_each_mode_keeps_less_than_the_one_before(name):
    kept = {}
    for mode in ("none", "mixer", "full"):
        model = with_mode(make_model(one_kind(name), dtype=torch.float32), mode)
        with Alive() as alive:
            logits = model(randint(2, 64))
        kept[mode] = alive.bytes()
        del logits
    assert kept["full"] < kept["mixer"] < kept["none"]


def test_states_and_no_grad_are_left_alone():
    plain, again = make_model(), with_mode(make_model(), "full")
    ids = randint(2, 9)
    with torch.no_grad(), Executed() as ran:
        logits = again(ids)
    assert ran.counts
    assert torch.equal(logits, plain(ids))
    state = again.init_state(2, 9)
    parts = [again(part, state=state) for part in ids.split([4, 5], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), logits, rtol=1e-9, atol=1e-10)
    assert SINGLE.tp.world == 1
