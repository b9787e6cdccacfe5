"""DeepSpeed's engine of data-parallel ranks: gradients, norms and losses are one process's."""

import itertools
import json
import math
from functools import cache

import pytest
import torch

from hybridzoo.comm import Axis, Parallel
from hybridzoo.parallel.norm import is_counted, tag
from tests import gloo
from tests.models import joined, make_model
from tests.parallel import jobs

# DeepSpeed on several processes: minutes, of which the quick suite has ten
pytestmark = pytest.mark.slow

# world, and how its ranks are laid out
DP2 = (2, {})
TP2 = (2, {"tp": 2})
TP2_DP2 = (4, {"tp": 2})
SEQUENCE = (4, {"tp": 2, "sequence_parallel": True})
TP4 = (4, {"tp": 4})
NAMES = {"DP2": DP2, "TP2": TP2, "TP2_DP2": TP2_DP2, "SEQUENCE": SEQUENCE, "TP4": TP4}


@pytest.fixture(autouse=True)
def _patience(monkeypatch):
    """A rank's first job imports deepspeed, which takes a while on a busy machine."""
    monkeypatch.setattr(gloo, "TIMEOUT_S", 180)


def given_for(layout, stage, **change):
    world, spread = layout
    spread = spread | {"zero_stage": stage} | change.pop("parallel", {})
    return world, jobs.recipe(world // spread.get("tp", 1), parallel=spread, **change)


@cache
def one_process(n_steps):
    return jobs.alone(jobs.recipe(), n_steps)


def full(ranks, tp, step, kind):
    """Canonical name -> tensor, from the pieces of the last data-parallel rank's tp ranks."""
    return joined(jobs.CONFIG, [getattr(rank, step)[kind] for rank in ranks[-tp:]])


def check(layout, stage, n_steps, **change):
    world, given = given_for(layout, stage, **change)
    ranks = gloo.run(world, jobs.run, given, n_steps)
    known, tp = one_process(n_steps), given.parallel.tp
    for rank in ranks:
        assert rank.outcomes == ranks[0].outcomes
        assert rank.evaluated == ranks[0].evaluated
        for got, expected in zip(rank.outcomes, known.outcomes, strict=True):
            # fp32 sums of some hundred terms in another order
            assert got.nats == pytest.approx(expected.nats, abs=1e-5)
            assert got.aux == pytest.approx(expected.aux, abs=1e-6)
            assert got.norm == pytest.approx(expected.norm, rel=1e-5)
            assert got.n_targets == expected.n_targets
            assert got.is_applied
    assert known.outcomes[0].norm > given.clip_norm
    assert ranks[0].evaluated == pytest.approx(known.evaluated, rel=1e-6)
    # (1 - beta_1) times the clipped gradient: a wrong scale, which AdamW's weights hide, shows
    expected = full([known], 1, "first", "exp_avg")
    for name, tensor in full(ranks, tp, "first", "exp_avg").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-7, msg=name)
    expected = full([known], 1, "last", "weight")
    for name, tensor in full(ranks, tp, "last", "weight").items():
        # a key's bias has no gradient but roundings, which AdamW makes as large as any
        if not name.endswith("qkv_proj.bias"):
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_data_parallel_ranks_train_like_one_process(stage):
    check(DP2, stage, 3)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_tensor_times_data_parallel_ranks_train_like_one_process(stage):
    check(TP2_DP2, stage, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "stage"),
    [*itertools.product(["TP2", "SEQUENCE"], [0, 1, 2, 3]), ("TP4", 1)],
)
def test_every_layout_follows_one_process_for_20_steps(layout, stage):
    check(NAMES[layout], stage, 20)


