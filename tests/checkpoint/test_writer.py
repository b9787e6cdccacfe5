"""Slices into files: a box's bytes and no others; phases that ranks end together."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hybridzoo.checkpoint import transfer
from hybridzoo.checkpoint.io import SINGLE_FILE, commit, plan
from hybridzoo.checkpoint.shard import DTYPE_NAMES, DTYPES, Shard, Spec
from hybridzoo.checkpoint.transfer import Piece, narrow
from hybridzoo.checkpoint.writer import Writer, is_on_nfs, reserve
from hybridzoo.errors import CheckpointError
from tests import gloo
from tests.checkpoint import ranks
from tests.checkpoint.test_transfer import BOXES


@pytest.mark.parametrize("to", ["F32", "F64", "BF16"])
@pytest.mark.parametrize("is_strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("step", [8, 40, 2**24])
def test_any_box_is_written_and_nothing_beside_it(tmp_path, monkeypatch, step, is_strided, to):
    monkeypatch.setattr(transfer, "STEP_BYTES", step)
    specs = {str(i): Spec(to, shape) for i, (shape, _, _) in enumerate(BOXES)}
    shard, path = Shard(specs), tmp_path / SINGLE_FILE
    with open(path, "x+b") as file:
        reserve(file, shard)
    wanted = {name: torch.zeros(s.shape, dtype=DTYPES[to]) for name, s in specs.items()}
    with Writer(tmp_path, {SINGLE_FILE: shard}) as writer:
        for name, (shape, start, sizes) in zip(specs, BOXES, strict=True):
            full = torch.arange(1.0, 1 + torch.Size(sizes).numel()).view(sizes)
            source = full.t().contiguous().t() if is_strided and full.ndim == 2 else full
            writer.put(Piece(name, shape, start, source))
            narrow(wanted[name], start, sizes).copy_(full)
    found = load_file(path)
    assert all(torch.equal(found[name], want) for name, want in wanted.items())


def test_writes_are_runs_of_the_file_and_of_limited_length(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "STEP_BYTES", 64)
    written, pwrite = [], os.pwrite

    def counted(fd, data, at):
        written.append((at, len(data)))
        # a disk may take less than is offered
        return pwrite(fd, data[:24], at)

    monkeypatch.setattr(os, "pwrite", counted)
    shard = Shard({"x": Spec("F32", (6, 10))})
    with open(tmp_path / SINGLE_FILE, "x+b") as file:
        reserve(file, shard)
    with Writer(tmp_path, {SINGLE_FILE: shard}) as writer:
        writer.put(Piece("x", (6, 10), (2, 0), torch.full((4, 10), 2.0)))
        n_rows = len(written)
        writer.put(Piece("x", (6, 10), (0, 3), torch.full((2, 2), 3.0)))
    assert max(n for _, n in written) <= 64 and n_rows > 4
    assert [n for _, n in written[n_rows:]] == [8, 8]
    want = torch.zeros(6, 10)
    want[2:], want[:2, 3:5] = 2, 3
    assert torch.equal(load_file(tmp_path / SINGLE_FILE)["x"], want)


def test_room_is_taken_before_anything_is_written(tmp_path, monkeypatch):
    def full(fd, start, n):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    called = []
    layout = plan({"x": Spec(DTYPE_NAMES[torch.float32], (3,))})
    with pytest.raises(CheckpointError, match="No space left on device"):
        commit(tmp_path / "new", layout, called.append, texts={})
    assert not called and not (tmp_path / "new").exists()


def test_an_error_that_is_not_ours_ends_the_phase_on_all():
    first, second = gloo.run(2, ranks.phase_that_fails, RuntimeError("out of memory"))
    assert first == second == "rank 1: RuntimeError: out of memory"


def test_an_interrupt_waits_for_nobody():
    # rank 1's next phase is the one that rank 0 waits in
    assert gloo.run(2, ranks.phase_that_fails, KeyboardInterrupt()) == ["", "KeyboardInterrupt"]


MOUNTS = """\
/dev/root / ext4 rw 0 0
server:/home /home nfs4 rw,vers=4.1 0 0
server:/big /mnt/our\\040data nfs rw 0 0
/dev/sdb /home/local xfs rw 0 0
lustre /scratch lustre rw 0 0
"""


@pytest.mark.parametrize(
    ("where", "is_one"),
    [
        ("/tmp/x", False),
        ("/home/me/run", True),
        ("/home/local/run", False),
        ("/homely", False),
        ("/mnt/our data/run", True),
        ("/scratch/run", False),
    ],
)
def test_nfs_is_found_among_the_mounts(tmp_path, where, is_one):
    (tmp_path / "mounts").write_text(MOUNTS)
    assert is_on_nfs(Path(where), tmp_path / "mounts") is is_one
    assert not is_on_nfs(Path(where), tmp_path / "none")


@pytest.mark.parametrize(("hosts", "nfs"), [(2, True), (2, False), (1, True)])
def test_hosts_that_share_files_over_nfs_write_through(tmp_path, hosts, nfs):
    """Else one sends a page whole, with the other's bytes in it as they were before."""
    flags = gloo.run(2, ranks.saves_from_hosts, tmp_path / "new", hosts, nfs)
    assert flags == [{hosts == 2 and nfs}] * 2


def test_a_directory_that_one_rank_does_not_see_is_refused(tmp_path):
    answers = gloo.run(2, ranks.saves_elsewhere, tmp_path)
    assert len(set(answers)) == 1
    assert answers[0].startswith(f"rank 1: {tmp_path / '1'}: not the directory that rank 0 writes")
    assert not any(tmp_path.iterdir())
