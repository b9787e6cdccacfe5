"""From stored tensors to parameters and back.

A Block says how files cut a parameter, its `cut` how ranks do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from hybridzoo.checkpoint.pickled import PickleReader
from hybridzoo.checkpoint.reader import Reader
from hybridzoo.checkpoint.shard import DTYPE_NAMES, DTYPES
from hybridzoo.checkpoint.transfer import Piece, narrow
from hybridzoo.config import HybridConfig
from hybridzoo.errors import CheckpointError
from hybridzoo.model import HybridLM
from hybridzoo.sharding import Replicate

WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Block:
    """One stored tensor and the box of a canonical parameter that it holds.

    Attributes:
        name: the stored tensor.
        box: (start, stop) of every dimension of the parameter.
        shape: the stored tensor's.
        start: where the box begins in a stored tensor that holds more than it; None where the box
            is all of it, up to dimensions of size one.
    """

    name: str
    box: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]
    start: tuple[int, ...] | None = None

    @property
    def sizes(self) -> list[int]:
        """The box's shape."""
        return [stop - start for start, stop in self.box]

    def of_param(self, full: Tensor) -> Tensor:
        """The box out of the whole parameter, a view."""
        return narrow(full, [start for start, _ in self.box], self.sizes)

    def of_stored(self, stored: Tensor) -> Tensor:
        """The box out of the stored tensor, a view."""
        if self.start is None:
            return stored.view(self.sizes)
        return narrow(stored, self.start, self.sizes)


Blocks = Mapping[str, Sequence[Block]]
Fetch = Callable[[str], Tensor]


def whole(config: HybridConfig) -> dict[str, list[Block]]:
    """The native layout: every parameter in one tensor of its own name."""
    return {
        name: [Block(name, tuple((0, n) for n in p.shape), p.shape)] for name, p in config.params()
    }


def check_dtype(dtype: torch.dtype | None) -> None:
    """Refuse a dtype that weights cannot have; None is none asked for."""
    if dtype is not None and DTYPE_NAMES.get(dtype) not in WEIGHT_DTYPES:
        raise CheckpointError(
            f"dtype: not a weight's ({dtype}); weights are one of {', '.join(WEIGHT_DTYPES)}. "
            "Use torch.bfloat16 or torch.float32."
        )


class Source:
    """A checkpoint on disk, seen as canonical parameters.

    Args:
        config: the architecture; every parameter of it must be there in full.
        reader: the files.
        blocks: which stored tensors make up each parameter.
        ignored: stored tensors that belong to no parameter.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or of another shape or kind; nothing was
            allocated.
    """

    def __init__(
        self,
        config: HybridConfig,
        reader: Reader | PickleReader,
        blocks: Blocks,
        ignored: set[str] | None = None,
    ) -> None:
        self.config, self.reader, self.blocks = config, reader, blocks
        self.params = dict(config.params())
        self._check(ignored or set())
        # a fused parameter's pieces follow each other in a file's order: two parameters interleave
        # at most.
        self.fetch: Fetch = lru_cache(2)(self._fetch)

    def dtype(self, name: str) -> str:
        """Stored dtype of a parameter; where its pieces differ, one that holds them all."""
        stored = (DTYPES[self.reader.specs[b.name].dtype] for b in self.blocks[name])
        return DTYPE_NAMES[reduce(torch.promote_types, stored)]

    def main_dtype(self) -> torch.dtype:
        """The dtype of most elements, parameters that are always fp32 aside."""
        count: Counter[str] = Counter()
        for name, p in self.params.items():
            if not p.fp32:
                count[self.dtype(name)] += prod(p.shape)
        return DTYPES[count.most_common(1)[0][0]]

    def read_into(
        self, target: Tensor, name: str, dim: int = 0, spans: Sequence[tuple[int, int]] = ()
    ) -> None:
        """Read a parameter, or its (start, stop) slices along `dim`, into `target`."""
        self.reader.fill(self.pieces(target, name, dim, spans))

    def pieces(
        self, target: Tensor, name: str, dim: int = 0, spans: Sequence[tuple[int, int]] = ()
    ) -> Iterator[Piece]:
        """What read_into reads."""
        target, at = target.detach(), 0
        for start, stop in spans or [(0, self.params[name].shape[dim])]:
            for block in self.blocks[name]:
                lo, hi = max(block.box[dim][0], start), min(block.box[dim][1], stop)
                if lo >= hi:
                    continue
                first, sizes = [a for a, _ in block.box], block.sizes
                first[dim], sizes[dim] = at + lo - start, hi - lo
                shape, begin = block.sizes, [0] * len(sizes)
                if block.start is not None:
                    shape, begin = list(block.shape), list(block.start)
                begin[dim] += lo - block.box[dim][0]
                place = narrow(target, first, sizes)
                yield Piece(block.name, tuple(shape), tuple(begin), place)
            at += stop - start

    def _fetch(self, name: str) -> Tensor:
        full = torch.empty(self.params[name].shape, dtype=DTYPES[self.dtype(name)])
        self.read_into(full, name)
        return full

    def _check(self, ignored: set[str]) -> None:
        specs = self.reader.specs
        used = {b.name for blocks in self.blocks.values() for b in blocks}
        where = self.reader.directory
        if missing := sorted(used - specs.keys()):
            raise CheckpointError(
                f"{where}: {_some(missing)} missing; the config needs every parameter. Is this "
                "config.json these weights'?"
            )
        if unexpected := sorted(specs.keys() - used - ignored):
            raise CheckpointError(
                f"{where}: {_some(unexpected)} not in the config; every tensor must have its "
                "place. Is this config.json these weights'?"
            )
        for blocks in self.blocks.values():
            for block in blocks:
                spec, file = specs[block.name], self.reader.file_of
                if spec.shape != block.shape:
                    raise CheckpointError(
                        f"{where / file(block.name)}: {block.name} is {spec.shape}, the config "
                        f"wants {block.shape}. Is this config.json these weights'?"
                    )
                if spec.dtype not in WEIGHT_DTYPES:
                    raise CheckpointError(
                        f"{where / file(block.name)}: {block.name} is {spec.dtype}; weights are "
                        f"one of {', '.join(WEIGHT_DTYPES)}. Use an unquantised checkpoint."
                    )


