"""Cache: what a model remembers of a batch of sequences, as rows to copy, select and count."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from hybridzoo.errors import ConfigError
from hybridzoo.layers import State
from hybridzoo.model import HybridLM


class Cache:
    """The states of a batch of sequences.

    Attributes:
        states: what a model's forward takes as `state` and updates: for each block one State a
            branch, whose tensors have one row a sequence.
        batch: number of rows.
    """

    def __init__(self, states: list[list[State]], batch: int) -> None:
        self.states, self.batch = states, batch

    @classmethod
    def alloc(cls, model: HybridLM, batch: int, max_len: int) -> Self:
        """Empty states for `batch` sequences of at most `max_len` tokens, on the model's device.

        ConfigError where they would not fit into all the memory that the device has.
        """
        if batch < 1 or max_len < 1:
            raise ConfigError(
                f"cache: batch ({batch}) or max_len ({max_len}) is below 1; both count. Raise it."
            )
        weight = model.embed.weight
        need = model.config.state_bytes(max_len, batch, weight.dtype) // model.parallel.tp.world
        if need > (room := _memory(weight.device)):
            raise ConfigError(
                f"cache: {batch} x {max_len:,} tokens need {need / 2**30:,.0f} GiB of state; "
                f"{weight.device} has {room / 2**30:,.0f} GiB in all. Ask for fewer new tokens, or "
                "a smaller batch."
            )
        return cls(model.init_state(batch, max_len), batch)

    @torch.no_grad()
    def rows(self, index: Tensor | Sequence[int]) -> Self:
        """A new Cache with copies of the rows `index`, (n,) int64, repeats allowed."""
        index = torch.as_tensor(index)
        states = [[s.map(lambda t: _take(t, index)) for s in block] for block in self.states]
        return type(self)(states, len(index))

    def fork(self, n: int) -> Self:
        """A new Cache with n copies of every row, row i's at n * i to n * i + n - 1."""
        if n < 1:
            raise ConfigError(f"cache: fork makes {n} copies; a row has at least one. Raise it.")
        return self.rows(torch.arange(self.batch).repeat_interleave(n))

    @torch.no_grad()
    def reorder(self, index: Tensor | Sequence[int]) -> None:
        """Row i becomes what row index[i] was, as beams need it; (batch,) int64, repeats allowed.

        The tensors stay where they are, so that a captured step goes on with them.
        """
        index = torch.as_tensor(index)
        if index.shape != (self.batch,):
            raise ConfigError(
                f"cache: reorder was given an index of shape {tuple(index.shape)}; it names one "
                f"row for each of {self.batch}. Use rows() to change their number."
            )
        for block in self.states:
            for state in block:
                state.map(lambda t: t.copy_(_take(t, index)))

    def bytes(self) -> int:
        """Memory of every tensor on this rank."""
        tensors = (t for block in self.states for s in block for t in s.tensors.values())
        return sum(t.numel() * t.element_size() for t in tensors)


def _take(tensor: Tensor, index: Tensor) -> Tensor:
    return tensor.index_select(0, index.to(tensor.device))


def _memory(device: torch.device) -> int:
    """All bytes of a device, used or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
