"""From stored tensors to parameters and back.

A Block says how files cut a parameter, its `cut` how ranks do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from itertools import accumulate, product
from math import prod

import torch
from torch import Tensor

from hybridzoo.checkpoint.crew import is_alone
from hybridzoo.checkpoint.pickled import PickleReader
from hybridzoo.checkpoint.reader import Reader
from hybridzoo.checkpoint.shard import DTYPE_NAMES, DTYPES
from hybridzoo.checkpoint.transfer import Piece, narrow
from hybridzoo.comm import Axis
from hybridzoo.config import HybridConfig
from hybridzoo.errors import CheckpointError
from hybridzoo.layers import Param
from hybridzoo.model import HybridLM
from hybridzoo.sharding import Split

Box = tuple[tuple[int, int], ...]

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
    box: Box
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


@dataclass(frozen=True)
class Held:
    """A box of a parameter and where it lies in a rank's tensor.

    Attributes:
        box: (start, stop) of every dimension of the parameter.
        at: where the box begins in the tensor.
    """

    box: Box
    at: tuple[int, ...]

    def of(self, tensor: Tensor) -> Tensor:
        """The box out of the rank's tensor, a view."""
        return narrow(tensor, self.at, [stop - start for start, stop in self.box])


def all_of(shape: Sequence[int]) -> Held:
    """The whole parameter, in a tensor of its shape."""
    return Held(tuple((0, n) for n in shape), (0,) * len(shape))


def shape_of(parts: Iterable[Held]) -> tuple[int, ...]:
    """Shape of the tensor that these boxes make up."""
    ends = [[at + b - a for at, (a, b) in zip(p.at, p.box, strict=True)] for p in parts]
    return tuple(map(max, zip(*ends, strict=True)))


def held(p: Param, own: str, tp: Axis, ep: Axis) -> dict[str, list[Held]]:
    """What the tensors of one rank hold of a parameter.

    Args:
        p: its declaration.
        own: its name in the terms of its layer, as its first piece is called.
        tp: the rank's place among those that cut it.
        ep: the rank's place among those that share its experts.

    Returns:
        By piece, the boxes that make it up, each of them whole on every rank that holds some of it.
    """
    cut, mine = p.cut, p.expert_range(ep) if p.experts else None
    ranges = cut.ranges(own, tp.world, tp.rank) if isinstance(cut, Split) else {own: []}
    found = {}
    for piece, spans in ranges.items():
        by_dim = [[(0, n)] for n in p.shape]
        if mine is not None:
            by_dim[0] = [(mine.start, mine.stop)]
        if isinstance(cut, Split):
            by_dim[cut.dim] = spans
        places = [accumulate((b - a for a, b in dim[:-1]), initial=0) for dim in by_dim]
        boxes = zip(product(*by_dim), product(*places), strict=True)
        found[piece] = [Held(box, at) for box, at in boxes]
    return found


def pieces(blocks: Iterable[Block], parts: Iterable[Held], tensor: Tensor) -> Iterator[Piece]:
    """Where the files hold what a rank's tensor does, for reading as for writing."""
    tensor = tensor.detach()
    for part in parts:
        for block in blocks:
            both = [
                (max(a, c), min(b, d)) for (a, b), (c, d) in zip(part.box, block.box, strict=True)
            ]
            if any(low >= high for low, high in both):
                continue
            low, sizes = [a for a, _ in both], [b - a for a, b in both]
            place = [at + a - b for at, a, (b, _) in zip(part.at, low, part.box, strict=True)]
            shape, start = block.sizes, (0,) * len(low)
            if block.start is not None:
                shape, start = list(block.shape), block.start
            begin = [s + a - b for s, a, (b, _) in zip(start, low, block.box, strict=True)]
            yield Piece(block.name, tuple(shape), tuple(begin), narrow(tensor, place, sizes))


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

    def read_into(self, target: Tensor, name: str, parts: Iterable[Held] = ()) -> None:
        """Read a parameter, or parts of it, into `target`."""
        self.reader.fill(self.pieces(target, name, parts))

    def pieces(self, target: Tensor, name: str, parts: Iterable[Held] = ()) -> Iterator[Piece]:
        """What read_into reads."""
        parts = parts or [all_of(self.params[name].shape)]
        return pieces(self.blocks[name], parts, target)

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
    tp, ep, wanted = model.parallel.tp, model.parallel.ep, list[Piece]()
    for name, p, locals_ in model.local_names():
        for piece, local in locals_.items():
            parts = held(p, next(iter(locals_)), tp, ep)[piece]
            wanted += source.pieces(model.get_parameter(local), name, parts)
    # other ranks here read the same files
    source.reader.fill(wanted, once=is_alone(model.parallel))


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
