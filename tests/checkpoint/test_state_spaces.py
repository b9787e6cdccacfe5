"""The original files of Mamba: their keys, a padded vocabulary, and files that mamba_ssm reads.

The families' common tests (test_families.py) run over these models as well.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from hybridzoo.checkpoint import convert, load, read_config, save
from hybridzoo.checkpoint.convert import state_spaces
from hybridzoo.config import HybridConfig
from hybridzoo.errors import CheckpointError, HybridzooError
from hybridzoo.model import HybridLM
from tests import gloo
from tests.families.base import VOCAB, edit_config, opened, randomise
from tests.families.state_spaces import BASE, CONFIGS, Reference, read

IDS = torch.arange(1, 22)[None]
WEIGHTS = "pytorch_model.bin"


def stored(directory):
    return torch.load(directory / WEIGHTS, weights_only=True)


def assert_same_files(a, b):
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
    for path in a.iterdir():
        assert path.read_bytes() == (b / path.name).read_bytes(), path.name


def changed(source, target, **keys):
    """A copy, config.json changed; a key such as ssm_cfg.bias lies in the mapping of that name."""
    shutil.copytree(source, target)

    def change(config):
        for key, value in keys.items():
            outer, dot, inner = key.partition(".")
            config[outer] = {**config[outer], inner: value} if dot else value
        return config

    edit_config(target, change)
    return target


# --- the reference


def theirs(config_class, model_class, **options):
    """A class of transformers and our reference with its weights."""
    made = model_class(config_class(vocab_size=VOCAB, hidden_size=48, **options)).eval()
    randomise(made, 1)
    return made


def assert_same_function(made, config):
    reference = Reference(config).eval()
    names = made.state_dict().items()
    weights = {name.replace("embeddings.", "embedding."): t for name, t in names}
    reference.load_state_dict(weights)
    with torch.no_grad():
        # both in fp32, in other orders of summation: logits of about 1 after 3 layers
        torch.testing.assert_close(reference(IDS), made(IDS).logits, atol=5e-5, rtol=0)


def test_reference_is_transformers_mamba():
    options = {"num_hidden_layers": 3, "state_size": 7, "expand": 3, "conv_kernel": 3}
    made = theirs(MambaConfig, MambaForCausalLM, use_bias=True, time_step_rank=5, **options)
    ssm = {"d_state": 7, "expand": 3, "d_conv": 3, "bias": True, "dt_rank": 5}
    assert_same_function(made, {**BASE, "vocab_size": VOCAB, "ssm_cfg": ssm})


@pytest.mark.parametrize("n_groups", [1, 4])
def test_reference_is_transformers_mamba2(n_groups):
    options = {"num_hidden_layers": 3, "state_size": 7, "num_heads": 8, "head_dim": 12}
    made = theirs(
        Mamba2Config, Mamba2ForCausalLM, n_groups=n_groups, tie_word_embeddings=True, **options
    )
    ssm = {"layer": "Mamba2", "d_state": 7, "headdim": 12, "ngroups": n_groups}
    assert_same_function(made, {**BASE, "vocab_size": VOCAB, "ssm_cfg": ssm})


# --- keys

MOVES = {
    "ssm_cfg": {
        **{"layer": "Mamba1", "d_state": 9, "d_conv": 4, "expand": 2, "headdim": 24, "ngroups": 4},
        **{"norm_before_gate": False, "rmsnorm": False, "bias": False, "conv_bias": True},
        **{"dt_limit": [0.0, 0.5], "d_ssm": 96},
    },
    "attn_cfg": {
        **{"num_heads": 5, "num_heads_kv": 4, "head_dim": 12, "mlp_dim": 600, "d_conv": 0},
        **{"qkv_proj_bias": False, "out_proj_bias": False, "softmax_scale": None, "causal": False},
        **{"rotary_emb_dim": 4, "rotary_emb_base": 300.0},
    },
}
IDLE = {
    "ssm_cfg": {
        **{"chunk_size": 64, "A_init_range": [1, 3], "dt_min": 0.02, "dt_max": 0.5},
        **{"dt_init_floor": 1e-3, "use_mem_eff_path": True, "conv_init": 0.1},
    },
    "attn_cfg": {"rotary_emb_interleaved": False},
}


def cases(table):
    return [
        (f"{outer}.{key}", value) for outer, keys in table.items() for key, value in keys.items()
    ]


@torch.no_grad()
@pytest.mark.parametrize(("key", "value"), cases(MOVES))
def test_argument_moves_the_logits_or_is_refused(made, tmp_path, key, value):
    tiny, _ = made("state_spaces", "every")
    target = changed(tiny.directory, tmp_path / "changed", **{key: value})
    try:
        moved = opened(target)(tiny.ids) - tiny.logits
    except HybridzooError as refused:
        assert str(target) in str(refused) and "\n" not in str(refused)
    else:
        assert moved.abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(("key", "value"), cases(IDLE))
def test_argument_that_computes_nothing_is_ignored(made, tmp_path, key, value):
    tiny, ours = made("state_spaces", "every")
    target = changed(tiny.directory, tmp_path / "changed", **{key: value})
    # another chunk_size rounds the scan otherwise
    torch.testing.assert_close(opened(target)(tiny.ids), ours(tiny.ids), atol=1e-5, rtol=0)


def test_every_argument_is_known_to_move_the_logits_or_not():
    tables = {"ssm_cfg": state_spaces.SSM["Mamba2"], "attn_cfg": state_spaces.ATTENTION}
    for outer, keys in tables.items():
        assert keys.table.keys() <= MOVES[outer].keys() | IDLE[outer].keys()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"ssm_cfg.layer": "Mamba3"},
            r"ssm_cfg: layer: unknown choice \('Mamba3'\).*Mamba1, Mamba2",
        ),
        ({"ssm_cfg.layer": []}, r"ssm_cfg: layer: unknown choice"),
        ({"ssm_cfg.d_ssm": 96}, r"ssm_cfg: d_ssm is set \(96\)"),
        ({"ssm_cfg.D_has_hdim": True}, r"ssm_cfg: D_has_hdim is set \(True\)"),
        ({"ssm_cfg.headim": 18}, r"ssm_cfg: headim is not a key.*did you mean headdim\?"),
        ({"ssm_cfg.d_state": "7"}, r"ssm_cfg: d_state: wrong type"),
        ({"ssm_cfg.expand": 1e300}, r"ssm_cfg: expand: too large"),
        ({"ssm_cfg": []}, r"ssm_cfg: wrong type"),
        ({"attn_cfg.causal": False}, r"attn_cfg: causal is missing or False.*no later token"),
        ({"attn_cfg.rotary_emb_interleaved": True}, r"attn_cfg: rotary_emb_interleaved is set"),
        ({"attn_cfg.rotary_emb_dim": 12}, r"attn_cfg: rotary_emb_dim: \(12\).*head_dim \(10\)"),
        ({"attn_cfg.rotary_emb_dim": 5}, r"rope_fraction.*even"),
        ({"attn_cfg.window": 8}, r"attn_cfg: window is not a key of MHA"),
        ({"attn_cfg": {}}, r"attn_cfg: num_heads is missing"),
        ({"attn_layer_idx": [1, 5]}, r"attn_layer_idx: no such layer \(5\).*\(4\)"),
        ({"pad_vocab_size_multiple": 0}, r"pad_vocab_size_multiple: too small"),
        ({"n_layer": 2**31 - 1}, r"n_layer: too large"),
        ({"d_model": 18 * 2**20, "ssm_cfg.d_ssm": None}, r"more than .* are a typing error"),
        ({"dropout": 0.1}, r"dropout is not a key of state_spaces"),
        ({"tie_embeddings": True}, r"tied weights are one"),
    ],
    ids=str,
)
def test_config_that_cannot_be_read_is_refused(made, tmp_path, keys, said):
    tiny, _ = made("state_spaces", "every")
    target = changed(tiny.directory, tmp_path / "changed", **keys)
    with pytest.raises(HybridzooError, match=said) as refused:
        convert(target, tmp_path / "out", from_pickle=True)
    assert str(target) in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_bamba_of_fms_has_the_published_count(tmp_path):
    """fms-fsdp's mamba_9.8b, which became Bamba-9B (families.md, section 5)."""
    attention = {"causal": True, "d_conv": 0, "head_dim": 128, "num_heads": 32, "num_heads_kv": 8}
    attention |= {"out_proj_bias": False, "qkv_proj_bias": False, "rotary_emb_dim": 64}
    config = {"d_model": 4096, "d_intermediate": 14336, "n_layer": 32, "vocab_size": 128256}
    config |= {"ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [9, 18, 27]}
    config |= {"attn_cfg": attention, "tie_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path).n_params() == 9_780_235_392


def test_stream_is_kept_in_fp32_where_the_file_says_so(made):
    """In fp32 models nothing shows it."""
    assert made("state_spaces", "mamba")[1].config.residual_fp32
    assert not made("state_spaces", "every")[1].config.residual_fp32


def test_weights_are_loaded_only_from_safetensors(made):
    tiny, _ = made("state_spaces", "mamba")
    with pytest.raises(CheckpointError, match=r"only pickled weights.*convert .* --from-pickle"):
        load(tiny.directory)


# --- files


def forgotten(ours):
    """The same model without its source's files."""
    model = HybridLM(ours.config.with_options(source_layout=None), init=False).eval()
    model.load_state_dict(ours.state_dict())
    return model


@torch.no_grad()
@pytest.mark.parametrize("variant", CONFIGS)
def test_new_files_are_read_as_mamba_ssm_reads_them(made, tmp_path, variant):
    tiny, ours = made("state_spaces", variant)
    save(forgotten(ours), tmp_path / "new", layout="state_spaces")
    reference = read(tmp_path / "new")
    torch.testing.assert_close(reference(tiny.ids), tiny.logits, atol=tiny.tolerance, rtol=0)
    again = opened(tmp_path / "new")
    assert torch.equal(again(tiny.ids), ours(tiny.ids))
    # what it now remembers are these files
    save(again, tmp_path / "again", layout="state_spaces")
    assert_same_files(tmp_path / "again", tmp_path / "new")


def test_trained_weights_are_written_into_the_sources_file(made, tmp_path):
    tiny, ours = made("state_spaces", "every")
    model = HybridLM(ours.config, init=False)
    model.load_state_dict({name: t + 1 for name, t in ours.state_dict().items()})
    save(model, tmp_path / "trained", layout="state_spaces")
    before, after = stored(tiny.directory), stored(tmp_path / "trained")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name] + 1) for name in before)
    assert (tmp_path / "trained" / WEIGHTS).stat().st_size == (
        tiny.directory / WEIGHTS
    ).stat().st_size


