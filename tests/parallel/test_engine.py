"""The engine of one process: its step, what it remembers, and what its blocks compute again."""

import math
from dataclasses import replace

import pytest
import torch

from hybridzoo.errors import ConfigError
from hybridzoo.parallel import engine as module
from hybridzoo.parallel.engine import SLOTS, Engine, initialize, recompute_at
from hybridzoo.parallel.recipe import ParallelRecipe
from tests.models import make_model
from tests.parallel import jobs


def made(**change):
    return Engine(make_model(jobs.CONFIG, dtype=torch.float32), jobs.recipe(**change))


def test_without_ranks_a_model_trains_in_plain_torch():
    model = make_model(jobs.CONFIG, dtype=torch.float32)
    assert type(initialize(model, jobs.recipe())) is Engine


@pytest.mark.parametrize("what", ["nats", "total"])
def test_an_update_that_is_not_finite_is_left_out(what, monkeypatch):
    engine, known = made(), module.loss
    engine.step(jobs.parts(0), 1e-3)
    before = jobs.state_of(engine)

    def spoiled(*args):
        total, metrics = known(*args)
        if what == "total":
            return total * torch.nan, metrics
        return total, metrics | {"nats": metrics["nats"] + torch.inf}

    with monkeypatch.context() as patched:
        patched.setattr(module, "loss", spoiled)
        outcome = engine.step(jobs.parts(1), 1e-3)
    assert not outcome.is_applied
    assert math.isfinite(outcome.norm) == (what == "nats")
    assert engine.n_updates == 1
    after = jobs.state_of(engine)
    for kind, names in before.items():
        for name, pieces in names.items():
            assert torch.equal(after[kind][name][name_of(pieces)], pieces[name_of(pieces)])
    assert all(p.grad is None for p in engine.params.values())


def test_all_parts_are_moved_before_the_first_forward(monkeypatch):
    """A copy from the host waits for what the GPU computes."""
    engine, known, order = made(), module.loss, []
    move = engine.moved
    monkeypatch.setattr(engine, "moved", lambda batch: order.append("move") or move(batch))
    monkeypatch.setattr(module, "loss", lambda *args: order.append("forward") or known(*args))
    engine.step(jobs.parts(0), 1e-3)
    assert order == ["move"] * jobs.N_PARTS + ["forward"] * jobs.N_PARTS


def name_of(pieces):
    (name,) = pieces
    return name


def test_a_fresh_engine_goes_on_from_weights_and_moments_bit_for_bit():
    engine = made()
    jobs.follow(engine, range(2))
    other = made(seed=1)
    jobs.scramble(other.model)
    for name in engine.params:
        with engine.weights(name) as theirs, other.weights(name) as ours:
            ours.copy_(theirs)
        moments = {slot: engine.read_slot(name, slot) for slot in SLOTS}
        other.write_slots(name, moments, engine.n_updates)
    assert other.n_updates == 2
    assert jobs.follow(other, range(2, 4)).outcomes == jobs.follow(engine, range(2, 4)).outcomes
    assert torch.equal(other.params["blocks.0.layer.A_log"], engine.params["blocks.0.layer.A_log"])


def test_moments_are_zero_before_any_update():
    engine = made()
    assert not engine.read_slot("norm.weight", "exp_avg").any()


def test_weights_reach_what_is_not_trained():
    engine = made()
    with engine.weights("blocks.4.layer.correction_bias") as bias:
        bias.fill_(3.0)
    assert engine.model.blocks[4].layer.correction_bias.tolist() == [3.0] * 6


def test_a_place_computes_again_the_most_that_one_of_its_letters_says():
    modes = {"G": "mixer", "A": "full", "M": "mixer"}
    assert recompute_at(jobs.CONFIG, modes) == ["mixer", "none", "full", "none", "none"]
    spread = ParallelRecipe(recompute=modes)
    engine = Engine(make_model(jobs.CONFIG), replace(jobs.recipe(), parallel=spread))
    assert [b.recompute for b in engine.model.blocks] == recompute_at(jobs.CONFIG, modes)


@pytest.mark.parametrize("mode", ["mixer", "full"])
def test_recomputed_blocks_train_bit_for_bit_the_same(mode):
    spread = ParallelRecipe(recompute=dict.fromkeys("MNGAFE", mode))
    seen = jobs.follow(made(parallel=spread.__dict__), range(2))
    assert seen.outcomes == jobs.follow(made(), range(2)).outcomes


def test_unknown_letters_and_modes_are_refused_with_the_legal_ones():
    with pytest.raises(ConfigError, match=r"no such letter \('Q'\); .* M, N, G, A, F, E"):
        recompute_at(jobs.CONFIG, {"Q": "full"})
    with pytest.raises(ConfigError, match=r"recompute\.M: .*'ful'.* full"):
        recompute_at(jobs.CONFIG, {"M": "ful"})
