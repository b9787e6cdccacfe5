"""A pipeline computes what one process does: losses, gradients, norm, evaluation, updates."""

import contextlib
import io
import os
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from hybridzoo.comm import SINGLE
from hybridzoo.config import HybridConfig
from hybridzoo.model import HybridLM
from hybridzoo.parallel import groups
from hybridzoo.parallel.engine import SLOTS, Engine
from hybridzoo.parallel.loss import IGNORE, loss
from hybridzoo.parallel.pipeline import PipelineEngine, _Part
from hybridzoo.parallel.recipe import DataRecipe, ParallelRecipe, Recipe
from hybridzoo.parallel.stages import stages
from tests import gloo
from tests.models import relative, tiny

# DeepSpeed on several processes: minutes, of which the quick suite has ten
pytestmark = pytest.mark.slow

# every kind, a parallel place, a shared layer on several stages; four stages
MIXED = "N M E S | A F G S | [NA] E F A | M G S F"
OPTIONS = {
    "d_model": 16,
    "vocab_size": 61,
    "layers": {
        "N": tiny("mamba1"),
        "M": tiny("mamba2", n_groups=1),
        "G": tiny("mamba2", n_groups=4),
        "A": tiny("attention", n_kv_heads=2),
        "F": tiny("mlp", d_ff=12),
        "E": tiny("moe", d_ff=8),
        "S": {"shared": "base"},
    },
    "shared": {"base": tiny("mlp", d_ff=20)},
    "residual_multiplier": 0.7,
}

# biases of norms, a wide stream between stages, multipliers at both ends of a tied vocabulary
UNUSUAL = (
    ("norm", "layer_norm"),
    ("residual_fp32", True),
    ("embedding_multiplier", 3.0),
    ("logits_multiplier", 0.5),
)


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    # the ranks import DeepSpeed first: half a minute where other tests run beside this one
    monkeypatch.setattr(gloo, "TIMEOUT_S", 180)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layout and what is trained on it."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    zero: int = 1
    sequence_parallel: bool = False
    pattern: str = MIXED
    tied: bool = True
    accumulate: int = 2
    is_packed: bool = False
    precision: str = "fp32"
    dtype: torch.dtype = torch.float32
    clip: float | None = 1.0
    steps: int = 3
    nan_at: int | None = None
    recompute: tuple[tuple[str, str], ...] = ()
    more: tuple[tuple[str, object], ...] = ()

    @property
    def world(self):
        return self.tp * self.pp * self.dp

    def config(self):
        return HybridConfig.from_dict(
            OPTIONS | {"pattern": self.pattern, "tie_embeddings": self.tied, **dict(self.more)}
        )

    def recipe(self):
        return Recipe(
            model="",
            data=DataRecipe(source="", seq_len=12),
            output="",
            steps=self.steps,
            batch_size=2 * self.accumulate * self.dp,
            accumulate=self.accumulate,
            lr=0.01,
            # the first moment is then the clipped gradient
            betas=(0.0, 0.95),
            clip_norm=self.clip,
            precision=self.precision,
            device="cpu",
            parallel=ParallelRecipe(
                tp=self.tp,
                pp=self.pp,
                ep=self.ep,
                zero_stage=self.zero,
                sequence_parallel=self.sequence_parallel,
                balance="auto",
                recompute=dict(self.recompute),
            ),
        )

    def batch(self, step, part, length):
        """Another one for each step and part; each part has another number of labels."""
        generator = torch.Generator().manual_seed(100 * step + part)
        ids = torch.randint(0, 61, (1 if self.is_packed else 2, length + 1), generator=generator)
        batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:].clone()}
        batch["labels"][0, : part % 5] = IGNORE
        if self.is_packed:
            starts = [0, 3 + part % 4, 7, length]
            batch |= {"cu_seqlens": torch.tensor(starts, dtype=torch.int32), "max_seqlen": length}
        return batch

    def parts(self, step, dp_rank):
        # the second step has shorter sequences
        parts = range(dp_rank * self.accumulate, (dp_rank + 1) * self.accumulate)
        return [self.batch(step, part, 8 if step == 1 else 12) for part in parts]

    def held_out(self, dp_rank):
        for part in range(3 * dp_rank, 3 * dp_rank + 3):
            yield self.batch(99, part, 8 + 4 * (part % 2))


@dataclass
class Seen:
    """What a rank saw of a run; tensors by canonical name, in pieces."""

    outcomes: list
    evaluated: tuple
    grads: dict
    moments: dict
    weights: dict
    place: tuple = (0, 0, 0)
    said: str = ""