def test_other_dtype_is_a_new_file_of_the_same_names(made, tmp_path):
    tiny, ours = made("state_spaces", "mamba")
    save(ours, tmp_path / "half", layout="state_spaces", dtype=torch.bfloat16)
    before, after = stored(tiny.directory), stored(tmp_path / "half")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        stays = name.endswith(("A_log", ".D", "dt_proj.bias"))
        assert tensor.dtype == (torch.float32 if stays else torch.bfloat16)
        assert torch.equal(tensor, before[name].to(tensor.dtype))
    assert after["lm_head.weight"].data_ptr() == after["backbone.embedding.weight"].data_ptr()
    config = (tmp_path / "half/config.json").read_text()
    assert json.loads(config) == json.loads((tiny.directory / "config.json").read_text())


@pytest.mark.parametrize("way", ["before zip", "shards"])
def test_file_that_cannot_be_remembered_is_exported_as_mamba_ssm_reads_one(made, tmp_path, way):
    tiny, ours = made("state_spaces", "mamba")
    source = shutil.copytree(tiny.directory, tmp_path / "source")
    weights = stored(source)
    if way == "shards":
        (source / WEIGHTS).unlink()
        head = {"lm_head.weight": weights.pop("lm_head.weight")}
        torch.save(head, source / "pytorch_model-00001-of-00002.bin")
        torch.save(weights, source / "pytorch_model-00002-of-00002.bin")
    else:
        torch.save(weights, source / WEIGHTS, _use_new_zipfile_serialization=False)
    convert(source, tmp_path / "native", from_pickle=True)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "native")(tiny.ids), ours(tiny.ids))
    save(load(tmp_path / "native"), tmp_path / "out", layout="state_spaces")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.json", WEIGHTS}
    reference = read(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(reference(tiny.ids), tiny.logits, atol=tiny.tolerance, rtol=0)
    after = stored(tmp_path / "out")
    assert after["lm_head.weight"].data_ptr() == after["backbone.embedding.weight"].data_ptr()


def test_tied_head_in_bytes_of_its_own_is_read_and_written_again(made, tmp_path):
    tiny, _ = made("state_spaces", "mamba")
    source = shutil.copytree(tiny.directory, tmp_path / "source")
    weights = stored(source)
    weights["lm_head.weight"] = weights["lm_head.weight"].clone()
    torch.save(weights, source / WEIGHTS)
    convert(source, tmp_path / "again", layout="state_spaces", from_pickle=True)
    assert_same_files(tmp_path / "again", source)
    weights["lm_head.weight"][0, 0] += 1
    torch.save(weights, source / WEIGHTS)
    with pytest.raises(CheckpointError, match="tied weights are one"):
        convert(source, tmp_path / "never", from_pickle=True)


def test_untied_parameters_that_share_bytes_are_not_written_into_them(made, tmp_path):
    """A file may share what the config unties; once trained the two differ."""
    tiny, _ = made("state_spaces", "mamba")
    source = changed(tiny.directory, tmp_path / "source", tie_embeddings=False)
    model = opened(source)
    with torch.no_grad():
        model.get_parameter("head.weight").add_(1)
    save(model, tmp_path / "trained", layout="state_spaces")
    weights = stored(tmp_path / "trained")
    assert torch.equal(weights["lm_head.weight"], weights["backbone.embedding.weight"] + 1)


def test_original_config_beside_safetensors_is_loaded_as_it_is(made, tmp_path):
    tiny, ours = made("state_spaces", "mamba")
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(tiny.directory / "config.json", source)
    weights = stored(tiny.directory)
    del weights["lm_head.weight"]
    save_file(weights, source / "model.safetensors")
    model = load(source)
    with torch.no_grad():
        assert torch.equal(model(tiny.ids), ours(tiny.ids))
    save(model, tmp_path / "again", layout="state_spaces")
    assert_same_files(tmp_path / "again", source)


def save_in_two(parallel, native, target):
    save(load(native, parallel=parallel), target)


def test_what_two_ranks_save_becomes_the_sources_file(made, tmp_path):
    # its head is the embedding under a second name: written once, asked for once
    tiny, _ = made("state_spaces", "mamba2attn")
    convert(tiny.directory, tmp_path / "native", from_pickle=True)
    gloo.run(2, save_in_two, tmp_path / "native", tmp_path / "two")
    convert(tmp_path / "two", tmp_path / "again", layout="state_spaces")
    assert_same_files(tmp_path / "again", tiny.directory)


def own(**changes):
    """A model that this package made up."""
    layers = {
        "M": {"kind": "mamba2", "d_state": 8, "head_dim": 16, "chunk_size": 16},
        "A": {"kind": "attention", "n_heads": 4, "n_kv_heads": 2, "rope_fraction": 0.5},
        "F": {"kind": "mlp", "d_ff": 256},
    }
    made = {"d_model": 32, "vocab_size": 50, "pattern": "MF AF 2(MF)", "eos_token_id": 3}
    return {**made, "layers": layers, **changes}


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"vocab_size": 56, "tie_embeddings": False, "norm": "layer_norm", "residual_fp32": True},
        {"pattern": "M A 2M"},
        {"pattern": "A"},
        {"pattern": "2(MF)", "layers": own()["layers"] | {"M": {"kind": "mamba1", "d_inner": 40}}},
    ],
    ids=["plain", "others", "without mlp", "attention", "mamba1"],
)
def test_own_model_is_exported_and_reads_back(tmp_path, changes):
    torch.manual_seed(0)
    config = own(**changes)
    used = {letter: e for letter, e in config["layers"].items() if letter in config["pattern"]}
    model = HybridLM(HybridConfig.from_dict({**config, "layers": used})).eval()
    save(model, tmp_path, layout="state_spaces")
    reference, ids = read(tmp_path), IDS % 50
    # both in fp32, logits below 1 at this initialisation
    torch.testing.assert_close(reference(ids), model(ids), atol=1e-5, rtol=0)
    assert torch.equal(opened(tmp_path)(ids), model(ids))
    multiple = json.loads((tmp_path / "config.json").read_text())["pad_vocab_size_multiple"]
    assert multiple == (1 if model.config.vocab_size == 50 else 8)


