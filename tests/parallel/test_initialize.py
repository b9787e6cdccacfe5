"""Training from Python: a config and a recipe become this rank's engine."""

import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from hybridzoo.errors import ConfigError
from hybridzoo.model import HybridLM
from hybridzoo.parallel import Engine, ParallelRecipe, ds_config, ds_keys, initialize
from hybridzoo.parallel.engine import join
from tests import gloo
from tests.models import make_model
from tests.parallel import jobs

LAYOUTS = {
    "dp": {},
    "tp": {"tp": 2, "sequence_parallel": True},
    "ep": {"ep": 2},
    "pp": {"pp": 2, "balance": "auto"},
}


def stepped(spread):
    """Nats and norm of two steps of an engine made from a config, and this rank's share of it."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    dp = world // (spread.get("tp", 1) * spread.get("pp", 1))
    given = jobs.recipe(dp, parallel=spread, device="cpu")
    engine = initialize(jobs.CONFIG, given)
    dp = engine.parallel.dp
    outcomes = [engine.step(jobs.parts(i, dp.rank, dp.world), given.lr) for i in range(2)]
    sizes = sum(p.numel() for p in engine.model.parameters())
    return [[o.nats, o.norm] for o in outcomes], sizes, type(engine).__name__


def on_a_rank(_, spread):
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    return stepped(spread)


def refused_on_a_rank(_, spread):
    try:
        initialize(jobs.CONFIG, jobs.recipe(parallel=spread, device="cpu"))
    except ConfigError as error:
        return str(error)


def test_a_config_becomes_an_engine_with_the_recipes_seed():
    engine = initialize(jobs.CONFIG, jobs.recipe(seed=3, device="cpu"))
    assert type(engine) is Engine
    expected = make_model(jobs.CONFIG, dtype=torch.float32)
    expected.init_weights(3)
    for name, parameter in engine.model.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_make_their_parts_of_a_config_and_train_them_as_one(layout):
    alone, whole, _ = stepped({})
    ends = gloo.run(2, on_a_rank, LAYOUTS[layout])
    for losses, size, kind in ends:
        # fp32 sums in another order
        torch.testing.assert_close(losses, alone, rtol=1e-5, atol=0)
        assert kind == ("PipelineEngine" if layout == "pp" else "DataEngine")
        assert size == whole if layout == "dp" else size < whole


def limits_on_a_rank(_, spread):
    """The seconds after which each process group gives up that an engine's steps have made."""
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    known, make = set(_world.pg_map), dist.new_group
    stepped(spread)
    assert dist.new_group is make
    backends = [g._get_backend(torch.device("cpu")) for g in set(_world.pg_map) - known]
    return [backend.options._timeout.total_seconds() for backend in backends]


@pytest.mark.parametrize("layout", ["pp", "ep"])
def test_every_process_group_gives_up_after_the_recipes_time(layout):
    for limits in gloo.run(2, limits_on_a_rank, LAYOUTS[layout] | {"timeout_s": 77}):
        assert set(limits) == {77}
        # beside those of our four axes DeepSpeed's own
        assert len(limits) > 4


def told_of_batches(_, spread):
    """What a rank hears when each brings other sequences, and then when all bring the same."""
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    dp = 1 if {"tp", "pp"} & spread.keys() else 2
    engine = initialize(jobs.CONFIG, jobs.recipe(dp, parallel=spread, device="cpu"))
    said = []
    for step in (dist.get_rank(), 2):
        try:
            engine.step(jobs.parts(step, 0, dp), 0.001)
        except ConfigError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("layout", ["tp", "pp"])
def test_ranks_that_share_sequences_must_bring_the_same(layout):
    said = gloo.run(2, told_of_batches, LAYOUTS[layout])
    assert said[0] == said[1]
    (sentence,) = said[0]
    assert sentence.startswith("batches: ranks 0 and 1 brought different sequences; the tp and pp ")


def test_data_parallel_ranks_bring_their_own_sequences():
    assert gloo.run(2, told_of_batches, LAYOUTS["dp"]) == [[], []]


def test_what_ranks_cannot_run_is_said_on_all():
    said = gloo.run(2, refused_on_a_rank, {"pp": 2, "balance": "auto", "zero_stage": 3})
    assert said[0] == said[1]
    assert said[0].startswith("parallel.zero_stage: (3) cannot work with pp 2; ")


def test_one_process_says_what_it_would_not_read():
    with pytest.raises(ConfigError, match=r"^parallel.deepspeed: ds.json would not be read; "):
        initialize(jobs.CONFIG, jobs.recipe(parallel={"deepspeed": "ds.json"}, device="cpu"))


def test_a_recipe_refuses_an_unknown_way_to_recompute():
    with pytest.raises(ConfigError, match=r"^parallel.recompute.M: unknown choice \('ful'\); "):
        ParallelRecipe(recompute={"M": "ful"})


def test_without_deepspeed_ranks_are_refused_before_anything_else(monkeypatch):
    monkeypatch.setattr(ds_keys, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^parallel: DeepSpeed is not installed; .*pip install"):
        ds_config.check(jobs.recipe(), 1, jobs.CONFIG)


def apart(_, changes):
    """What each rank hears when each has changes of its own."""
    change = changes[dist.get_rank()]
    try:
        initialize(jobs.CONFIG, jobs.recipe(2, device="cpu", **change))
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"lr": 0.5}, "lr: rank 1 has 0.5 and rank 0 0.001; "),
        ({"parallel": {"zero_stage": 2}}, "parallel.zero_stage: rank 1 has 2 and rank 0 1; "),
        ({"parallel": {"tp": 2}}, "parallel.tp: rank 1 has 2 and rank 0 1; "),
    ],
)
def test_ranks_with_different_recipes_are_refused(change, sentence):
    said = gloo.run(2, apart, [{}, change])
    assert said[0] == said[1]
    assert said[0].startswith(sentence)


def test_hosts_may_spell_paths_apart():
    assert jobs.recipe(output="/a").values() == jobs.recipe(output="/b").values()


def elsewhere(_):
    """A model that lies where the ranks' tensors do not."""
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    given = jobs.recipe(2, device="cpu")
    try:
        initialize(HybridLM(jobs.CONFIG, parallel=join(given), device="meta"), given)
    except ConfigError as error:
        return str(error)


def test_a_model_on_another_device_than_the_recipes_is_refused():
    for said in gloo.run(2, elsewhere):
        assert said.startswith("device: the model is on meta, and the recipe's cpu is cpu; ")
