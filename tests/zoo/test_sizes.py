"""The zoo's configs: as large as the published models, and read the same from their config.json."""

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from hybridzoo import HybridConfig, list_models
from hybridzoo.checkpoint.convert import family_of
from hybridzoo.checkpoint.convert.base import differences
from hybridzoo.layers.moe import MoEConfig
from tests.zoo.published import ORIGINALS, PUBLISHED

# counted on transformers' classes with the published config.json; Codestral's is Mistral's figure
SIZES = {
    "codestral-mamba-7b": 7_285_403_648,
    "falcon-mamba-7b": 7_272_665_088,
    "falcon3-mamba-7b": 7_272_665_088,
    "jamba-1.5-large": 398_555_145_696,
    "jamba-1.5-mini": 51_570_323_328,
    "jamba-reasoning-3b": 3_029_337_472,
    "jamba-tiny-dev": 318_688_640,
    "jamba-tiny-random": 127_679_344,
    "jamba-v0.1": 51_570_323_328,
    "mamba-1.4b": 1_372_178_432,
    "mamba-130m": 129_135_360,
    "mamba-2.8b": 2_768_345_600,
    "mamba-2.8b-slimpj": 2_768_345_600,
    "mamba-370m": 371_516_416,
    "mamba-790m": 793_204_224,
    "mamba2-1.3b": 1_343_757_312,
    "mamba2-130m": 128_989_632,
    "mamba2-2.7b": 2_702_599_680,
    "mamba2-370m": 368_346_624,
    "mamba2-780m": 780_161_280,
    "mamba2attn-2.7b": 2_697_590_880,
}
# where a token does not use all of them
ACTIVE = {
    "jamba-1.5-large": 94_149_338_592,
    "jamba-1.5-mini": 12_110_311_296,
    "jamba-tiny-dev": 167_693_696,
    "jamba-tiny-random": 83_639_152,
    "jamba-v0.1": 12_110_311_296,
}
OURS = {"shakespeare", "tiny-hybrid"}
ZOO = {entry.name: entry for entry in list_models()}


def test_every_model_but_our_own_has_a_published_size():
    assert set(SIZES) == set(ZOO) - OURS
    # falcon3-mamba-7b's file was not to be had: its keys are those of falcon-mamba-7b but for eps
    assert set(PUBLISHED) | set(ORIGINALS) == set(SIZES) - {"falcon3-mamba-7b"}


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_those_published_to_the_last_one(name):
    assert ZOO[name].n_params == SIZES[name]
    assert ZOO[name].n_active_params == ACTIVE.get(name, SIZES[name])


def test_mamba2attn_is_as_large_as_its_layers_written_out():
    d, i, n, h = 2560, 5120, 128, 80
    conv = i + 2 * n
    mamba2 = d * (2 * i + 2 * n + h) + conv * 4 + conv + 3 * h + i + i * d
    q = 30 * 128
    attention = d * 3 * q + 3 * q * 4 + 3 * q + q * d
    assert SIZES["mamba2attn-2.7b"] == 50288 * d + 58 * mamba2 + 6 * attention + 65 * d


CLASSES = {
    name: PUBLISHED[name]
    for name in (
        "mamba-1.4b",
        "codestral-mamba-7b",
        "falcon-mamba-7b",
        "jamba-1.5-large",
        "jamba-reasoning-3b",
        "jamba-tiny-dev",
    )
}
# an original, in the keys of transformers' class
CLASSES["mamba2-1.3b"] = {
    "model_type": "mamba2",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_heads": 64,
    "head_dim": 64,
    "n_groups": 1,
    "state_size": 128,
    "vocab_size": 50288,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("name", CLASSES)
def test_transformers_own_class_has_as_many(name):
    theirs = AutoConfig.for_model(**CLASSES[name])
    # torch.device("meta") would miss the torch.empty that conftest.py puts in
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(theirs)
    assert sum(p.numel() for p in model.parameters()) == ZOO[name].n_params


@pytest.mark.parametrize("name", PUBLISHED)
def test_config_is_what_the_published_file_is_read_as(name):
    assert_same(ZOO[name].config, PUBLISHED[name])


@pytest.mark.parametrize("name", ORIGINALS)
def test_config_is_what_the_original_file_is_read_as(name):
    # the first Mambas are listed as transformers has them: its file says where a text ends, and its
    # class rounds before the norm's weight
    unsaid = ["eos_token_id", "norm_weight_fp32"] if name in PUBLISHED else []
    assert_same(ZOO[name].config, ORIGINALS[name], unsaid)


def assert_same(config: HybridConfig, published: dict, unsaid: list[str] | None = None) -> None:
    theirs = family_of(published).read(published)
    assert differences(config, theirs) == (unsaid or [])
    # they round or train otherwise, which differences leaves out
    for field in ("residual_fp32", "tokenizer"):
        assert getattr(config, field) == getattr(theirs, field)
    for mine, their in zip(experts(config), experts(theirs), strict=True):
        assert (mine.router_fp32, mine.aux_loss) == (their.router_fp32, their.aux_loss)


def experts(config: HybridConfig) -> list[MoEConfig]:
    layers = (branch.config for place in config.places for branch in place)
    return [layer for layer in layers if isinstance(layer, MoEConfig)]


def test_falcon3_is_falcon_mamba_with_another_eps():
    ours, falcon = ZOO["falcon3-mamba-7b"].config, ZOO["falcon-mamba-7b"].config
    changed = ["eos_token_id", *(f"blocks.{i}.norm_eps" for i in range(64))]
    assert differences(ours, falcon) == changed
    assert ours.layers["M"].norm_eps == 1e-5


def test_slimpj_is_mamba_2_8b_but_for_its_weights():
    same = differences(ZOO["mamba-2.8b-slimpj"].config, ZOO["mamba-2.8b"].config)
    assert sorted(same) == ["eos_token_id", "norm_weight_fp32"]