def train(engine, case, dp_ranks):
    """Run a case's steps on the data of these data-parallel ranks."""
    outcomes, grads = [], None
    for step in range(case.steps):
        parts = [batch for rank in dp_ranks for batch in case.parts(step, rank)]
        with broken(engine) if step == case.nan_at else contextlib.nullcontext():
            outcomes.append(engine.step(parts, 0.01))
        grads = grads or mine(engine, lambda name: engine.read_slot(name, "exp_avg").clone())
    held_out = (batch for rank in dp_ranks for batch in case.held_out(rank))
    evaluated = engine.evaluate(held_out)
    moments = mine(engine, lambda name: engine.read_slot(name, SLOTS[1]).clone())
    weights = mine(engine, lambda name: engine.params[name].detach().clone())
    assert engine.n_updates == sum(o.is_applied for o in outcomes)
    return Seen(outcomes, evaluated, grads, moments, weights)


@contextlib.contextmanager
def broken(engine):
    """The last norm, which only the last stage has, is NaN until the block ends."""
    if "norm.weight" not in engine.params:
        yield
        return
    with torch.no_grad(), engine.weights("norm.weight") as weight:
        kept = weight.clone()
        weight.fill_(torch.nan)
    yield
    with torch.no_grad(), engine.weights("norm.weight") as weight:
        weight.copy_(kept)


def mine(engine, of):
    return {
        name: {piece: of(local) for piece, local in locals_.items()}
        for name, declared, locals_ in engine.model.local_names()
        if declared.trained
    }


def job(_, case):
    """One rank's run."""
    os.environ["LOCAL_RANK"] = "0"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        parallel = groups.init(
            tp=case.tp, pp=case.pp, ep=case.ep, sequence_parallel=case.sequence_parallel
        )
        part = stages(case.config(), case.pp, "auto")[parallel.pp.rank]
        model = HybridLM(case.config(), seed=5, parallel=parallel, stage=part, dtype=case.dtype)
        seen = train(PipelineEngine(model, case.recipe()), case, [parallel.dp.rank])
    seen.place = (parallel.pp.rank, parallel.dp.rank, parallel.tp.rank)
    seen.said = out.getvalue()
    return seen


@cache
def alone(case):
    """The same run in one process, all ranks' parts one after another."""
    model = HybridLM(case.config(), seed=5, dtype=case.dtype)
    return train(Engine(model, case.recipe()), case, range(case.dp))


def reference(case):
    return alone(replace(case, tp=1, pp=1, ep=1, zero=1, sequence_parallel=False, recompute=()))


def reference_job(_, case):
    """The reference with a rank's threads and settings, for those who want its bits."""
    return reference(case)


def whole(case, ranks, what):
    """Canonical name -> full tensor; what several stages or dp ranks hold must be equal."""
    found, table = {}, dict(case.config().params())
    for rank in ranks:
        if rank.place[2]:
            continue
        slices = [r for r in ranks if r.place[:2] == rank.place[:2]]
        for name in getattr(rank, what):
            held = [getattr(r, what)[name] for r in slices]
            full = table[name].cut.join(relative(held[0]), held)
            share = rank.place[1] % case.ep if table[name].experts else 0
            known = found.setdefault(name, {}).setdefault(share, full)
            assert torch.equal(known, full), name
    return {name: torch.cat([s[i] for i in sorted(s)]) for name, s in found.items()}


def check(case, ranks, *, rtol=1e-5):
    """All that ranks saw is what one process sees.

    fp32: sums in another order. The norm is a sum of many squares; a gradient may be a small
    difference of large ones.
    """
    one = reference(case)
    for rank in ranks:
        assert not rank.said
        for got, want in zip(rank.outcomes, one.outcomes, strict=True):
            assert (got.n_targets, got.is_applied) == (want.n_targets, want.is_applied)
            if want.is_applied:
                assert got.nats == pytest.approx(want.nats, rel=rtol)
                assert got.aux == pytest.approx(want.aux, rel=rtol)
                assert got.norm == pytest.approx(want.norm, rel=10 * rtol)
        assert rank.evaluated == pytest.approx(one.evaluated, rel=rtol)
    expected, grads = whole(replace(case, ep=1), [one], "grads"), whole(case, ranks, "grads")
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(
            grad, expected[name], rtol=10 * rtol, atol=rtol / 10, msg=lambda m, n=name: f"{n}: {m}"
        )
    # all copies are equal, after the last update too
    whole(case, ranks, "moments")
    whole(case, ranks, "weights")
    return one


@pytest.mark.slow
def test_two_stages_of_20_steps():
    case = Case(pp=2, accumulate=4, steps=20)
    check(case, gloo.run(2, job, case))


@pytest.mark.parametrize(
    "change",
    [
        {"accumulate": 4},
        {"tied": False, "is_packed": True},
        {"zero": 0, "clip": 0.5},
        {"clip": None, "accumulate": 1, "nan_at": 1},
        {"zero": 0, "nan_at": 1},
        {"recompute": (("M", "full"), ("E", "mixer"), ("A", "full"))},
        # neither stage has experts, nor the second a shared layer
        {"pattern": "S S F | N A"},
    ],
    ids=str,
)
def test_two_stages(change):
    case = Case(pp=2, **change)
    check(case, gloo.run(2, job, case))


