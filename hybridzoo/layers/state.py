"""What one forward knows of its tokens (Sequence) and what a layer keeps between calls (State)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from hybridzoo.errors import ConfigError
from hybridzoo.kernels.slots import read_rows, skip_negative, write_rows_
from hybridzoo.sharding import Part


@dataclass(frozen=True)
class StateTensor:
    """One tensor of a layer's state.

    Attributes:
        shape: full shape; dimension 0 counts sequences.
        dtype: None is the model's dtype; float32 becomes float64 in a float64 model.
        parts: how dimension `dim` is cut over tensor-parallel ranks; none: every rank holds it
            whole.
        dim: the dimension that parts cut.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    parts: tuple[Part, ...] = ()
    dim: int = -1

    def dtype_in(self, model: torch.dtype) -> torch.dtype:
        """The dtype in a model of dtype `model`."""
        if self.dtype is torch.float32:
            return torch.promote_types(torch.float32, model)
        return self.dtype or model

    def local_shape(self, world: int) -> tuple[int, ...]:
        """The shape on one of `world` ranks."""
        shape = list(self.shape)
        if self.parts:
            shape[self.dim] = sum(p.range(world, 0)[1] for p in self.parts)
        return tuple(shape)


@dataclass(frozen=True)
class Sequence:
    """What a layer must know of the tokens in one forward; built once by the model.

    Attributes:
        cu_seqlens: (s + 1,) int32 starts of packed sequences and the end; then b == 1 and states
            have one row a sequence.
        max_seqlen: longest packed sequence, the caller's int, so that no host sync is needed.
        seq_idx: (l,) int64 the packed sequence of each token.
        positions: (b, l) int32 index of each token among its sequence's tokens in this call, -1 at
            padding; None when it is 0..l-1 in every row. A layer adds its state's own position.
        pad_mask: (b, l) bool, True at real tokens; None: no padding. Padding stands left of a
            sequence's first token, maybe over several calls; none follows a real token, unless
            there is no state for it to enter.
        slots: (b,) integers, row of the state pool for each sequence; negative rows are computed
            and dropped.
        embed0: (b, l, d) token embeddings, for kinds that read them again; like the block's own
            input through Parallel.enter.
        aux: losses that layers add (MoE balance); None when nobody collects them.
    """

    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    seq_idx: Tensor | None = None
    positions: Tensor | None = None
    pad_mask: Tensor | None = None
    slots: Tensor | None = None
    embed0: Tensor | None = None
    aux: list[Tensor] | None = None

    @classmethod
    def build(
        cls,
        length: int,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        **rest: Any,
    ) -> Self:
        """Derive positions from a left-padding mask (b, l) or from cu_seqlens (s + 1,).

        Raise ConfigError on both.
        """
        if cu_seqlens is not None:
            if attention_mask is not None or max_seqlen is None:
                raise ConfigError(
                    f"cu_seqlens: packed sequences need max_seqlen ({max_seqlen}) and take no "
                    "attention_mask; padding does not exist in a pack. "
                    "Pass cu_seqlens and max_seqlen alone."
                )
            token = torch.arange(length, device=cu_seqlens.device)
            # right=True: a token at a boundary belongs to the sequence that starts there; empty
            # ones are passed over.
            seq_idx = torch.bucketize(token, cu_seqlens[1:], right=True)
            positions = (token - cu_seqlens[seq_idx]).to(torch.int32)[None]
            return cls(
                cu_seqlens=cu_seqlens,
                max_seqlen=max_seqlen,
                seq_idx=seq_idx,
                positions=positions,
                **rest,
            )
        if max_seqlen is not None:
            raise ConfigError(
                f"max_seqlen: given ({max_seqlen}) without cu_seqlens; it is the longest sequence "
                "of a pack. Pass both or neither."
            )
        if attention_mask is None:
            return cls(**rest)
        mask = attention_mask.bool()
        positions = (mask.cumsum(1, dtype=torch.int32) - 1).masked_fill(~mask, -1)
        return cls(positions=positions, pad_mask=mask, **rest)

    def local_positions(self, x: Tensor) -> Tensor:
        """`positions`, made explicit: (b, l) int32 for x (b, l, ...)."""
        if self.positions is not None:
            return self.positions
        row = torch.arange(x.shape[1], device=x.device, dtype=torch.int32)
        return row.expand(x.shape[0], -1)

    def count(self, x: Tensor) -> Tensor:
        """Tokens that this call adds to each state row: (b,) or (s,) int32."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens.diff().to(torch.int32)
        if self.pad_mask is not None:
            return self.pad_mask.sum(1, dtype=torch.int32)
        return torch.full((x.shape[0],), x.shape[1], dtype=torch.int32, device=x.device)

    def blank_padding(self, x: Tensor) -> Tensor:
        """Put zeros at x's padding, so that no padding enters a state or a neighbour."""
        return x if self.pad_mask is None else x.masked_fill(~self.pad_mask[:, :, None], 0)

    def is_step(self, x: Tensor) -> bool:
        """Whether one-token ops, which update states in place and have no gradients, serve x.

        x is (b, l, ...).
        """
        return x.shape[1] == 1 and self.cu_seqlens is None and not torch.is_grad_enabled()

    def unpack(self, x: Tensor, fill: float = 0) -> Tensor:
        """Packed x (1, l, ...) as one padded row a sequence (s, max_seqlen, ...)."""
        rows = (len(self._starts()) - 1, self.max_seqlen, *x.shape[2:])
        return x.new_full(rows, fill).index_put((self.seq_idx, self.positions[0].long()), x[0])

    def repack(self, x: Tensor) -> Tensor:
        """Inverse of unpack: (s, max_seqlen, ...) to (1, l, ...)."""
        return x[self.seq_idx, self.positions[0].long()][None]

    def _starts(self) -> Tensor:
        assert self.cu_seqlens is not None
        return self.cu_seqlens


