"""Boxes of files into tensors: every way there, what is read, and files that change under it."""

import gc
import itertools
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from hybridzoo.checkpoint import load, reader, save, transfer
from hybridzoo.checkpoint.io import SINGLE_FILE, plan, write
from hybridzoo.checkpoint.reader import Reader
from hybridzoo.checkpoint.shard import DTYPE_NAMES, Spec
from hybridzoo.checkpoint.transfer import OpenFile, Piece, narrow
from hybridzoo.comm import Axis, Parallel
from hybridzoo.config import HybridConfig
from hybridzoo.errors import CheckpointError
from hybridzoo.model import HybridLM

# shape of the stored tensor, start and sizes of the box
BOXES = [
    ((), (), ()),
    ((0, 4), (0, 0), (0, 4)),
    ((7,), (0,), (7,)),
    ((7,), (2,), (3,)),
    ((5, 6), (0, 0), (5, 6)),
    ((5, 6), (1, 0), (3, 6)),
    ((5, 6), (0, 2), (5, 3)),
    ((5, 6), (4, 5), (1, 1)),
    ((3, 4, 5), (0, 1, 0), (3, 2, 5)),
    ((3, 4, 5), (1, 0, 0), (2, 4, 5)),
    ((3, 4, 5), (0, 0, 3), (3, 4, 2)),
    ((3, 4, 5), (1, 1, 1), (2, 3, 3)),
    ((2, 3, 1, 5), (1, 0, 0, 2), (1, 3, 1, 2)),
    ((3, 4), (1, 2), (0, 2)),
]


def stored(dtype):
    """A tensor a box, no two elements alike."""
    start = itertools.count(1, 50)
    return {
        str(i): (torch.arange(max(1, prod(shape))) + next(start))[: prod(shape)]
        .view(shape)
        .to(dtype)
        for i, (shape, _, _) in enumerate(BOXES)
    }


def prod(shape):
    return torch.Size(shape).numel()


def put(directory, tensors, max_shard_bytes=10**9):
    specs = {n: Spec(DTYPE_NAMES[t.dtype], tuple(t.shape)) for n, t in tensors.items()}
    write(directory, plan(specs, max_shard_bytes), tensors.__getitem__, texts={})


def everything(opened, fill=torch.nan, dtype=torch.float32):
    """Whole tensors to fill, and their pieces."""
    targets = {n: torch.full(s.shape, fill, dtype=dtype) for n, s in opened.specs.items()}
    return targets, [Piece(n, t.shape, (0,) * t.ndim, t) for n, t in targets.items()]