def test_parts_in_a_row_are_the_model_in_float64():
    """The stages alone: DeepSpeed reduces no gradients in float64.

    Balance losses of the first stages get their gradients though only the stream goes on.
    """
    case = Case(dtype=torch.float64, is_packed=True)
    model = HybridLM(case.config(), seed=5, dtype=case.dtype)
    batch, recipe = case.batch(0, 1, 12), case.recipe()
    total, metrics = loss(model, batch, 40)
    total.backward()
    aux, copies, x = 0.0, {}, batch["input_ids"]
    for part in stages(case.config(), 4, "pattern"):
        stage = HybridLM(case.config(), seed=5, stage=part, dtype=case.dtype)
        engine = SimpleNamespace(
            model=stage, recipe=recipe, parallel=SINGLE, precision=contextlib.nullcontext
        )
        module = _Part(engine)
        module.start([batch], 40)
        x = module(x)
        aux += module.sums[1].item()
        for name, parameter in stage.named_parameters():
            copies.setdefault(name, []).append(parameter)
    assert aux == pytest.approx((metrics["aux"] * metrics["n_targets"] / 40).item(), rel=1e-12)
    # the engine undoes it: DeepSpeed takes a mean over the step's parts
    (x / recipe.accumulate).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            grad = sum(p.grad for p in copies[name])
            # the copies' sum is another order of adding
            torch.testing.assert_close(grad, parameter.grad, rtol=1e-10, atol=1e-13, msg=name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_stages_give_the_same_bits(precision):
    """Nothing is rounded on the way: weights and moments after three updates.

    One part a step and two uses of what is shared: its gradients are summed stage by stage.
    """
    pattern = MIXED.replace("G S |", "G F |")
    case = Case(pp=2, accumulate=1, precision=precision, clip=None, pattern=pattern)
    ranks, (one,) = gloo.run(2, job, case), gloo.run(1, reference_job, case)
    for what in ("grads", "moments", "weights"):
        expected = whole(case, [one], what)
        for name, tensor in whole(case, ranks, what).items():
            assert torch.equal(tensor, expected[name]), f"{what} {name}"
    for got, want in zip(ranks[0].outcomes, one.outcomes, strict=True):
        assert got.nats == want.nats


def resumed(parallel, case):
    """Outcomes of a third step: of a run, and of one that got its weights and moments."""
    os.environ["LOCAL_RANK"] = "0"
    parallel = groups.init(tp=case.tp, pp=case.pp)
    part = stages(case.config(), case.pp, "auto")[parallel.pp.rank]
    old, new = (
        PipelineEngine(
            HybridLM(case.config(), seed=seed, parallel=parallel, stage=part), case.recipe()
        )
        for seed in (5, 6)
    )
    for step in range(2):
        old.step(case.parts(step, parallel.dp.rank), 0.01)
    for name, parameter in old.params.items():
        with torch.no_grad(), new.weights(name) as weight:
            weight.copy_(parameter)
        slots = {slot: old.read_slot(name, slot).clone() for slot in SLOTS}
        new.write_slots(name, slots, old.n_updates)
    return [engine.step(case.parts(2, parallel.dp.rank), 0.01) for engine in (old, new, old, new)]


@pytest.mark.parametrize("zero", [0, 1])
def test_weights_and_moments_move_to_another_engine(zero):
    for outcomes in gloo.run(2, resumed, Case(pp=2, zero=zero)):
        assert outcomes[0] == outcomes[1]
        assert outcomes[2] == outcomes[3] != outcomes[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"pp": 4, "is_packed": True},
        {"pp": 4, "accumulate": 1, "zero": 0, "tied": False},
        {"pp": 2, "tp": 2},
        {"pp": 2, "tp": 2, "sequence_parallel": True, "accumulate": 4, "steps": 20},
        {"pp": 2, "tp": 2, "zero": 0, "clip": 0.5, "tied": False},
        {"pp": 2, "tp": 2, "sequence_parallel": True, "is_packed": True, "more": UNUSUAL},
        {"pp": 2, "tp": 2, "recompute": (("A", "full"), ("E", "mixer")), "more": UNUSUAL},
        {"pp": 2, "dp": 2, "accumulate": 3},
        {"pp": 2, "dp": 2, "zero": 0, "nan_at": 2},
    ],
    ids=str,
)
def test_four_ranks(change):
    case = Case(**change)
    check(case, gloo.run(4, job, case))


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1])
def test_copies_on_six_ranks(zero):
    """Of three numbers the order counts in which they are added.

    It depends on where an element lies in a stage's buffer, so a small one would show nothing.
    """
    case = Case(pp=2, dp=3, pattern="A F S | A F S", zero=zero, more=(("vocab_size", 8192),))
    check(case, gloo.run(6, job, case))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [MIXED, "A F E | F N M", "E N | E F"])
@pytest.mark.parametrize("zero", [0, 1])
def test_experts_of_a_pipeline(pattern, zero):
    """Also where one stage has none."""
    case = Case(pp=2, dp=2, ep=2, pattern=pattern, zero=zero)
    check(case, gloo.run(4, job, case))
