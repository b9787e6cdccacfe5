"""Jamba: the function of transformers' own class, and the same bytes on export."""

import hashlib
import json
import shutil

import pytest
import torch
from transformers import JambaForCausalLM

from hybridzoo.checkpoint import convert, load, open_source, save
from hybridzoo.config import HybridConfig
from hybridzoo.errors import CheckpointError, ConfigError, HybridzooError
from hybridzoo.model import HybridLM
from tests import families

REPO = families.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Builds each variant once: name -> (reference, ours)."""
    cache = {}

    def make(variant):
        if variant not in cache:
            tiny = families.tiny_jamba(variant, tmp_path_factory.mktemp(variant))
            cache[variant] = tiny, load(tiny.directory).eval()
        return cache[variant]

    return make


@pytest.fixture(params=families.JAMBA)
def pair(request, made):
    return made(request.param)


def test_logits_are_transformers(pair):
    tiny, ours = pair
    with torch.no_grad():
        got = ours(tiny.ids)
    torch.testing.assert_close(got, tiny.logits, atol=tiny.tolerance, rtol=0)


@torch.no_grad()
def test_greedy_ids_are_transformers(pair):
    tiny, ours = pair
    ids = tiny.ids
    for _ in range(families.N_GREEDY):
        ids = torch.cat([ids, ours(ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(ids[:, families.LENGTH :], tiny.greedy)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [(1,) * families.LENGTH, (8, 8, 5)], ids=["tokens", "chunks"])
def test_states_continue_the_sequence(pair, chunks):
    tiny, ours = pair
    state = ours.init_state(2, families.LENGTH)
    got = torch.cat([ours(part, state=state) for part in tiny.ids.split(chunks, 1)], 1)
    torch.testing.assert_close(got, tiny.logits, atol=tiny.tolerance, rtol=0)


@torch.no_grad()
def test_left_padded_rows_are_the_rows_alone(pair):
    # the reference's own padded batches leak where in_proj has a bias, so each row is run alone.
    tiny, ours = pair
    alone = families.full(tiny.model, tiny.ids[1:, 6:])
    ids, mask = tiny.ids.clone(), torch.ones_like(tiny.ids)
    ids[1, :6], mask[1, :6] = 0, 0
    got = ours(ids, attention_mask=mask)
    torch.testing.assert_close(got[1:, 6:], alone, atol=tiny.tolerance, rtol=0)
    torch.testing.assert_close(got[:1], tiny.logits[:1], atol=tiny.tolerance, rtol=0)


def test_parameters_are_counted_like_transformers(pair):
    tiny, ours = pair
    assert ours.config.n_params() == sum(p.numel() for p in tiny.model.parameters())


def hashes(directory):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


@pytest.mark.parametrize("way", ["save", "convert", "through native"])
def test_export_is_the_same_files_byte_for_byte(pair, way, tmp_path):
    tiny, ours = pair
    target = tmp_path / "export"
    if way == "save":
        save(ours, target, layout="jamba")
    elif way == "convert":
        convert(tiny.directory, target, layout="jamba")
    else:
        convert(tiny.directory, tmp_path / "native")
        save(load(tmp_path / "native"), target, layout="jamba")
    assert hashes(target) == hashes(tiny.directory)


def test_native_directory_computes_the_same(pair, tmp_path):
    tiny, ours = pair
    save(ours, tmp_path, max_shard_bytes=100_000)
    again = load(tmp_path).eval()
    assert again.config == ours.config
    with torch.no_grad():
        assert torch.equal(again(tiny.ids), ours(tiny.ids))


@pytest.mark.parametrize("variant", sorted(families.JAMBA.keys() - families.NOT_RELOADABLE))
def test_transformers_reads_the_newest_dialect(made, variant, tmp_path):
    """Without source_layout nothing is remembered: every file is ours."""
    tiny, ours = made(variant)
    fresh = HybridLM(ours.config.with_options(source_layout=None), init=False)
    fresh.load_state_dict(ours.state_dict())
    save(fresh, tmp_path, layout="jamba", max_shard_bytes=150_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    theirs, notes = JambaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(notes.values()), notes
    got = families.full(theirs.eval(), tiny.ids)
    torch.testing.assert_close(got, tiny.logits, atol=tiny.tolerance, rtol=0)


def test_own_pattern_exports_and_reads_back(tmp_path):
    config = HybridConfig.load(REPO / "configs/jamba-v0.1.yaml").to_dict()
    layers = {
        "M": {**config["layers"]["M"], "d_state": 4},
        "A": {**config["layers"]["A"], "n_heads": 2, "n_kv_heads": 1},
        "F": {**config["layers"]["F"], "d_ff": 12},
        "E": {**config["layers"]["E"], "d_ff": 12, "n_experts": 3},
    }
    config |= {"d_model": 32, "vocab_size": 50, "pattern": "MF ME AF ME", "layers": layers}
    model = HybridLM(HybridConfig.from_dict(config)).eval()
    save(model, tmp_path, layout="jamba")
    theirs = JambaForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(1, 22)[None]
    with torch.no_grad():
        # both in fp32, logits below 0.1 at this initialisation: 1e-5 is a hundred roundings of the
        # largest.
        torch.testing.assert_close(model(ids), families.full(theirs, ids), atol=1e-5, rtol=0)


def test_v01_has_the_published_counts():
    config = HybridConfig.load(REPO / "configs/jamba-v0.1.yaml")
    assert config.n_params() == 51_570_323_328
    assert config.n_active_params() == 12_110_311_296


def test_bf16_file_keeps_each_tensors_dtype(made, tmp_path):
    tiny, _ = made("moe")
    source = tmp_path / "bf16"
    shutil.copytree(tiny.directory, source)
    weights = families.load_file(source / "model.safetensors")
    half = {n: t if n.endswith("A_log") else t.bfloat16() for n, t in weights.items()}
    families.save_file(half, source / "model.safetensors", {"format": "pt"})
    model = load(source)
    for name, p in model.config.params():
        stays = torch.float32 if p.fp32 else torch.bfloat16
        assert model.get_parameter(name).dtype == stays, name
    save(load(source, dtype=torch.float32), tmp_path / "export", layout="jamba")
    assert hashes(tmp_path / "export") == hashes(source)
    save(model, tmp_path / "wide", layout="jamba", dtype=torch.float32)
    assert json.loads((tmp_path / "wide/config.json").read_text())["dtype"] == "float32"
    wide = families.load_file(tmp_path / "wide/model.safetensors")
    assert all(
        torch.equal(t, half[n].float()) and t.dtype == torch.float32 for n, t in wide.items()
    )


def test_tied_head_written_out_is_read_and_written_again(made, tmp_path):
    tiny, ours = made("tied")
    source = tmp_path / "copy"
    shutil.copytree(tiny.directory, source)
    weights = families.load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    families.save_file(weights, source / "model.safetensors", {"format": "pt"})
    model = load(source)
    assert model.config.n_params() == ours.config.n_params()
    save(model, tmp_path / "export", layout="jamba")
    assert hashes(tmp_path / "export") == hashes(source)
    weights["lm_head.weight"][0, 0] += 1
    families.save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="tied weights are one"):
        load(source)


def changed(tiny, target, **keys):
    shutil.copytree(tiny.directory, target)
    families.edit_config(target, lambda config: config | keys)
    return target


@pytest.mark.parametrize(
    ("variant", "keys"),
    [
        ("moe", {"rms_norm_eps": 2e-2}),
        ("moe", {"num_experts_per_tok": 2}),
        ("moe", {"num_attention_heads": 4, "num_key_value_heads": 1}),
        ("moe", {"hidden_act": "silu"}),
        ("attention_only", {"hidden_act": "silu"}),
    ],
    ids=str,
)
def test_key_that_fits_the_shapes_moves_the_logits(made, variant, keys, tmp_path):
    """Negative control: the comparison with the reference would see these keys read wrongly."""
    tiny, _ = made(variant)
    with torch.no_grad():
        moved = load(changed(tiny, tmp_path / "changed", **keys)).eval()(tiny.ids) - tiny.logits
    assert moved.abs().max() > 1e-3


@pytest.mark.parametrize(
    "keys",
    [
        {"vocab_size": 127},
        {"hidden_size": 128},
        {"intermediate_size": 41},
        {"num_hidden_layers": 5},
        {"num_hidden_layers": 7},
        {"num_attention_heads": 16},
        {"num_key_value_heads": 4},
        {"attn_layer_period": 4},
        {"attn_layer_offset": 2},
        {"expert_layer_period": 4},
        {"expert_layer_offset": 1},
        {"num_experts": 4},
        {"num_experts": 6},
        {"num_experts": 1},
        {"mamba_d_state": 8},
        {"mamba_d_conv": 4},
        {"mamba_expand": 2},
        {"mamba_dt_rank": 6},
        {"mamba_dt_rank": "auto"},
        {"mamba_conv_bias": True},
        {"mamba_proj_bias": False},
        {"mamba_inner_layernorms": False},
        {"tie_word_embeddings": False},
        {"hidden_act": "softplus"},
        {"attn_layer_offset": 3},
        {"num_experts_per_tok": 9},
        {"rms_norm_eps": "1e-6"},
        {"sliding_window": 8},
        {"quantization_config": {"bits": 4}},
        {"mamba_dt_ranks": 5},
        {"head_dim": 5},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 2**31 - 1},
        {"num_experts": 2**31 - 1},
        {"layers_block_type": ["mamba"] * 6},
    ],
    ids=str,
)
def test_key_that_contradicts_the_tensors_is_refused(made, keys, tmp_path):
    tiny, _ = made("moe")
    with pytest.raises(HybridzooError) as refused:
        open_source(changed(tiny, tmp_path / "changed", **keys))
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"use_cache": False},
        {"initializer_range": 9.0},
        {"max_position_embeddings": 1},
        {"use_mambapy": True},
        {"num_logits_to_keep": 3},
        {"layers_block_type": ["mamba", "attention", "mamba"] * 2},
        {"layer_types": ["linear_attention", "full_attention", "linear_attention"] * 2},
    ],
    ids=str,
)
def test_key_that_computes_nothing_is_ignored(made, keys, tmp_path):
    tiny, ours = made("moe")
    with torch.no_grad():
        assert torch.equal(
            load(changed(tiny, tmp_path / "changed", **keys)).eval()(tiny.ids), ours(tiny.ids)
        )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pattern": "MF MM AE"}, "pattern"),
        ({"pattern": "MF M AE"}, "pattern"),
        ({"pattern": "MF AF AF MF"}, "once in a fixed period"),
        ({"embedding_multiplier": 2.0}, "embedding_multiplier"),
        ({"norm_eps": 1e-4}, "norm_eps"),
    ],
)
def test_config_that_jamba_cannot_say_is_refused(made, change, said, tmp_path):
    _, ours = made("moe")
    model = HybridLM(ours.config.with_options(source_layout=None, **change), device="meta")
    with pytest.raises(CheckpointError, match=said):
        save(model, tmp_path, layout="jamba")
    assert not list(tmp_path.iterdir())


def test_missing_and_unexpected_tensors_are_named(made, tmp_path):
    tiny, _ = made("dense")
    for rename, said in (
        (lambda n: n.replace("0.mamba.D", "0.mamba.E"), r"model.layers.0.mamba.D is missing"),
        (lambda n: n, None),
    ):
        target = tmp_path / str(bool(said))
        shutil.copytree(tiny.directory, target)
        families.rename_tensors(target, rename)
        if said:
            with pytest.raises(CheckpointError, match=said):
                load(target)
    weights = families.load_file(target / "model.safetensors")
    extra = weights | {"model.layers.0.mamba.extra": torch.ones(1)}
    families.save_file(extra, target / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"mamba.extra is not in the config"):
        load(target)


def test_pickled_weights_are_converted_only_when_asked(made, tmp_path):
    tiny, ours = made("dense")
    source = tmp_path / "pickled"
    shutil.copytree(tiny.directory, source)
    weights = families.load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(weights, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="--from-pickle"):
        load(source)
    convert(source, tmp_path / "native", from_pickle=True)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "native").eval()(tiny.ids), ours(tiny.ids))


def test_pickle_of_the_first_torches_is_converted(made, tmp_path):
    tiny, ours = made("dense")
    source = tmp_path / "pickled"
    shutil.copytree(tiny.directory, source)
    weights = families.load_file(source / "model.safetensors")
    path = source / "pytorch_model.bin"
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    convert(source, tmp_path / "native", from_pickle=True)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "native").eval()(tiny.ids), ours(tiny.ids))


BAD_PICKLES = {
    "empty": b"",
    "junk": b"junk" * 50,
    "code": b"cos\nsystem\n(S'touch run'\ntR.",
    "number": {3: torch.ones(2)},
    "sparse": {"a": torch.eye(3).to_sparse()},
}


@pytest.mark.parametrize("case", BAD_PICKLES)
def test_pickle_of_anything_but_dense_tensors_is_refused(made, tmp_path, monkeypatch, case):
    tiny, _ = made("dense")
    shutil.copy(tiny.directory / "config.json", tmp_path)
    monkeypatch.chdir(tmp_path)
    content, path = BAD_PICKLES[case], tmp_path / "pytorch_model.bin"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: not a .*tensors"):
        convert(tmp_path, tmp_path / "out", from_pickle=True)
    assert not (tmp_path / "run").exists()


def test_unknown_family_is_refused_with_the_known_ones(made, tmp_path):
    tiny, _ = made("dense")
    with pytest.raises(CheckpointError, match=r"'jambaa'.*did you mean jamba\?.*hybridzoo, jamba"):
        load(changed(tiny, tmp_path / "changed", model_type="jambaa"))


def test_native_config_mistake_names_the_file(made, tmp_path):
    _, ours = made("dense")
    save(ours, tmp_path)
    families.edit_config(tmp_path, lambda config: config | {"d_modle": 3})
    with pytest.raises(ConfigError, match=r"config.json: d_modle is not a key.*d_model"):
        load(tmp_path)


def test_unusual_spelling_of_header_index_and_config_is_kept(made, tmp_path):
    tiny, _ = made("sharded")
    source = tmp_path / "odd"
    shutil.copytree(tiny.directory, source)
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps(json.loads(index.read_text()), indent=4))
    config = source / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text())))
    for path in source.glob("*.safetensors"):
        raw = path.read_bytes()
        n = int.from_bytes(raw[:8], "little")
        header = json.dumps(json.loads(raw[8 : 8 + n]), sort_keys=True).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + n :])
    save(load(source), tmp_path / "export", layout="jamba")
    assert hashes(tmp_path / "export") == hashes(source)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("files"), "files is missing"),
        (lambda s: s.update(files=3), "files: wrong type"),
        (lambda s: s["files"][0].pop("header"), "header is missing"),
        (lambda s: s["files"][0]["tensors"].update({"lm_head.weight": "F4"}), "unknown dtype"),
        (lambda s: s["files"][0].update(file="../model.safetensors"), "illegal file name"),
        (lambda s: s["texts"].update({"../evil": ""}), "illegal file name"),
    ],
)
def test_source_layout_is_not_trusted(made, change, said, tmp_path):
    tiny, _ = made("dense")
    convert(tiny.directory, tmp_path / "native")

    def edit(config):
        change(config["source_layout"])
        return config

    families.edit_config(tmp_path / "native", edit)
    with pytest.raises(HybridzooError, match=said):
        convert(tmp_path / "native", tmp_path / "export", layout="jamba")
    assert not (tmp_path / "evil").exists()


def test_changed_architecture_is_written_in_the_newest_dialect(made, tmp_path):
    """The files that the source had no longer fit; remembering them would lose the change."""
    tiny, ours = made("legacy")
    changed = HybridLM(ours.config.with_options(tie_embeddings=True), init=False)
    changed.load_state_dict(ours.state_dict() | {"head.weight": ours.embed.weight})
    save(changed, tmp_path, layout="jamba")
    theirs = JambaForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        got, want = changed.eval()(tiny.ids), families.full(theirs, tiny.ids)
    torch.testing.assert_close(got, want, atol=tiny.tolerance, rtol=0)