def test_a_kv_head_or_group_on_several_ranks_counts_once():
    """And sequence parallelism changes no number."""
    check((4, {"tp": 4, "sequence_parallel": True}), 1, 2)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_tags_count_each_number_of_the_model_once(world):
    counted = dict.fromkeys((name for name, _ in jobs.CONFIG.params()), 0)
    for rank in range(world):
        tp = Axis(rank, world)
        model = make_model(jobs.CONFIG, Parallel(tp=tp))
        tag(model)
        for name, _, locals_ in model.local_names():
            mine = [model.get_parameter(local) for local in locals_.values()]
            counted[name] += sum(p.numel() for p in mine if is_counted(p, tp))
    assert counted == {name: math.prod(p.shape) for name, p in jobs.CONFIG.params()}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(stage):
    world, given = given_for(DP2, stage)
    for whole, resumed, n_updates in gloo.run(world, jobs.resume, given, 2, 2):
        assert resumed.outcomes == whole.outcomes
        assert resumed.evaluated == whole.evaluated
        assert n_updates == 4
        assert_same(resumed.last, whole.last)


@pytest.mark.parametrize(
    ("stage", "where"),
    [*itertools.product([0, 1, 2, 3], ["gradient"]), (0, "loss"), (1, "loss")],
)
def test_an_update_that_is_not_finite_on_one_rank_is_left_out_on_all(stage, where):
    world, given = given_for(DP2, stage)
    for plain, first, bad, after, n_updates, rest in gloo.run(world, jobs.spoil, given, where):
        assert not bad.is_applied
        assert math.isfinite(bad.nats) == (where == "gradient")
        assert not math.isfinite(bad.norm)
        assert n_updates == 1
        assert_same(after, first.last)
        # no gradient is left over, nor a part that was accumulated
        assert rest.outcomes == plain.outcomes[1:]
        assert_same(rest.last, plain.last)


def test_without_clipping_the_norm_is_told_all_the_same():
    for stage in (0, 1):
        world, given = given_for(DP2, stage, clip_norm=None)
        for rank in gloo.run(world, jobs.run, given, 1):
            assert rank.outcomes[0].norm == pytest.approx(one_process(3).outcomes[0].norm, rel=1e-5)


def test_under_bf16_parameters_stay_fp32_and_losses_are_one_processs():
    world, given = given_for(DP2, 1, precision="bf16")
    known = jobs.alone(given, 2)
    for rank in gloo.run(world, jobs.run, given, 2):
        for got, expected in zip(rank.outcomes, known.outcomes, strict=True):
            # a part's numbers are the same; only the sums over parts differ, in fp32
            assert got.nats == pytest.approx(expected.nats, abs=1e-4)
            assert got.norm == pytest.approx(expected.norm, rel=1e-3)
        assert {t.dtype for p in rank.last["weight"].values() for t in p.values()} == {
            torch.float32
        }
    # the forward was rounded
    assert known.outcomes[0].nats != pytest.approx(one_process(3).outcomes[0].nats, abs=1e-5)


@pytest.mark.parametrize("mode", ["mixer", "full"])
def test_recomputed_activations_change_nothing_where_weights_are_gathered(mode, tmp_path):
    modes = dict.fromkeys("MNGAFE", mode)
    check(DP2, 3, 2, parallel={"recompute": modes, "deepspeed": gathered(tmp_path)})


def test_weights_are_gathered_as_the_users_file_says(tmp_path):
    """Its threshold of 0 keeps no small parameter whole; the layers' direct reads are gathered."""
    check(TP2_DP2, 3, 2, parallel={"deepspeed": gathered(tmp_path)})


def test_an_untrained_bias_is_written_and_read_where_weights_are_gathered(tmp_path):
    world, given = given_for(DP2, 3, parallel={"deepspeed": gathered(tmp_path)})
    for bias in gloo.run(world, jobs.untrained, given):
        assert bias.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_buckets_smaller_than_a_parameter_change_no_gradient(stage, tmp_path):
    """An embedding of a large vocabulary is larger than the usual bucket."""
    zero = {"reduce_bucket_size": 100, "allgather_bucket_size": 100}
    check(DP2, stage, 2, parallel={"deepspeed": written(tmp_path, zero)})


def gathered(folder):
    return written(folder, {"stage3_param_persistence_threshold": 0})


def written(folder, zero):
    path = folder / "ds_config.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    return str(path)


def assert_same(got, expected):
    for kind, names in expected.items():
        for name, pieces in names.items():
            for piece, tensor in pieces.items():
                assert torch.equal(got[kind][name][piece], tensor), (kind, name, piece)