def layer(letter, **options):
    entries = own()["layers"]
    return {"layers": {**entries, letter: {**entries[letter], **options}}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pattern": "[MA]F MF"}, r"cannot express the pattern"),
        ({"pattern": "FM"}, r"cannot express pattern"),
        ({"pattern": "MF M"}, r"cannot express pattern"),
        ({"pattern": "F"}, r"cannot express the pattern"),
        ({"norm_eps": 1e-6}, r"norm_eps"),
        ({"logits_multiplier": 2.0}, r"logits_multiplier"),
        (layer("F", d_ff=200), r"d_ff"),
        (layer("F", bias=True), r"bias"),
        (layer("F", activation="gelu"), r"activation"),
        (layer("M", d_inner=48), r"cannot express d_inner \(48\)"),
        (layer("M", in_proj_bias=True), r"out_proj_bias"),
        (layer("A", window_size=4), r"window_size"),
        (layer("A", parallel_d_ff=100), r"parallel_d_ff"),
    ],
    ids=str,
)
def test_model_that_the_keys_cannot_say_is_refused(tmp_path, changes, said):
    config = own(**changes)
    used = {letter: e for letter, e in config["layers"].items() if letter in config["pattern"]}
    model = HybridLM(HybridConfig.from_dict({**config, "layers": used}), device="meta")
    with pytest.raises(CheckpointError, match=f"state_spaces: .*{said}.*native layout"):
        save(model, tmp_path, layout="state_spaces")
    assert not list(tmp_path.iterdir())