def first_rows(source: Source, n: int) -> Source:
    """The same checkpoint with the first n tokens alone; it no longer remembers its files."""
    blocks = dict(source.blocks)
    for name in {"embed.weight", "head.weight"} & blocks.keys():
        blocks[name] = [replace(b, box=((0, n), b.box[1]), start=(0, 0)) for b in blocks[name]]
    used = {block.name for cut in blocks.values() for block in cut}
    config = source.config.with_options(vocab_size=n, source_layout=None)
    return Source(config, source.reader, blocks, source.reader.specs.keys() - used)


@torch.no_grad()
def load_into(model: HybridLM, source: Source) -> None:
    """Fill a model's parameters, each in its dtype; each rank reads its own slices."""
    tp, wanted = model.parallel.tp, list[Piece]()
    for name, p, pieces in model.local_names():
        # the first piece has the parameter's own name, in the terms of its layer.
        own = next(iter(pieces))
        for piece, local in pieces.items():
            target = model.get_parameter(local)
            if isinstance(p.cut, Replicate):
                wanted += source.pieces(target, name)
            else:
                spans = p.cut.ranges(own, tp.world, tp.rank)[piece]
                wanted += source.pieces(target, name, p.cut.dim, spans)
    # other ranks here read the same files
    source.reader.fill(wanted, once=tp.world == 1)


def gather(model: HybridLM) -> Iterator[tuple[str, Tensor]]:
    """Every canonical parameter in full, a tied one once; with ranks complete on rank 0 only."""
    gathered = Gathered(model)
    for name in gathered.params:
        yield name, gathered.fetch(name)


class Gathered:
    """Canonical parameters of a model by name; every rank must ask for the same ones in turn."""

    def __init__(self, model: HybridLM) -> None:
        self.model, self.config = model, model.config
        self.table = {name: (p, pieces) for name, p, pieces in model.local_names()}
        self.params = {name: p for name, (p, _) in self.table.items()}
        self.fetch: Fetch = lru_cache(2)(self._fetch)

    def dtype(self, name: str) -> str:
        """Dtype of a parameter in the model."""
        local = next(iter(self.table[name][1].values()))
        return DTYPE_NAMES[self.model.get_parameter(local).dtype]

    def _fetch(self, name: str) -> Tensor:
        p, pieces = self.table[name]
        tp = self.model.parallel.tp
        mine = {piece: self.model.get_parameter(local).detach() for piece, local in pieces.items()}
        own = next(iter(pieces))
        if tp.world == 1:
            return mine[own]
        shards: list[dict[str, Tensor]] = [{} for _ in range(tp.world)]
        for piece, tensor in mine.items():
            copies = [torch.empty_like(tensor) for _ in shards] if tp.rank == 0 else None
            dist.gather(tensor.contiguous(), copies, group=tp.group, group_dst=0)
            for shard, copy in zip(shards, copies or [], strict=False):
                shard[piece] = copy
        return p.cut.join(own, shards) if tp.rank == 0 else mine[own].new_empty(p.shape)


def _some(names: list[str]) -> str:
    """The first few names and how many more there are, with the verb."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} {'are' if len(names) > 1 else 'is'}"


def unfused(fetch: Fetch, blocks: Blocks) -> Fetch:
    """By stored name: each stored tensor out of the parameters whose boxes make it up."""
    home: dict[str, list[tuple[str, Block]]] = {}
    for name, cut in blocks.items():
        for block in cut:
            home.setdefault(block.name, []).append((name, block))

    def stored(name: str) -> Tensor:
        boxes = home[name]
        canonical, block = boxes[0]
        if block.start is None:
            return block.of_param(fetch(canonical)).reshape(block.shape)
        full = fetch(canonical).new_empty(block.shape)
        assert sum(prod(b.sizes) for _, b in boxes) == full.numel()
        for canonical, block in boxes:
            block.of_stored(full).copy_(block.of_param(fetch(canonical)))
        return full

    return stored
