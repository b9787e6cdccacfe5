"""Several ranks read and write one checkpoint: each its slices, the files those of one process."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from hybridzoo.checkpoint import load, save
from tests import gloo
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


@pytest.fixture
def jamba(made):
    """Published files in shards: Mamba-1, attention and experts."""
    return made("jamba", "sharded")[0].directory


@pytest.mark.parametrize(
    "layout", ["tp2", "pp2", "ep2", pytest.param("tp2-pp2", marks=pytest.mark.slow)]
)
def test_published_files_are_written_again_as_they_were(tmp_path, jamba, layout):
    full = {n: p.detach() for n, p in load(jamba).named_parameters()}
    options = {"layout": "jamba"}
    run(ranks.loads_and_saves, layout, jamba, full, tmp_path / "new", options)
    assert contents(tmp_path / "new") == contents(jamba)


def test_archives_are_left_to_one_process(tmp_path):
    """torch.save makes the originals' files."""
    mamba = {"kind": "mamba1", "expand": 2}
    config = {"pattern": "2M", "layers": {"M": mamba}, "shared": {}, "tie_embeddings": True}
    save(make_model(**config), tmp_path / "native")
    answers = run(
        ranks.save_in_layout, "tp2", tmp_path / "native", tmp_path / "new", "state_spaces"
    )
    sentence = "layout: pytorch_model.bin cannot be written by 2 ranks"
    assert all(answer.startswith(sentence) for answer in answers), answers
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("layout", ["tp2", "pp2", "ep2", "tp4", "tp2-pp2"])
def test_a_rank_reads_its_slices_and_nothing_else(source, layout):
    found = run(ranks.counts_reads, layout, source)
    assert all(read == held for read, held in found)
    total = sum(t.nbytes for t in whole(source).values())
    # what is replicated is read by each of its holders
    assert total <= sum(read for read, _ in found) < 2 * total
    assert max(read for read, _ in found) < (0.9 if layout == "ep2" else 0.75) * total


@pytest.mark.parametrize("layout", ["tp2", "pp2", "ep2"])
def test_a_rank_reads_its_slices_of_published_files(jamba, layout):
    found = run(ranks.counts_reads, layout, jamba)
    assert all(read == held for read, held in found)
    assert max(read for read, _ in found) < 0.8 * sum(t.nbytes for t in whole(jamba).values())


@pytest.mark.parametrize("layout", ["tp2", "dp2", "ep2", "tp2-pp2"])
def test_every_byte_is_written_once_and_the_work_is_shared(tmp_path, source, layout):
    written = run(ranks.counts_writes, layout, source, tmp_path / "new")
    spans = sorted((at, at + n) for rank in written for _, at, n in rank)
    path = tmp_path / "new" / "model.safetensors"
    end = path.stat().st_size - sum(t.nbytes for t in load_file(path).values())
    for start, stop in spans:
        assert start == end
        end = stop
    assert end == path.stat().st_size
    shares = [sum(n for _, _, n in rank) for rank in written]
    # whole parameters of different sizes take turns
    assert max(shares) < 0.7 * sum(shares) if layout != "tp2-pp2" else max(shares) < sum(shares) / 2


def test_large_copies_are_written_by_all_their_holders(tmp_path, source):
    answers = run(ranks.shares_evenly, "ep2-dp2", source, tmp_path / "new")
    total = sum(t.nbytes for t in whole(source).values())
    # in rows, which do not always divide evenly
    assert all(abs(n - total / 4) < 0.05 * total for n in answers), (answers, total)
    assert torch.equal(whole(tmp_path / "new")["embed.weight"], whole(source)["embed.weight"])


@pytest.mark.parametrize(
    ("layout", "rank", "name"),
    [
        ("tp2", 1, "norm.weight"),
        # rows of the shared group, in a parameter of their own
        ("tp2", 1, "blocks.2.layer.in_proj.weight"),
        ("dp2", 0, "blocks.4.layer.qkv_proj.weight"),
        ("ep2", 1, "blocks.3.layer.router_weight"),
        ("pp2", 1, "shared.tail.gate_up_proj.weight"),
        ("tp4", 3, "blocks.4.layer.qkv_proj.bias"),
        ("tp4", 2, "norm.weight"),
    ],
)
def test_copies_that_differ_in_a_bit_are_not_saved(tmp_path, source, layout, rank, name):
    target = shutil.copytree(source, tmp_path / "old")
    before = contents(target)
    answers = run(ranks.save_with_other_copies, layout, source, target, rank, name)
    assert len(set(answers)) == 1
    assert answers[0].startswith(f"{name}: its replicated copies differ between ranks ")
    assert str(rank) in answers[0].partition(";")[0]
    assert contents(target) == before


