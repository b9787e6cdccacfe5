"""Checksums of copies: every bit and its place count, how a tensor lies in memory does not."""

import pytest
import torch

from hybridzoo.checkpoint import copies
from hybridzoo.checkpoint.copies import check_copies, checksum
from hybridzoo.errors import CheckpointError

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(), (1,), (7,), (5, 3), (2, 3, 5), (1, 40)]


def numbers(shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("step", [4, 2**20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_bit_counts(monkeypatch, shape, dtype, step):
    monkeypatch.setattr(copies, "_STEP", step)
    one = numbers(shape, dtype)
    want, integers = checksum(one), copies._INTEGERS[one.element_size()]
    assert checksum(one.clone()) == want
    for i in range(one.numel()):
        for bit in (0, 8 * one.element_size() - 1):
            other = one.clone().reshape(-1)
            flip = 1 << bit if bit == 0 else torch.iinfo(integers).min
            other.view(integers)[i] ^= flip
            assert checksum(other.view(shape)) != want, (i, bit)


@pytest.mark.parametrize("step", [4, 2**20])
def test_places_count(monkeypatch, step):
    monkeypatch.setattr(copies, "_STEP", step)
    one = numbers((6, 3))
    sums = {checksum(one), checksum(one.flip(0)), checksum(one.flip(1)), checksum(one.roll(4))}
    assert len(sums) == 4


@pytest.mark.parametrize("step", [4, 2**20])
def test_a_view_has_the_checksum_of_its_copy(monkeypatch, step):
    monkeypatch.setattr(copies, "_STEP", step)
    view = numbers((6, 8)).t()[1:7, 2:5]
    assert checksum(view) == checksum(view.contiguous())
    # all NaN are not one: a copy is equal to the bit, or it is another
    assert checksum(torch.tensor([torch.nan])) == checksum(torch.tensor([torch.nan]))
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))


def test_ranks_are_named():
    box = ((0, 4),)
    check_copies([{("a", box): 1}, {}, {("a", box): 1, ("b", box): 2}, {("b", box): 2}])
    with pytest.raises(
        CheckpointError, match="b: its replicated copies differ between ranks 2 and 3;"
    ):
        check_copies([{("a", box): 1}, {}, {("a", box): 1, ("b", box): 2}, {("b", box): 3}])