@pytest.mark.parametrize("to", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_strided", [False, True], ids=["dense", "strided"])
# a step of 8 bytes: an element at a time where a row is wider; 40: some rows at a time
@pytest.mark.parametrize("step", [8, 40, 2**24])
@pytest.mark.parametrize("short_run", [0, 24, 2**20])
def test_any_box_is_read(tmp_path, monkeypatch, device, step, short_run, is_strided, to):
    monkeypatch.setattr(transfer, "STEP_BYTES", step)
    monkeypatch.setattr(transfer, "_SHORT_RUN", short_run)
    tensors = stored(torch.float32)
    # an odd number of bytes before the others: none of them is aligned
    save_file({"odd": torch.ones(3, dtype=torch.int8)} | tensors, tmp_path / SINGLE_FILE)
    targets, pieces = {}, []
    for (name, full), (shape, start, sizes) in zip(tensors.items(), BOXES, strict=True):
        # a frame of -1 round the box, which nobody may write to
        frame = torch.full([n + 2 for n in sizes] if is_strided else sizes, -1, dtype=to)
        targets[name] = frame = frame.to(device)
        box = narrow(frame, [1] * len(sizes), sizes) if is_strided else frame
        pieces.append(Piece(name, shape, start, box))
        want = torch.full(frame.shape, -1, dtype=to)
        inside = narrow(want, [1] * len(sizes), sizes) if is_strided else want
        inside.copy_(narrow(full, start, sizes))
        tensors[name] = want
    Reader(tmp_path).fill(pieces)
    for name, want in tensors.items():
        assert torch.equal(targets[name].cpu(), want), BOXES[int(name)]


def test_no_read_is_longer_than_a_step(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "STEP_BYTES", 40)
    lengths = count_reads(monkeypatch)
    put(tmp_path, stored(torch.float32))
    opened = Reader(tmp_path)
    lengths.clear()
    opened.fill(everything(opened)[1])
    assert max(lengths) == 40 and sum(lengths) == 4 * sum(prod(shape) for shape, _, _ in BOXES)


def count_reads(monkeypatch):
    """The lengths of all reads from now on."""
    read, lengths = OpenFile.read, []

    def counted(self, offset, memory):
        lengths.append(len(memory))
        read(self, offset, memory)

    monkeypatch.setattr(OpenFile, "read", counted)
    return lengths


def test_short_runs_are_read_with_what_lies_between(tmp_path, monkeypatch):
    lengths = count_reads(monkeypatch)
    put(tmp_path, {"x": torch.arange(600.0).view(20, 30)})
    opened, target = Reader(tmp_path), torch.full((20, 10), torch.nan)
    lengths.clear()
    opened.fill([Piece("x", (20, 30), (0, 5), target)])
    assert lengths == [2400]
    monkeypatch.setattr(transfer, "_SHORT_RUN", 40)
    lengths.clear()
    opened.fill([Piece("x", (20, 30), (0, 5), target)])
    assert lengths == [40] * 20
    # one run alone is never worth more
    lengths.clear()
    opened.fill([Piece("x", (20, 30), (3, 5), target[:1, :2])])
    assert lengths == [8]


def test_files_are_read_from_front_to_back(tmp_path, monkeypatch):
    put(tmp_path, {str(i): torch.ones(i + 1) for i in range(40)}, 200)
    places = []

    def placed(self, offset, memory):
        places.append((self.path.name, offset))

    opened = Reader(tmp_path)
    monkeypatch.setattr(OpenFile, "read", placed)
    monkeypatch.setattr(reader, "ThreadPoolExecutor", lambda n: ThreadPoolExecutor(1))
    opened.fill(everything(opened)[1][::-1])
    assert places == sorted(places) and len(places) == 40


def test_many_small_tensors(tmp_path):
    tensors = {f"{i:04}": torch.full((i % 7,), float(i)) for i in range(2000)}
    put(tmp_path, tensors, 5000)
    opened = Reader(tmp_path)
    targets, pieces = everything(opened)
    opened.fill(pieces)
    assert all(torch.equal(targets[name], t) for name, t in tensors.items())


def test_short_reads_go_on(tmp_path, monkeypatch):
    """The system may give less than was asked for."""
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, to, at: preadv(fd, [to[0][:5]], at))
    tensors = stored(torch.float32)
    put(tmp_path, tensors)
    assert all(torch.equal(Reader(tmp_path).view(name), t) for name, t in tensors.items())


def truncate(path):
    os.truncate(path, path.stat().st_size - 4)


def overwrite(path):
    """Other numbers in place, by whatever does not rename."""
    with open(path, "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"abcd")
    # a clock that is coarser than this test
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [truncate, overwrite])
def test_file_that_changes_in_place_is_refused(tmp_path, change):
    put(tmp_path, stored(torch.float32), 300)
    opened = Reader(tmp_path)
    path = max(tmp_path.glob("*.safetensors"))
    change(path)
    with pytest.raises(CheckpointError, match="changed while it was read") as refused:
        opened.fill(everything(opened)[1])
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_file_that_a_save_replaces_is_read_to_its_end(tmp_path):
    put(tmp_path, {"x": torch.ones(9)})
    opened = Reader(tmp_path)
    put(tmp_path, {"x": torch.zeros(9)})
    assert opened.view("x").tolist() == [1.0] * 9


