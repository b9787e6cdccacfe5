"""A DeepSpeed config of the user's: what joins ours, and what is refused with a way out."""

import inspect
import json
import re

import pytest
import torch

from hybridzoo.errors import ConfigError
from hybridzoo.parallel import ds_config, ds_keys
from tests.parallel import jobs


@pytest.fixture
def write(tmp_path):
    def written(options, **change):
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(options))
        spread = change.pop("parallel", {}) | {"deepspeed": str(path)}
        return jobs.recipe(parallel=spread, **change)

    return written


CONTRADICTIONS = [
    ({"train_batch_size": 16}, "train_batch_size: (16) contradicts", "gives 8"),
    ({"train_micro_batch_size_per_gpu": 1}, "(1) contradicts", "gives 2"),
    ({"gradient_accumulation_steps": 2}, "(2) contradicts", "gives 4"),
    ({"gradient_clipping": 1.0}, "(1.0) contradicts", "gives 0.5"),
    ({"zero_optimization": {"stage": 2}}, "stage: (2) contradicts", "zero_stage (1)"),
    ({"bf16": {"enabled": True}}, "bf16: ({'enabled': True})", "precision: bf16"),
    ({"fp16": {}}, "fp16", "precision: bf16"),
    ({"optimizer": {"type": "Adam"}}, "optimizer", "set lr, betas"),
    ({"scheduler": {"type": "WarmupLR"}}, "scheduler", "set schedule"),
    ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel", "set parallel.tp"),
    ({"sequence_parallel_size": 2}, "(2) cannot be used", "parallel.sequence_parallel"),
    ({"gradient_allreduce_op": "sum"}, "('sum') cannot be used", "averages"),
    ({"zero_optimization": {"compute_grad_norm": False}}, "compute_grad_norm: (False)", "norm"),
    ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offload", "Leave it out"),
    ({"communication_data_type": "fp16"}, "('fp16')", "fp32 or bf16"),
    ({"prescale_gradients": 1}, "(1)", "must be bool"),
    ({"zero_optimization": 1}, "zero_optimization: wrong type (1)", "mapping"),
    ({"zero_optimization": {"reduce_bucket_size": -5}}, "reduce_bucket_size: (-5)", "DeepSpeed"),
]


@pytest.mark.parametrize(("options", "what", "way"), CONTRADICTIONS)
def test_what_contradicts_the_recipe_is_refused(write, options, what, way):
    with pytest.raises(ConfigError) as found:
        ds_config.build(write(options), 1)
    assert what in str(found.value)
    assert way in str(found.value)
    assert "ds.json" in str(found.value)


@pytest.mark.parametrize(
    ("options", "near"),
    [
        ({"gradient_cliping": 1.0}, "gradient_clipping"),
        ({"zero_optimisation": {"stage": 1}}, "zero_optimization"),
        ({"zero_optimization": {"reduce_bucket_sise": 5}}, "reduce_bucket_size"),
        ({"flops_profiler": {"enable": True}}, "enabled"),
        ({"tensorboard": {"output_pth": "x"}}, "output_path"),
    ],
)
def test_a_misspelt_key_is_refused_though_deepspeed_ignores_it(write, options, near):
    with pytest.raises(ConfigError, match=rf"not a key of DeepSpeed's; did you mean {near}\?"):
        ds_config.build(write(options), 1)


def test_what_the_recipe_says_too_may_stay(write):
    options = {"train_batch_size": "auto", "gradient_clipping": 0.5, "fp16": {"enabled": False}}
    made = ds_config.build(write(options | {"zero_optimization": {"stage": 1}}), 1)
    assert made == ds_config.build(jobs.recipe(), 1)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("key", "plain", "other"),
    [("prescale_gradients", False, True), ("gradient_predivide_factor", 1.0, 2)],
)
def test_only_without_zero_gradients_are_scaled_on_the_way(write, stage, key, plain, other):
    """DeepSpeed does not look at these keys at stage 1, and stops at an assertion at 2 and 3."""
    spread = {"zero_stage": stage}
    assert ds_config.build(write({key: plain}, parallel=spread), 1)[key] == plain
    given = write({key: other}, parallel=spread)
    if stage == 0:
        assert ds_config.build(given, 1)[key] == other
        return
    sentence = rf"{key}: \({other}\) cannot work with zero_stage {stage}; "
    with pytest.raises(ConfigError, match=sentence):
        ds_config.build(given, 1)


@pytest.mark.parametrize(("device", "kind"), [("cpu", "cpu"), ("auto", "cuda"), ("cuda", "cuda")])
def test_a_section_is_read_with_deepspeed_for_the_device_of_the_recipe(
    write, monkeypatch, device, kind
):
    """The first import decides for the process, whatever the engine asks for later."""
    ds_keys.imported("cpu")
    asked = []
    monkeypatch.setattr(ds_keys, "imported", asked.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ds_config.build(write({"zero_optimization": {"stage": 1}}, device=device), 1)
    assert asked == [kind]


def test_a_file_that_is_no_mapping_is_refused(write):
    with pytest.raises(ConfigError, match="expected DeepSpeed's keys"):
        ds_config.build(write([1]), 1)


def test_mixer_recomputation_and_deepspeeds_linear_exclude_each_other(write):
    options = {"zero_optimization": {"memory_efficient_linear": True}}
    with pytest.raises(ConfigError, match="recompute: mixer"):
        ds_config.build(write(options, parallel={"recompute": {"F": "mixer"}}), 1)


def test_every_key_that_deepspeed_reads_is_known():
    """A key that a new DeepSpeed reads is put into one of the tables."""
    ds_keys.imported("cpu")
    from deepspeed.runtime import config, constants

    source = inspect.getsource(config)
    names = set(re.findall(r"(?:\(|\s)param_dict(?:\.get\(|\[|, *)([A-Z_]{4,})", source))
    read = {getattr(constants, name) for name in names if hasattr(constants, name)}
    read |= set(re.findall(r"param_dict\.get\(\"(\w+)\"", source))
    given = ds_config.build(jobs.recipe(), 1)
    known = {*given, *ds_keys._VALUES, *ds_keys._MODELS, *ds_keys._SECTIONS, *ds_keys._REFUSED}
    assert len(read) > 20
    assert read <= known