@pytest.mark.parametrize(
    ("layout", "rank", "function"),
    [
        ("tp2", 0, "posix_fallocate"),
        ("tp2", 0, "pwrite"),
        ("tp2", 1, "pwrite"),
        ("pp2", 1, "fsync"),
        ("tp4", 3, "pwrite"),
        ("tp2", 0, "rename"),
    ],
)
def test_a_failure_of_one_rank_is_said_by_all(tmp_path, source, layout, rank, function):
    target = shutil.copytree(source, tmp_path / "old")
    before = contents(target)
    answers = run(ranks.save_that_fails, layout, source, target, rank, function)
    sentences = {sentence for sentence, _ in answers}
    assert len(sentences) == 1
    assert f"rank {rank}: {target}: cannot be written (No space left on device)" in sentences.pop()
    # nobody waited for the one that failed
    assert max(seconds for _, seconds in answers) < 20
    assert contents(target) == before
    run(ranks.loads_and_saves, layout, source, whole(source), target, {"max_shard_bytes": 9000})
    assert contents(target) == before


def test_a_failed_first_save_leaves_no_directory(tmp_path, source):
    run(ranks.save_that_fails, "tp2", source, tmp_path / "new", 1, "pwrite")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("failing", [None, 0, 1])
def test_partitioned_parameters_are_saved_and_a_full_disk_stops_nobody(tmp_path, source, failing):
    """ZeRO-3: every rank takes part in putting each parameter together, also one that failed."""
    answers = run(ranks.saves_partitioned, "dp2", source, tmp_path / "new", failing)
    assert len(set(answers)) == 1
    if failing is None:
        assert answers[0] == ""
        assert whole(tmp_path / "new").keys() == whole(source).keys()
        for name, tensor in whole(source).items():
            assert torch.equal(whole(tmp_path / "new")[name], tensor), name
    else:
        assert answers[0].startswith(f"rank {failing}: ") and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("rank", "function", "count", "is_new"),
    [
        (0, "posix_fallocate", 2, False),
        (1, "pwrite", 9, False),
        (0, "pwrite", 9, False),
        (1, "fsync", 1, False),
        # before the commit, and with half of the files moved out
        (0, "rename", 1, False),
        (0, "replace", 4, True),
    ],
)
def test_a_killed_rank_leaves_one_whole_checkpoint(tmp_path, source, rank, function, count, is_new):
    target = tmp_path / "target"
    save(make_model(pattern="W", layers={"W": {"shared": "tail"}}, d_model=20), target)
    # the others hear of it from gloo, maybe before this process does
    with pytest.raises(AssertionError, match=f"rank {rank} died|onnection closed by peer|reset"):
        run(ranks.save_that_is_killed, "tp2", source, target, rank, function, count)
    assert load(target).config.d_model == (16 if is_new else 20)
    # and the next save is not in the way of what is left
    options = {"max_shard_bytes": 9000}
    run(ranks.loads_and_saves, "tp2", source, whole(source), target, options)
    assert contents(target) == contents(source)


@pytest.mark.parametrize("rank", [0, 1])
def test_nobody_returns_before_the_slowest_rank_has_written(tmp_path, source, rank):
    found = run(ranks.save_with_a_slow_rank, "tp2", source, tmp_path / "new", rank)
    save(make_model(), tmp_path / "one")
    assert [files for _, files in found] == [contents(tmp_path / "one")] * 2
    # nor is anything committed before
    assert set(found[rank][0]) == {".saving"}


def test_ranks_that_do_not_hold_the_model_are_refused(tmp_path, source):
    answers = run(ranks.saves_a_part, "pp2", source, tmp_path / "new")
    assert len(set(answers)) == 1
    assert answers[0].startswith("blocks.5.norm.weight: the ranks that save hold 0 of its 16 ele")
    assert not (tmp_path / "new").exists()


def test_a_parameter_has_one_dtype(tmp_path, source):
    answers = run(ranks.saves_another_dtype, "tp2", source, tmp_path / "new")
    assert len(set(answers)) == 1
    assert answers[0].startswith("norm.weight: F64 on rank 1, F32 on one before it")


@pytest.mark.slow
def test_a_save_takes_a_buffer_of_memory(tmp_path):
    """No rank gathers: beyond its slices it has what one batch of writes needs."""
    layers = {"F": {"kind": "mlp", "d_ff": 4096}}
    one = make_model(pattern="8F", layers=layers, shared={}, d_model=1024)
    save(one, tmp_path / "source")
    n = sum(p.nbytes for p in one.parameters())
    del one
    for grown, held in run(ranks.measures_memory, "tp2", tmp_path / "source", tmp_path / "new"):
        assert held < 0.55 * n
        # a column's runs are copied together, cast or not, and compared copies widened
        assert grown < 70e6 < n / 2, grown