class State:
    """Named tensors of one layer, one row a sequence, of fixed shapes.

    `set` rebinds while gradients are recorded and copies in place otherwise, so that a one-token
    step can be captured in a CUDA graph and a training chunk can be differentiated through. Nothing
    here is read back to the host.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def get(self, name: str, ctx: Sequence) -> Tensor:
        """The rows that ctx.slots names, or all rows."""
        return read_rows(self.tensors[name], ctx.slots)

    def set(self, name: str, value: Tensor, ctx: Sequence) -> None:
        """Replace the rows that ctx.slots names, or all rows."""
        full = self.tensors[name]
        if not torch.is_grad_enabled():
            write_rows_(full, value, ctx.slots)
        elif ctx.slots is None:
            self.tensors[name] = value.to(full.dtype)
        else:
            index, value = skip_negative(ctx.slots, value.to(full.dtype), full)
            self.tensors[name] = full.index_copy(0, index, value)

    def map(self, change: Any) -> State:
        """A new State with `change` applied to every tensor."""
        return State({name: change(t) for name, t in self.tensors.items()})


def check_shapes(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    state: list[list[State]] | None,
    cu_seqlens: Tensor | None,
    slots: Tensor | None,
) -> None:
    """Refuse a model's arguments that would broadcast, or be ignored, where they do not fit.

    Raises:
        ConfigError: names the argument and its shape.
    """
    shape = tuple(input_ids.shape)
    if len(shape) != 2 or (cu_seqlens is not None and shape[0] != 1):
        rule = "(b, l)" if cu_seqlens is None else "(1, l) with cu_seqlens"
        raise ConfigError(f"input_ids: shape {shape}; it must be {rule}. Reshape it.")
    if attention_mask is not None and tuple(attention_mask.shape) != shape:
        raise ConfigError(
            f"attention_mask: shape {tuple(attention_mask.shape)}; it covers the tokens of this "
            f"call alone, {shape}. Pass that part of it."
        )
    n_seqs = shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if slots is not None and (state is None or slots.shape[0] != n_seqs):
        held = "no state" if state is None else f"{n_seqs} sequences"
        raise ConfigError(
            f"slots: {slots.shape[0]} of them with {held}; they name a row of a state for each "
            "sequence. Pass a state, and as many slots."
        )
    rows = next((t.shape[0] for place in state or () for s in place for t in s.tensors.values()), 0)
    if slots is None and rows not in (0, n_seqs):
        raise ConfigError(
            f"state: {rows} rows for {n_seqs} sequences; a state has one row a sequence. "
            "Pass init_state's of that many, or slots."
        )