# --- a padded vocabulary


@torch.no_grad()
@pytest.mark.parametrize("variant", ["mamba", "every"], ids=["tied", "untied"])
def test_unpadded_rows_are_left_out(made, tmp_path, variant):
    tiny, ours = made("state_spaces", variant)
    n = CONFIGS[variant]["vocab_size"]
    assert ours.config.vocab_size == VOCAB > n
    source = shutil.copytree(tiny.directory, tmp_path / "source")
    weights = stored(source)
    for name in ("backbone.embedding.weight", "lm_head.weight"):
        # whatever these hold, nobody reads it
        weights[name][n:] = torch.nan
    torch.save(weights, source / WEIGHTS)
    config = convert(source, tmp_path / "native", from_pickle=True, unpad_vocab=True)
    model, ids = load(tmp_path / "native"), tiny.ids % n
    assert config.vocab_size == model.config.vocab_size == n and config.source_layout is None
    assert ours.config.n_params() - config.n_params() == (VOCAB - n) * config.d_model * (
        1 if config.tie_embeddings else 2
    )
    # the same numbers in another product of matrices
    torch.testing.assert_close(model(ids), ours(ids)[..., :n], atol=1e-5, rtol=0)
    save(model, tmp_path / "again", layout="state_spaces")
    torch.testing.assert_close(
        read(tmp_path / "again")(ids), ours(ids)[..., :n], atol=tiny.tolerance, rtol=0
    )