def test_disk_that_fails_is_named_and_left_alone(tmp_path, monkeypatch):
    put(tmp_path, {str(i): torch.ones(1) for i in range(200)})
    opened, n_reads = Reader(tmp_path), 0

    def failing(fd, to, at):
        nonlocal n_reads
        n_reads += 1
        # all of them would take a second
        time.sleep(0.01)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read \(Input/output"):
        opened.fill(everything(opened)[1])
    assert n_reads < 100


@pytest.mark.parametrize(
    ("pages", "once", "is_left"),
    [(1, True, True), (1, False, False), (10**6, True, False)],
    ids=["too large to stay", "read again", "room for both"],
)
def test_cache_is_left_only_where_it_cannot_stay(tmp_path, monkeypatch, pages, once, is_left):
    put(tmp_path, {"x": torch.ones(1000), "y": torch.ones(1000)})
    opened, forgotten = Reader(tmp_path), []
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": pages}.get)
    monkeypatch.setattr(OpenFile, "forget", lambda self, offset, n: forgotten.append(n))
    opened.fill(everything(opened)[1], once=once)
    assert sum(forgotten) == 8000 * is_left


def wide():
    """Parameters cut along both dimensions, some of several STEP_BYTES in the tests below."""
    return HybridConfig.from_dict(
        {
            "d_model": 32,
            "vocab_size": 50,
            "pattern": "2(MF)E",
            "layers": {
                "M": {"kind": "mamba1"},
                "F": {"kind": "mlp", "d_ff": 80},
                "E": {"kind": "moe", "d_ff": 40, "n_experts": 4, "top_k": 2},
            },
            "tie_embeddings": False,
        }
    )


def rank_of(directory, rank, **options):
    """A rank's model; nothing is sent, so no group is needed."""
    return load(directory, parallel=Parallel(tp=Axis(rank, 2, None)), **options)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["stored", "cast"])
@pytest.mark.parametrize("short_run", [0, 2**20], ids=["by run", "by row"])
def test_ranks_read_their_halves(tmp_path, monkeypatch, device, short_run, dtype):
    monkeypatch.setattr(transfer, "_SHORT_RUN", short_run)
    monkeypatch.setattr(transfer, "STEP_BYTES", 1000)
    one = HybridLM(wide(), seed=1)
    save(one, tmp_path, max_shard_bytes=9000)
    lengths = count_reads(monkeypatch)
    whole = load(tmp_path, dtype=dtype)
    whole_bytes = sum(lengths)
    for rank in (0, 1):
        lengths.clear()
        model = rank_of(tmp_path, rank, device=device, dtype=dtype)
        for name, p, pieces in model.local_names():
            own = next(iter(pieces))
            for piece, want in p.cut.shard(own, whole.get_parameter(name), 2, rank).items():
                assert torch.equal(model.get_parameter(pieces[piece]).cpu(), want), (name, piece)
        if short_run == 0:
            # embedding, head and norms are every rank's: 4% of the bytes; headers come on top
            assert 0.5 < sum(lengths) / whole_bytes < 0.7
        assert sum(lengths) < whole_bytes


def test_ranks_leave_the_cache_to_each_other(tmp_path, monkeypatch):
    save(HybridLM(wide()), tmp_path)
    asked = []
    fill = Reader.fill
    monkeypatch.setattr(
        Reader, "fill", lambda self, p, *, once: (asked.append(once), fill(self, p, once=once))
    )
    rank_of(tmp_path, 1)
    load(tmp_path)
    assert asked == [False, True]


def test_load_works_in_inference_mode(tmp_path):
    """The mode is a thread's own, and tensors made in it can be written to in it alone."""
    one = HybridLM(wide(), seed=1)
    save(one, tmp_path)
    with torch.inference_mode():
        two = load(tmp_path, dtype=torch.bfloat16)
        for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
            assert torch.equal(p.to(q.dtype), q), name


def test_no_thread_and_no_file_is_left(tmp_path):
    save(HybridLM(wide()), tmp_path, max_shard_bytes=9000)
    before = left()
    load(tmp_path)
    assert left() == before


def left():
    # a Source and its cache of fetched tensors know each other
    gc.collect()
    return threading.active_count(), len(os.listdir("/proc/self/fd"))
