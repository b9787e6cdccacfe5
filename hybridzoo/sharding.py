"""How one parameter is cut over tensor-parallel ranks, and joined again.

A cut is declared once, on the layer's config, in full sizes; loading, exporting, resharding,
initialisation and the tags that DeepSpeed reads all follow from it. A parameter that is partly cut
and partly replicated (Mamba-2's in_proj when n_groups < tp, qkv_proj when n_kv_heads < tp) lives in
memory as two parameters, `name` (cut) and `name_shared` (replicated), because gradients are summed
for the second only; a checkpoint holds the one fused name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from hybridzoo.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Part:
    """One block of a (possibly fused) dimension.

    Attributes:
        width: full width of the block.
        units: indivisible pieces in it; rank r of n takes units r * units // n and on, so units < n
            replicates.
        name: the hyperparameter that counts the units, for error messages.
        replicates: whether ranks may share a unit (B/C groups and KV heads may, heads and channels
            may not).
        uneven: whether ranks may hold different counts (a vocabulary's rows, of which then none
            is made up).
    """

    width: int
    units: int
    name: str
    replicates: bool = False
    uneven: bool = False

    def is_legal(self, world: int) -> bool:
        """Whether `world` ranks can cut this block into whole units."""
        if self.uneven:
            return self.units >= world
        return self.units % world == 0 or (self.replicates and world % self.units == 0)

    @property
    def rule(self) -> str:
        """What tp must do, for error messages."""
        verb = "divide or be a multiple of" if self.replicates else "divide"
        return f"{'not exceed' if self.uneven else verb} {self.name} ({self.units})"

    def is_shared(self, world: int) -> bool:
        """Whether several of `world` ranks hold the same unit."""
        return self.units < world

    def range(self, world: int, rank: int) -> tuple[int, int]:
        """Offset and length, within the block, of what `rank` holds."""
        unit = self.width // self.units
        if self.uneven:
            start = self._boundary(world, rank)
            return start * unit, (self._boundary(world, rank + 1) - start) * unit
        return rank * self.units // world * unit, max(self.units // world, 1) * unit

    def _boundary(self, world: int, rank: int) -> int:
        # multiples of 16 where there are many: matrix units like rows in such counts
        at = rank * self.units // world
        return at // 16 * 16 if rank < world and self.units >= 64 * world else at


@dataclass(frozen=True)
class Replicate:
    """The whole parameter on every rank.

    Attributes:
        partial_grad: each rank's gradient is only its share (a router that reads local experts), so
            it is summed.
    """

    partial_grad: bool = False

    def pieces(self, name: str, world: int) -> dict[str, tuple[int, ...]]:
        """The parameter's names in memory: its own."""
        return {name: ()}

    def local_shapes(
        self, name: str, shape: Sequence[int], world: int, rank: int
    ) -> dict[str, tuple[int, ...]]:
        """Shapes in memory by name: the full shape."""
        return {name: tuple(shape)}

    def shard(self, name: str, full: Tensor, world: int, rank: int) -> dict[str, Tensor]:
        """What `rank` holds: everything."""
        return {name: full}

    def join(self, name: str, shards: Sequence[dict[str, Tensor]]) -> Tensor:
        """The full tensor from every rank's copy; CheckpointError when the copies differ."""
        return _equal_copy(name, [s[name] for s in shards])


@dataclass(frozen=True)
class Split:
    """Cut `dim` part by part.

    shard() slices, join() concatenates and checks that replicated copies are equal.
    """

    dim: int
    parts: tuple[Part, ...]

    def pieces(self, name: str, world: int) -> dict[str, tuple[int, ...]]:
        """The parameter's names in memory and the parts, by index in written order, of each."""
        shared = tuple(i for i, p in enumerate(self.parts) if p.is_shared(world))
        cut = tuple(i for i, p in enumerate(self.parts) if not p.is_shared(world))
        if not cut or not shared:
            return {name: cut or shared}
        return {name: cut, shared_name(name): shared}

    def ranges(self, name: str, world: int, rank: int) -> dict[str, list[tuple[int, int]]]:
        """By name in memory, the (start, stop) slices of the full dimension that `rank` holds."""
        starts = list(accumulate((p.width for p in self.parts), initial=0))
        found: dict[str, list[tuple[int, int]]] = {}
        for local, indices in self.pieces(name, world).items():
            spans = [(starts[i], *self.parts[i].range(world, rank)) for i in indices]
            found[local] = [(base + begin, base + begin + n) for base, begin, n in spans]
        return found

    def local_shapes(
        self, name: str, shape: Sequence[int], world: int, rank: int
    ) -> dict[str, tuple[int, ...]]:
        """Shapes in memory by name; the same on every rank but for uneven parts."""
        shapes = {}
        for local, spans in self.ranges(name, world, rank).items():
            size = list(shape)
            size[self.dim] = sum(stop - start for start, stop in spans)
            shapes[local] = tuple(size)
        return shapes

    def shard(self, name: str, full: Tensor, world: int, rank: int) -> dict[str, Tensor]:
        """What `rank` of `world` holds, by name in memory."""
        return {
            local: torch.cat([full.narrow(self.dim, a, b - a) for a, b in spans], self.dim)
            for local, spans in self.ranges(name, world, rank).items()
        }

    def join(self, name: str, shards: Sequence[dict[str, Tensor]]) -> Tensor:
        """The full tensor from every rank's pieces.

        CheckpointError when replicated copies differ.
        """
        world = len(shards)
        columns: list[list[Tensor]] = [[] for _ in self.parts]
        for rank, shard in enumerate(shards):
            for local, indices in self.pieces(name, world).items():
                widths = [self.parts[i].range(world, rank)[1] for i in indices]
                pieces = shard[local].split_with_sizes(widths, self.dim)
                for i, piece in zip(indices, pieces, strict=True):
                    columns[i].append(piece)
        joined = []
        for part, copies in zip(self.parts, columns, strict=True):
            holders = max(world // part.units, 1)
            joined += [_equal_copy(name, copies[i : i + holders]) for i in range(0, world, holders)]
        return torch.cat(joined, self.dim)


Cut = Replicate | Split


def shared_name(name: str) -> str:
    """Name in memory of the replicated parts of a parameter whose other parts are cut."""
    return name.replace(".", "_") + "_shared"


def check_tp(where: str, cuts: Iterable[Cut], world: int) -> None:
    """Raise ConfigError, naming the legal tp, when `world` ranks cannot cut all parts."""
    parts = {p for cut in cuts if isinstance(cut, Split) for p in cut.parts}
    if all(p.is_legal(world) for p in parts):
        return
    rules = sorted({p.rule for p in parts})
    most = max(p.units for p in parts)
    legal = [str(n) for n in range(1, most + 1) if all(p.is_legal(n) for p in parts)]
    ways = " or ".join(filter(None, [", ".join(legal[:-1]), legal[-1]]))
    raise ConfigError(f"{where}: tp={world} must {', and '.join(rules)}. Use tp={ways}.")


def _equal_copy(name: str, copies: list[Tensor]) -> Tensor:
    """The first of several copies that must be equal to the bit."""
    for other in copies[1:]:
        if not torch.equal(copies[0], other):
            raise CheckpointError(
                f"{name}: its replicated copies differ between tensor-parallel ranks; "
                "they must be equal. Train with the gradient sums that the layer's tp_plan asks "
                "for, or load an earlier checkpoint."
            )
    return copies[0]
