"""Several ranks read and write one checkpoint: each its slices, the files those of one process."""


import pytest
import torch
from safetensors.torch import load_file

from hybridzoo.checkpoint import load, save
from tests import families, gloo
from tests.checkpoint import ranks
from tests.checkpoint.ranks import LAYOUTS, WORLDS, contents, make_model

SLOW = {"tp2-ep2", "pp2-ep2", "ep2-dp2"}
layouts = pytest.mark.parametrize(
    "layout", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in LAYOUTS]
)


def run(function, layout, *args):
    return gloo.run(WORLDS[layout], function, layout, *args)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """One process's checkpoint in shards."""
    directory = tmp_path_factory.mktemp("source")
    save(make_model(), directory, max_shard_bytes=9000)
    return directory


def whole(directory):
    return {n: t for path in directory.glob("*.safetensors") for n, t in load_file(path).items()}


@layouts
def test_any_layout_reads_and_writes_the_files_of_one_process(tmp_path, source, layout):
    options = {"max_shard_bytes": 9000}
    run(ranks.loads_and_saves, layout, source, whole(source), tmp_path / "new", options)
    assert contents(tmp_path / "new") == contents(source)


@pytest.mark.parametrize("layout", ["tp2", "pp2", "tp2-pp2"])
def test_tied_weights_are_written_once_from_whichever_stages_hold_them(tmp_path, layout):
    one = make_model(dtype=torch.bfloat16, tie_embeddings=True)
    save(one, tmp_path / "one")
    full = dict(one.named_parameters())
    full = {name: p.detach() for name, p in full.items()}
    options = {"dtype": torch.float32}
    run(ranks.loads_and_saves, layout, tmp_path / "one", full, tmp_path / "new", options)
    # the cast is that of one process
    save(one, tmp_path / "cast", dtype=torch.float32)
    assert contents(tmp_path / "new") == contents(tmp_path / "cast")


@pytest.mark.parametrize(
    ("family", "variant", "layout"),
    [
        ("jamba", "sharded", "tp2"),
        ("jamba", "sharded", "pp2"),
        ("jamba", "sharded", "ep2"),
        pytest.param("jamba", "sharded", "tp2-pp2", marks=pytest.mark.slow),
    ],
)
def test_published_files_are_written_again_as_they_were(tmp_path, family, variant, layout):
    directory = families.tiny(family, variant, tmp_path / family).directory
    full = {n: p.detach() for n, p in load(directory).named_parameters()}
    options = {"layout": family}
    run(ranks.loads_and_saves, layout, directory, full, tmp_path / "new", options)
    assert contents(tmp_path / "new") == contents(directory)


def test_archives_are_left_to_one_process(tmp_path):
    one = make_model(pattern="M M", shared={}, layers={"M": {"kind": "mamba1"}})
    save(one, tmp_path / "source")
