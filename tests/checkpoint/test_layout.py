"""Parameters to files and back: every kind, cut and rank; mismatches are refused at once."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybridzoo.checkpoint import convert, load, open_source, read_config, reader, save
from hybridzoo.checkpoint.convert.base import compact
from hybridzoo.config import HybridConfig
from hybridzoo.errors import CheckpointError
from hybridzoo.model import HybridLM
from hybridzoo.pattern import Pattern
from tests import families, gloo
from tests.families.base import edit_config

IDS = torch.arange(24).view(2, 12) % 29


def test_native_config_is_strict_json(tmp_path):
    limited = {"kind": "mamba2", "d_state": 4, "head_dim": 4, "dt_limit": [0.1, float("inf")]}
    options = {"d_model": 16, "vocab_size": 29, "pattern": "M", "layers": {"M": limited}}
    config = HybridConfig.from_dict(options)
    save(HybridLM(config), tmp_path)

    def refuse(word):
        raise AssertionError(word)

    json.loads((tmp_path / "config.json").read_text(), parse_constant=refuse)
    assert read_config(tmp_path) == config


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8, torch.float8_e4m3fn])
def test_dtype_no_weight_has_is_refused(tmp_path, dtype):
    with pytest.raises(CheckpointError, match=r"dtype: not a weight's"):
        load(tmp_path, dtype=dtype)


def config():
    """Every kind, a parallel place, shared weights, one place that differs, heads to share."""
    return HybridConfig.from_dict(
        {
            "d_model": 16,
            "vocab_size": 29,
            "pattern": "MF SE [AS]F MW W",
            "layers": {
                "M": {"kind": "mamba1", "d_inner": 24, "in_proj_bias": True, "x_norm": "learned"},
                "S": {"kind": "mamba2", "d_state": 4, "head_dim": 4, "n_groups": 1},
                "A": {"kind": "attention", "n_heads": 4, "n_kv_heads": 1, "qkv_bias": True},
                "F": {"kind": "mlp", "d_ff": 12, "bias": True},
                "E": {
                    "kind": "moe",
                    "d_ff": 8,
                    "n_experts": 3,
                    "top_k": 2,
                    "correction_bias": True,
                },
                "W": {"shared": "tail"},
            },
            "layers_at": {1: {"d_ff": 20}},
            "shared": {"tail": {"kind": "mlp", "d_ff": 8}},
            "tie_embeddings": False,
        }
    )


def model(seed=3, dtype=None, **changes):
    """Random weights in which no two elements are alike."""
    made = HybridLM(config().with_options(**changes), dtype=dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return made


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 3000], ids=["single", "shards"])
def test_saved_model_loads_equal(tmp_path, tied, max_shard_bytes):
    one = model(tie_embeddings=tied)
    save(one, tmp_path, max_shard_bytes=max_shard_bytes)
    two = load(tmp_path)
    assert two.config == one.config == read_config(tmp_path)
    for (name, p), (other, q) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert name == other and torch.equal(p, q) and p.dtype == q.dtype
    assert torch.equal(one(IDS), two.eval()(IDS))
    files = [load_file(p) for p in tmp_path.glob("*.safetensors")]
    stored = [name for file in files for name in file]
    assert sorted(stored) == sorted(name for name, _ in one.config.params())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_none_keeps_what_is_stored(tmp_path, dtype):
    one = model(dtype=dtype)
    save(one, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype)[6:]
    two = load(tmp_path)
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert p.dtype == q.dtype and torch.equal(p, q), name
    fp32 = {q.dtype for name, q in two.named_parameters() if name.endswith(("A_log", "dt_bias"))}
    assert fp32 == {torch.promote_types(dtype, torch.float32)}


def test_dtype_casts_all_but_the_fp32_parameters(tmp_path):
    one = model()
    save(one, tmp_path / "half", dtype=torch.bfloat16)
    cast = load(tmp_path / "half", dtype=torch.float32)
    save(one, tmp_path / "full")
    asked = load(tmp_path / "full", dtype=torch.bfloat16)
    for name, p in one.config.params():
        full, half = one.get_parameter(name), asked.get_parameter(name)
        assert half.dtype == (torch.float32 if p.fp32 else torch.bfloat16)
        assert torch.equal(half, full.to(half.dtype))
        assert torch.equal(cast.get_parameter(name), half.float())


@pytest.mark.parametrize("n_before", [0, 1, 2], ids="before shard {}".format)
def test_load_during_a_save_is_all_of_the_new_checkpoint(tmp_path, monkeypatch, n_before):
    """Shards are opened one by one: a save between two of them must not mix two checkpoints."""
    save(model(1), tmp_path, max_shard_bytes=5000)
    open_shard, n_opened = reader.open_shard, 0

    def disturbed(path):
        nonlocal n_opened
        if n_opened == n_before:
            save(model(2), tmp_path, max_shard_bytes=5000)
        n_opened += 1
        return open_shard(path)

    monkeypatch.setattr(reader, "open_shard", disturbed)
    loaded, new = load(tmp_path).state_dict(), model(2).state_dict()
    assert n_opened > n_before + 2
    assert all(torch.equal(loaded[name], new[name]) for name in new)


def test_reader_gives_up_where_files_never_rest(tmp_path, monkeypatch):
    save(model(), tmp_path)
    open_shard = reader.open_shard

    def disturbed(path):
        (tmp_path / "log.txt").write_text("x")
        (tmp_path / "log.txt").rename(tmp_path / f"{len(list(tmp_path.iterdir()))}.txt")
        return open_shard(path)

    monkeypatch.setattr(reader, "open_shard", disturbed)
    with pytest.raises(CheckpointError, match="changed in each of 100 attempts"):
        load(tmp_path)


def rank_loads(parallel, directory, target):
    """One rank's logits from a directory; then every rank saves, rank 0 writing."""
    one = load(directory, parallel=parallel).eval()
    save(one, target)
    if "jamba" in str(directory):
        save(one, f"{target}-jamba", layout="jamba")
    with torch.no_grad():
        return one(IDS), {n: tuple(p.shape) for n, p in one.named_parameters()}


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_load_their_cuts_and_save_the_whole(tmp_path, world):
    one = model()
    save(one, tmp_path / "source", max_shard_bytes=3000)
    ranks = gloo.run(world, rank_loads, tmp_path / "source", tmp_path / "target")
    with torch.no_grad():
        want = one(IDS)
    for logits, shapes in ranks:
        # fp32 sums of at most 24 terms in another order: a few roundings of logits near 5.
        torch.testing.assert_close(logits, want, atol=3e-5, rtol=0)
        assert shapes["blocks.0.layer.in_proj.weight"] == (48 // world, 16)
    again = load(tmp_path / "target")
    for name, p in one.named_parameters():
        assert torch.equal(again.get_parameter(name), p), name


def test_ranks_read_slices_of_a_family(tmp_path):
    tiny = families.tiny("jamba", "sharded", tmp_path / "jamba")
    one = load(tiny.directory).eval()
    ranks = gloo.run(2, rank_loads, tiny.directory, tmp_path / "target")
    with torch.no_grad():
        want = one(IDS)
    for logits, shapes in ranks:
        torch.testing.assert_close(logits, want, atol=tiny.tolerance, rtol=0)
        assert shapes["blocks.3.layer.expert_up_weight"] == (4, 72, 64)
    for path in tiny.directory.iterdir():
        assert path.read_bytes() == (tmp_path / "target-jamba" / path.name).read_bytes(), path.name


def test_mismatch_is_refused_before_memory_is_taken(tmp_path, monkeypatch):
    save(model(), tmp_path)
    edit_config(tmp_path, lambda c: c | {"vocab_size": 31})

    def no_memory(*args, **kwargs):
        raise AssertionError("a model was built")

    monkeypatch.setattr("hybridzoo.checkpoint.HybridLM", no_memory)
    with pytest.raises(
        CheckpointError, match=r"embed.weight is \(29, 16\), the config wants \(31, 16\)"
    ):
        load(tmp_path)


def test_integer_weights_are_refused(tmp_path):
    save(model(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["norm.weight"] = weights["norm.weight"].to(torch.int8)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"norm.weight is I8; weights are one of F64, F32, F16, BF16"
    ):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_dtype_of_no_weight_is_not_saved(tmp_path, dtype):
    with pytest.raises(
        CheckpointError, match=r"dtype: not a weight's \(torch.*F64, F32, F16, BF16"
    ):
        save(model(), tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_wider_weights_among_narrow_ones_are_announced(tmp_path):
    save(model(dtype=torch.bfloat16), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["norm.weight"] = weights["norm.weight"].float()
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=r"norm.weight .*float32 but loaded as .*bfloat16"):
        assert load(tmp_path).norm.weight.dtype == torch.bfloat16


def test_tokenizer_is_put_under_the_configs_name(tmp_path):
    (tmp_path / "some.json").write_text("{}")
    save(model(tokenizer="tok.json"), tmp_path / "out", tokenizer=tmp_path / "some.json")
    assert (tmp_path / "out" / "tok.json").read_text() == "{}"
    convert(tmp_path / "out", tmp_path / "again")
    assert (tmp_path / "again" / "tok.json").read_text() == "{}"
    with pytest.raises(CheckpointError, match="the model reads bytes"):
        save(model(), tmp_path / "bytes", tokenizer=tmp_path / "some.json")


def test_convert_refuses_its_own_source(tmp_path):
    save(model(), tmp_path)
    with pytest.raises(CheckpointError, match="one directory"):
        convert(tmp_path, tmp_path / ".")


def test_source_of_a_missing_config_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"config.json: missing"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("groups", "text"),
    [
        (["MF", "ME", "MF", "ME", "AF", "ME", "MF", "ME"] * 4, "4(MF ME MF ME AF ME MF ME)"),
        ((["MF"] * 7 + ["AF"] + ["MF"] * 6) * 2, "2(7(MF) AF 6(MF))"),
        (["M"] * 48, "48M"),
        (["AF"], "AF"),
        (["MF", "AF", "MF"], "MF AF MF"),
    ],
)
def test_pattern_is_compacted_and_means_the_same(groups, text):
    assert compact(groups) == text
    assert "".join("".join(p) for p in Pattern.parse(text).places) == "".join(groups)
