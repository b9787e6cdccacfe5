"""The keys of a published config.json: the classes' defaults, other spellings, and refusals."""

import json
import math

import pytest
from transformers import FalconMambaConfig, JambaConfig, Mamba2Config, MambaConfig

from hybridzoo.checkpoint.convert import falcon_mamba, jamba, mamba, mamba2
from hybridzoo.checkpoint.convert.keys import (
    Keys,
    activation,
    first_eos,
    write_activation,
)
from hybridzoo.errors import CheckpointError, ConfigError
from hybridzoo.layers.mlp import ACTIVATIONS
from hybridzoo.options import strict

KEYS = Keys(
    family="mamba",
    table={"width": (int, 8), "act": (str, "silu"), "limit": (tuple[float, float], [0.0, 1.0])},
    limits={"limit": {"max": math.inf}},
    only={"window": None, "rms_norm": True},
    idle="speed_.*",
)
CLASSES = [
    (jamba.KEYS, JambaConfig),
    (mamba.KEYS, MambaConfig),
    (mamba2.KEYS, Mamba2Config),
    (falcon_mamba.KEYS, FalconMambaConfig),
]
# the class computes these, spells them as rules that we read otherwise, or never had them.
NOT_A_DEFAULT = {"intermediate_size", "time_step_rank", "mamba_dt_rank", "layer_types"}
NOT_A_DEFAULT |= {"layers_block_type", "mamba_inner_layernorms", "head_dim"}


@pytest.mark.parametrize(("keys", "config_class"), CLASSES, ids=lambda x: getattr(x, "family", ""))
def test_a_key_left_out_is_what_the_class_falls_back_to(keys, config_class):
    theirs = config_class()
    for key, (_, default) in keys.table.items():
        if key not in NOT_A_DEFAULT or (key == "intermediate_size" and keys is jamba.KEYS):
            value = getattr(theirs, key)
            assert (list(value) if isinstance(value, tuple) else value) == default, key


def test_keys_are_typed_and_filled_in():
    got = KEYS.read({"model_type": "mamba", "limit": [0, 2], "speed_kernel": 3, "window": None})
    assert got == {"width": 8, "act": "silu", "limit": (0.0, 2.0)}


@pytest.mark.parametrize("text", ["Infinity", '{"__float__": "Infinity"}'])
def test_infinity_is_read_bare_and_in_words(text):
    assert KEYS.read(json.loads(f'{{"limit": [0.0, {text}]}}'))["limit"] == (0.0, math.inf)


def test_infinity_is_written_in_words_that_every_json_reader_takes():
    assert json.dumps(strict(math.inf), allow_nan=False) == '{"__float__": "Infinity"}'
    assert strict({"a": (0.5, [-math.inf])}) == {"a": [0.5, [{"__float__": "-Infinity"}]]}


@pytest.mark.parametrize(
    ("published", "error", "said"),
    [
        ({"widht": 3}, CheckpointError, r"widht is not a key of mamba \(3\); did you mean width\?"),
        ({"use_cache_of": 3}, CheckpointError, "use_cache_of is not a key of mamba"),
        ({"width": "3"}, ConfigError, "width: wrong type"),
        ({"width": -1}, ConfigError, "width: too small"),
        ({"limit": [0.0, {"__float__": "pi"}]}, ConfigError, "limit: wrong type"),
        ({"limit": [0.0, {"__float__": "NaN"}]}, ConfigError, "limit: not a finite number"),
        ({"window": 8}, CheckpointError, r"window is set \(8\).* with null only"),
        ({"rms_norm": False}, CheckpointError, r"rms_norm is set \(False\).* with true only"),
        (
            {"quantization_config": {"bits": 4}},
            CheckpointError,
            r"^quantization_config is set \(\{'bits': 4\}\); .*\. Use an unquantised checkpoint\.$",
        ),
        (
            {"architectures": ["FalconMambaForCausalLM"]},
            CheckpointError,
            "FalconMambaForCausalLM is not mamba's, .*Set model_type to falcon_mamba",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_sentence(published, error, said):
    with pytest.raises(error, match=said) as refused:
        KEYS.read(published)
    assert "\n" not in str(refused.value)


def test_quantization_of_null_is_none():
    assert KEYS.read({"quantization_config": None}) == KEYS.read({})


@pytest.mark.parametrize(
    "names", [["MambaForCausalLM"], ["MyMamba"], [], None, "MambaForCausalLM", [3]], ids=str
)
def test_classes_of_no_other_family_are_nobodys_business(names):
    assert KEYS.read({"architectures": names})["width"] == 8


def test_activations_have_a_name_both_ways():
    for ours in ACTIVATIONS:
        assert activation({"hidden_act": write_activation(ours)}) == ours
    with pytest.raises(CheckpointError, match=r"unknown act \('sliu'\); did you mean silu\?"):
        activation({"act": "sliu"}, "act")


@pytest.mark.parametrize(("eos", "first"), [(3, 3), ([4, 5], 4), ([], None), (None, None)])
def test_the_first_eos_is_the_texts(eos, first):
    assert first_eos({"eos_token_id": eos}) == first
