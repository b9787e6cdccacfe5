"""Any published directory: names, pickles, spellings and remembered files. Jamba's serve here."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybridzoo.checkpoint import convert, load, recorded, save
from hybridzoo.errors import CheckpointError, ConfigError, HybridzooError
from tests.checkpoint.test_families import hashes
from tests.families.base import edit_config, is_pickled, rename_tensors


def test_missing_and_unexpected_tensors_are_named(made, tmp_path):
    tiny, _ = made("jamba", "dense")
    for rename, said in (
        (lambda n: n.replace("0.mamba.D", "0.mamba.E"), r"model.layers.0.mamba.D is missing"),
        (lambda n: n, None),
    ):
        target = tmp_path / str(bool(said))
        shutil.copytree(tiny.directory, target)
        rename_tensors(target, rename)
        if said:
            with pytest.raises(CheckpointError, match=said):
                load(target)
    weights = load_file(target / "model.safetensors")
    extra = weights | {"model.layers.0.mamba.extra": torch.ones(1)}
    save_file(extra, target / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"mamba.extra is not in the config"):
        load(target)


def test_pickled_weights_are_converted_only_when_asked(made, tmp_path):
    tiny, ours = made("jamba", "dense")
    source = tmp_path / "pickled"
    shutil.copytree(tiny.directory, source)
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(weights, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="--from-pickle"):
        load(source)
    convert(source, tmp_path / "native", from_pickle=True)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "native").eval()(tiny.ids), ours(tiny.ids))


def test_index_of_other_weights_beside_pickles_is_not_written_back(made, tmp_path):
    tiny, ours = made("mamba", "sharded")
    source = tmp_path / "both"
    shutil.copytree(tiny.directory, source)
    shards = [load_file(path) for path in sorted(source.glob("*.safetensors"))]
    assert len(shards) > 1
    torch.save({n: t for shard in shards for n, t in shard.items()}, source / "pytorch_model.bin")
    convert(source, tmp_path / "out", layout="mamba", from_pickle=True)
    assert [p.name for p in tmp_path.glob("out/model*")] == ["model.safetensors"]
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out")(tiny.ids), ours(tiny.ids))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_config_that_only_python_can_read_is_refused(made, tmp_path, encoding):
    tiny, _ = made("mamba", "plain")
    target = tmp_path / "copy"
    shutil.copytree(tiny.directory, target)
    path = target / "config.json"
    path.write_bytes(path.read_text().encode(encoding))
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON \(.*Download it again"):
        convert(target, tmp_path / "out", layout="mamba")


def test_pickle_of_the_first_torches_is_converted(made, tmp_path):
    tiny, ours = made("jamba", "dense")
    source = tmp_path / "pickled"
    shutil.copytree(tiny.directory, source)
    weights = load_file(source / "model.safetensors")
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
    tiny, _ = made("jamba", "dense")
    shutil.copy(tiny.directory / "config.json", tmp_path)
    monkeypatch.chdir(tmp_path)
    content, path = BAD_PICKLES[case], tmp_path / "pytorch_model.bin"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: not a .*tensors"):
        convert(tmp_path, tmp_path / "out", from_pickle=True)
    assert not (tmp_path / "run").exists()


def test_unknown_family_is_refused_with_the_known_ones(made, tmp_path):
    tiny, _ = made("jamba", "dense")
    with pytest.raises(
        CheckpointError, match=r"'jambaa'.*did you mean jamba\?.*hybridzoo, falcon_mamba, jamba"
    ):
        load(tiny.edited(tmp_path / "changed", model_type="jambaa"))


def test_native_config_mistake_names_the_file(made, tmp_path):
    _, ours = made("jamba", "dense")
    save(ours, tmp_path)
    edit_config(tmp_path, lambda config: config | {"d_modle": 3})
    with pytest.raises(ConfigError, match=r"config.json: d_modle is not a key.*d_model"):
        load(tmp_path)


def test_unusual_spelling_of_header_index_and_config_is_kept(made, tmp_path):
    tiny, _ = made("jamba", "sharded")
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
    tiny, _ = made("jamba", "dense")
    convert(tiny.directory, tmp_path / "native")

    def edit(config):
        change(config["source_layout"])
        return config

    edit_config(tmp_path / "native", edit)
    with pytest.raises(HybridzooError, match=said):
        convert(tmp_path / "native", tmp_path / "export", layout="jamba")
    assert not (tmp_path / "evil").exists()


NEST = "[" * 600 + "]" * 600
FORGOTTEN = r"does not fit into config\.json .*; an export will not be byte-identical\.$"


@torch.no_grad()
@pytest.mark.parametrize(("layout", "variant"), [("jamba", "sharded"), ("state_spaces", "mamba")])
def test_source_layout_without_room_is_not_recorded(made, layout, variant, tmp_path, monkeypatch):
    tiny, ours = made(layout, variant)
    from_pickle = is_pickled(tiny.directory)

    def converted(room):
        monkeypatch.setattr(recorded, "_MAX_LAYOUT", room)
        convert(tiny.directory, tmp_path / str(room), from_pickle=from_pickle)
        return tmp_path / str(room)

    whole = converted(2**23)
    with pytest.warns(UserWarning, match=FORGOTTEN) as said:
        bare = converted(0)
    assert len(said) == 1
    assert "source_layout" not in json.loads((bare / "config.json").read_text())
    size = (whole / "config.json").stat().st_size - (bare / "config.json").stat().st_size
    with pytest.warns(UserWarning, match=FORGOTTEN):
        converted(size + 1)
    # alone in an object it takes two bytes more: both braces and a newline for a comma
    assert hashes(converted(size + 2)) == hashes(whole)
    again = load(bare)
    assert torch.equal(again(tiny.ids), ours(tiny.ids))
    save(again, tmp_path / "export", layout=layout)
    convert(tmp_path / "export", tmp_path / "back", from_pickle=from_pickle)
    assert torch.equal(load(tmp_path / "back")(tiny.ids), ours(tiny.ids))


def test_native_config_of_a_long_published_one_is_read_again(made, tmp_path):
    """6 MB of two-byte letters, which a native config.json would spell in 18 MB."""
    tiny, _ = made("jamba", "dense")
    source = tiny.edited(tmp_path / "long")
    config = json.loads((source / "config.json").read_text())
    long = json.dumps(config | {"_name_or_path": "\u00e9" * 3_000_000}, ensure_ascii=False)
    (source / "config.json").write_text(long, encoding="utf-8")
    with pytest.warns(UserWarning, match=FORGOTTEN):
        convert(source, tmp_path / "native")
    assert load(tmp_path / "native").config.source_layout is None


def test_lists_in_lists_of_an_index_are_not_recorded(made, tmp_path):
    """Python reads as deep a nest as it cannot write with an indent."""
    tiny, _ = made("jamba", "sharded")
    source = shutil.copytree(tiny.directory, tmp_path / "deep")
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index).replace('"metadata": {', f'"metadata": {{"a": {NEST}, ', 1))
    with pytest.warns(UserWarning, match=FORGOTTEN):
        convert(source, tmp_path / "native")
    assert load(tmp_path / "native").config.source_layout is None