def test_padding_is_left_out_of_our_own_directory_too(made, tmp_path):
    tiny, ours = made("state_spaces", "every")
    convert(tiny.directory, tmp_path / "native", from_pickle=True)
    convert(tiny.directory, tmp_path / "direct", from_pickle=True, unpad_vocab=True)
    convert(tmp_path / "native", tmp_path / "later", unpad_vocab=True)
    assert_same_files(tmp_path / "later", tmp_path / "direct")
    assert torch.equal(
        load(tmp_path / "later").get_parameter("embed.weight"),
        ours.get_parameter("embed.weight")[:113],
    )


@pytest.mark.parametrize("layout", ["state_spaces", "mamba"])
def test_vocabulary_without_padding_is_not_unpadded(made, tmp_path, layout):
    tiny, _ = made(layout, "fms" if layout == "state_spaces" else "plain")
    with pytest.raises(CheckpointError, match=r"no padded vocabulary \(128 rows\).*--unpad-vocab"):
        convert(
            tiny.directory,
            tmp_path / "out",
            from_pickle=layout == "state_spaces",
            unpad_vocab=True,
        )
    assert not (tmp_path / "out").exists()


def test_families_are_translated_into_each_other(made, tmp_path):
    """The original files as transformers' and back: all but the tokens that end a text."""
    tiny, _ = made("state_spaces", "mamba2")
    convert(tiny.directory, tmp_path / "hf", layout="mamba2", from_pickle=True)
    model = Mamba2ForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(tiny.ids).logits, tiny.logits, atol=tiny.tolerance, rtol=0)
    convert(tmp_path / "hf", tmp_path / "back", layout="state_spaces")
    weights = stored(tmp_path / "back")
    assert all(torch.equal(weights[name], t) for name, t in stored(tiny.directory).items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.update(texts={}), "no config.json that is an object"),
        (lambda s: s["texts"].update({"config.json": "[]"}), "no config.json that is an object"),
        (lambda s: s["texts"].update({"config.json": 7}), "no config.json that is an object"),
        (lambda s: s["texts"].update({"config.json": "{}", "x": "\ud800"}), "cannot be written"),
        (lambda s: s["files"][0].update(frame=[]), "frame"),
        (lambda s: s["files"][0]["frame"].pop("rest"), "rest is missing"),
        (lambda s: s["files"][0]["frame"].update(rest=3), "rest: wrong type"),
        (lambda s: s["files"][0]["frame"]["starts"].update({"lm_head.weight": 2**70}), "frame"),
    ],
)
def test_what_was_recorded_is_not_trusted(made, tmp_path, change, said):
    tiny, _ = made("state_spaces", "every")
    convert(tiny.directory, tmp_path / "native", from_pickle=True)

    def edit(config):
        change(config["source_layout"])
        return config

    edit_config(tmp_path / "native", edit)
    with pytest.raises(HybridzooError, match=said) as refused:
        convert(tmp_path / "native", tmp_path / "out", layout="state_spaces")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
