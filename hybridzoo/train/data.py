"""Training batches: each is a pure function of (seed, step), so that a resume needs the step."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray

from hybridzoo.errors import ConfigError
from hybridzoo.parallel.loss import IGNORE, Batch
from hybridzoo.parallel.recipe import Packing
from hybridzoo.tokenizer import Tokenizer
from hybridzoo.train.documents import Documents, Ints, Source, Split, corpus, load_documents

__all__ = ["IGNORE", "Batch", "PackedData", "Packing", "corpus"]

_PACKINGS = get_args(Packing)


class PackedData:
    """Training batches of one source, and evaluation batches of any of its splits.

    An epoch visits windows of seq_len tokens that do not overlap, at an offset and in an order of
    its own; a step takes the next batch_size of them, into the next epoch if need be.

    Args:
        source: a corpus name, path, glob or list of documents; see `load_documents`.
        tokenizer: makes the ids.
        seq_len: tokens a window.
        batch_size: windows a step, over all ranks.
        seed: picks offsets and orders.
        split: the split to train on.
        packing: "documents" lays the documents end to end, cuts that ring into windows and says
            where each document starts, so that none need see another; "none" takes windows inside
            documents (shorter documents are filled up with id 0, labels -100).
        rank: data-parallel rank; it takes its slice of the windows of a step.
        world: number of data-parallel ranks; divides batch_size.

    Raises:
        ConfigError: see `load_documents`; or a size is out of range, or the split is shorter than
            one window.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        batch_size: int,
        seed: int = 0,
        split: Split = "train",
        packing: Packing = "none",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        _check_sizes(seq_len, batch_size, rank, world)
        _check_order(seed, packing)
        self.source, self.tokenizer = source, tokenizer
        self.seq_len, self.batch_size = seq_len, batch_size
        self.seed, self.packing = seed, packing
        self.rank, self.world = rank, world
        self._splits: dict[Split, Documents] = {}
        self._data = self.documents(split)
        lengths = self._data.ends - self._data.starts
        if lengths.sum() <= seq_len:
            name = source if isinstance(source, str | Path) else "documents"
            raise ConfigError(
                f"data: {name}, split {split!r}, has {lengths.sum()} tokens; a window and its "
                f"labels need seq_len + 1 ({seq_len + 1}). Lower seq_len, or add text."
            )
        # where a window may start, numbered through all documents; document i has the numbers
        # from _first[i] to _first[i + 1]
        n_starts = lengths if packing == "documents" else (lengths - seq_len).clip(min=1)
        self._first = np.append(0, np.cumsum(n_starts))

    def documents(self, split: Split) -> Documents:
        """One split of the source, read once."""
        if split not in self._splits:
            self._splits[split] = load_documents(self.source, self.tokenizer, split)
        return self._splits[split]

    def batch_at(self, step: int) -> Batch:
        """This rank's batch of a step, b = batch_size / world windows.

        Returns:
            input_ids and labels, (b, l) int64; a label is the next token, or -100 where that is
            another document's. Packing "documents" gives them as (1, b * l), with cu_seqlens,
            (s + 1,) int32, which parts documents and windows, and max_seqlen, an int.
        """
        b = self.batch_size // self.world
        first = step * self.batch_size + self.rank * b
        windows = [self._window(n) for n in range(first, first + b)]
        ids, labels, is_start = (np.stack(arrays) for arrays in zip(*windows, strict=True))
        if self.packing == "none":
            return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        is_start[:, 0] = True
        cu_seqlens = np.append(np.flatnonzero(is_start), is_start.size)
        return {
            "input_ids": torch.from_numpy(ids.reshape(1, -1)),
            "labels": torch.from_numpy(labels.reshape(1, -1)),
            "cu_seqlens": torch.from_numpy(cu_seqlens.astype(np.int32)),
            "max_seqlen": int(np.diff(cu_seqlens).max()),
        }

    def eval_batches(self, split: Split = "val") -> Iterator[Batch]:
        """Batches in which, over all ranks, each token of a split is a label exactly once.

        Those are `documents(split).n_targets` labels; with the byte tokenizer, every byte. Windows
        overlap by half: before a target stand at least seq_len / 2 tokens, or all of its document.

        Yields:
            input_ids and labels, (b, l) int64, as many on each rank; rows are filled up with id 0,
            and the last batch with such rows, labels -100.
        """
        data, b = self.documents(split), self.batch_size // self.world
        windows = _eval_windows(data, self.seq_len)
        for first in range(0, len(windows), self.batch_size):
            ids = np.zeros((b, self.seq_len), np.int64)
            labels = np.full((b, self.seq_len), IGNORE, np.int64)
            mine = windows[first + self.rank * b : first + (self.rank + 1) * b]
            for row, (start, first_target, end) in enumerate(mine):
                tokens = data.tokens[start:end]
                ids[row, : end - start - 1] = tokens[:-1]
                # the label of token i is token i + 1
                place = first_target - start
                labels[row, place - 1 : end - start - 1] = tokens[place:]
            yield {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}

    def _window(self, n: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Window n of the run: ids, labels, and where a document starts, (l,) each."""
        n_starts = int(self._first[-1])
        n_windows = max(1, n_starts // self.seq_len)
        epoch, i = divmod(n, n_windows)
        offset, order = _epoch(self.seed, epoch, n_starts, n_windows)
        start = (offset + int(order[i]) * self.seq_len) % n_starts
        steps = np.arange(self.seq_len + 1)
        document: Ints
        if self.packing == "documents":
            ring = (start + steps) % n_starts
            document = np.searchsorted(self._first, ring, side="right") - 1
            place = ring - self._first[document]
        else:
            document = np.full_like(steps, np.searchsorted(self._first, start, side="right") - 1)
            place = start - self._first[document] + steps
        at = self._data.starts[document] + place
        is_real = at < self._data.ends[document]
        tokens = np.where(is_real, self._data.tokens[np.where(is_real, at, 0)], 0).astype(np.int64)
        labels = np.where(is_real[1:] & (place[1:] > 0), tokens[1:], IGNORE)
        return tokens[:-1], labels, place[:-1] == 0


def _check_sizes(seq_len: int, batch_size: int, rank: int, world: int) -> None:
    for name, size in (("seq_len", seq_len), ("batch_size", batch_size), ("world", world)):
        if size < 1:
            raise ConfigError(f"data: {name} cannot be {size}; it is a count >= 1. Correct it.")
    if batch_size % world or not 0 <= rank < world:
        raise ConfigError(
            f"data: rank {rank} of {world} cannot share batch_size ({batch_size}); the number of "
            "ranks divides it, and ranks count from 0. Use a multiple of it."
        )


def _check_order(seed: int, packing: str) -> None:
    if packing not in _PACKINGS:
        legal = ", ".join(_PACKINGS)
        raise ConfigError(f"data: {packing!r} is not a packing; the packings: {legal}. Name one.")
    if not 0 <= seed < 1 << 64:
        raise ConfigError(
            f"data: seed cannot be {seed}; it is an integer from 0 to 2**64 - 1. Correct it."
        )


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, n_starts: int, n_windows: int) -> tuple[int, Ints]:
    """Offset of an epoch's windows, and the order in which it visits them.

    Raw Philox output is a stream that numpy promises not to change (NEP 19), so that a resume may
    run on another numpy; `Generator.permutation` is not.
    """
    raw = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(n_windows + 1)
    return int(raw[0] % n_starts), np.argsort(raw[1:], kind="stable")


def _eval_windows(data: Documents, seq_len: int) -> list[tuple[int, int, int]]:
    """(start, first target, end): tokens[start:end] is read, [first target, end) is scored."""
    windows = []
    for begin, end in zip(data.starts.tolist(), data.target_ends.tolist(), strict=True):
        start, first_target = begin, begin + 1
        while first_target < end:
            stop = min(start + seq_len + 1, end)
            windows.append((start, first_target, stop))
            start, first_target = stop - (seq_len + 1) // 2, stop
    return windows
