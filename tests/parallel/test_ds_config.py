"""DeepSpeed's config from a recipe, and the combinations that no ranks can run."""

import json
import re
import subprocess
import sys

import pytest

from hybridzoo.config import HybridConfig
from hybridzoo.errors import ConfigError
from hybridzoo.parallel import ds_config
from tests.parallel import jobs

DENSE = HybridConfig.from_dict(
    jobs.OPTIONS | {"pattern": "M N | F", "layers": {k: jobs.OPTIONS["layers"][k] for k in "MNF"}}
)


def refusal(world, config=jobs.CONFIG, **change):
    given = jobs.recipe(**change)
    with pytest.raises(ConfigError) as found:
        ds_config.check(given, world, config)
    return str(found.value)


@pytest.mark.parametrize(
    ("world", "change", "what", "way"),
    [
        (3, {"parallel": {"tp": 2}}, "cannot be laid out as tp 2 x pp 1", "1, 3"),
        (
            4,
            {"parallel": {"tp": 2, "pp": 4}},
            "cannot be laid out as tp 2 x pp 4",
            "1, 2, 4",
        ),
        (4, {"parallel": {"ep": 3}}, "ep 3 cannot divide 4 data-parallel ranks", "Use ep 1, 2, 4"),
        (3, {}, r"batch_size: \(8\) .* dp \(3\) x accumulate \(4\)", "a multiple of 12"),
        (4, {"parallel": {"tp": 4, "zero_stage": 1, "recompute": {"Q": "full"}}}, "'Q'", "M, N, G"),
        (2, {"accumulate": 1, "parallel": {"zero_stage": 3, "ep": 2}}, "with ep 2", "0, 1 or 2"),
        (2, {"accumulate": 1, "parallel": {"zero_stage": 3}, "ema": 0.9}, "with ema 0.9", "ema 0"),
        (2, {"accumulate": 1, "parallel": {"zero_stage": 3}, "compile": True}, "compile", "false"),
        (3, {"accumulate": 1, "parallel": {"tp": 3}}, "tp=3", "tp=1"),
        (4, {"accumulate": 1, "parallel": {"ep": 4}}, "ep=4 must divide n_experts", "1, 2, 3, 6"),
    ],
)
def test_what_the_ranks_cannot_run_is_refused_with_what_they_can(world, change, what, way):
    message = refusal(world, **change)
    assert re.search(what, message), message
    assert way in message


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_2_and_3_do_not_run_over_pipeline_stages(stage):
    message = refusal(2, DENSE, parallel={"pp": 2, "zero_stage": stage})
    assert f"({stage}) cannot work with pp 2" in message
    assert "Use zero_stage 0 or 1" in message


def test_a_dense_model_has_no_experts_to_spread():
    assert "this model has none" in refusal(2, DENSE, accumulate=1, parallel={"ep": 2})


def test_stages_must_fit_the_patterns_cuts():
    assert "2 segments for pp=3" in refusal(3, DENSE, parallel={"pp": 3})


def test_an_odd_length_is_not_shared_by_tokens():
    data = jobs.recipe().data.__class__(source="", seq_len=9)
    message = refusal(2, parallel={"tp": 2, "sequence_parallel": True}, data=data)
    assert "seq_len: (9) must be a multiple of tp (2)" in message


@pytest.mark.parametrize(
    ("world", "config", "change"),
    [
        (4, jobs.CONFIG, {"parallel": {"tp": 2, "zero_stage": 3}, "accumulate": 2}),
        (4, jobs.CONFIG, {"parallel": {"tp": 2, "ep": 2, "zero_stage": 0}, "accumulate": 2}),
        (4, DENSE, {"parallel": {"tp": 2, "pp": 2, "zero_stage": 0}}),
        (2, DENSE, {"parallel": {"pp": 2, "zero_stage": 1}, "ema": 0.9, "compile": True}),
    ],
)
def test_what_can_run_passes(world, config, change):
    ds_config.check(jobs.recipe(**change), world, config)


def test_the_recipe_gives_batch_clipping_and_stage():
    made = ds_config.build(jobs.recipe(2, parallel={"zero_stage": 2}), 2)
    assert made["train_batch_size"] == 8
    assert made["train_micro_batch_size_per_gpu"] == 2
    assert made["gradient_accumulation_steps"] == 2
    assert made["gradient_clipping"] == 0.5
    assert made["zero_optimization"]["stage"] == 2
    # A_log, D and dt_bias would be rounded
    assert not {"bf16", "fp16", "optimizer", "scheduler"} & made.keys()


def test_at_stage_0_the_engine_clips():
    """DeepSpeed would count only tp rank 0's whole parameters of the first stage."""
    assert ds_config.build(jobs.recipe(parallel={"zero_stage": 0}), 1)["gradient_clipping"] == 0.0


def test_the_timer_that_waits_for_the_gpu_runs_only_where_a_user_asks(tmp_path):
    assert ds_config.build(jobs.recipe(), 1)["timers"] == {"throughput": {"enabled": False}}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"timers": {"throughput": {"enabled": True}}}))
    made = ds_config.build(jobs.recipe(parallel={"deepspeed": str(path)}), 1)
    assert made["timers"] == {"throughput": {"enabled": True}}


def test_products_that_are_kept_are_not_changed_in_place():
    for mode, expected in (("mixer", False), ("full", True)):
        given = jobs.recipe(parallel={"zero_stage": 3, "recompute": {"F": mode}})
        zero = ds_config.build(given, 1)["zero_optimization"]
        assert zero["memory_efficient_linear"] is expected


def test_a_users_keys_join_ours(tmp_path):
    path = tmp_path / "ds.json"
    zero = {"stage": "auto", "reduce_bucket_size": 7, "stage3_max_reuse_distance": 9}
    path.write_text(json.dumps({"zero_optimization": zero, "wall_clock_breakdown": True}))
    given = jobs.recipe(parallel={"deepspeed": str(path), "zero_stage": 3})
    made = ds_config.build(given, 1)
    assert made["wall_clock_breakdown"] is True
    assert made["zero_optimization"]["stage"] == 3
    assert made["zero_optimization"]["reduce_bucket_size"] == 7
    assert made["zero_optimization"]["stage3_max_reuse_distance"] == 9
    assert made["zero_optimization"]["allgather_bucket_size"] == 50_000_000


def test_checking_needs_neither_deepspeed_nor_ranks():
    code = (
        "import sys; from tests.parallel import jobs; from hybridzoo.parallel import ds_config;"
        "ds_config.check(jobs.recipe(parallel={'tp': 2}), 2, jobs.CONFIG);"
        "sys.exit('deepspeed' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
