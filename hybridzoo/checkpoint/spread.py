"""A model's parameters as the ranks that save it hold them: who writes what, each byte once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod

from torch import Tensor

from hybridzoo.checkpoint.copies import checksum
from hybridzoo.checkpoint.crew import Crew
from hybridzoo.checkpoint.layout import Blocks, Box, Held, held, pieces, shape_of
from hybridzoo.checkpoint.shard import DTYPE_NAMES, DTYPES
from hybridzoo.checkpoint.writer import Writer
from hybridzoo.comm import Axis
from hybridzoo.errors import CheckpointError
from hybridzoo.model import HybridLM

# a box of fewer bytes is written by one of its holders
_SHARE_BYTES = 2**20

Weights = Callable[[str], AbstractContextManager[Tensor]]


@dataclass(frozen=True)
class Claim:
    """What one rank holds.

    Attributes:
        tp: its rank and world among those that cut parameters.
        ep: among those that share experts.
        dtypes: of the parameters it holds slices of, by canonical name.
    """

    tp: tuple[int, int]
    ep: tuple[int, int]
    dtypes: Mapping[str, str]


class Spread:
    """Every rank makes the same one, then writes its slices.

    Args:
        model: this rank's part.
        crew: the ranks that save.
        weights: gives the whole tensor of a name in the model, where parameters are partitioned
            (ZeRO-3); every rank asks for all of its own in the order of local_names.
        trained: leave out the parameters that are not.

    Raises:
        CheckpointError: the ranks' parts do not make up the model, or have different dtypes.
    """

    def __init__(
        self, model: HybridLM, crew: Crew, weights: Weights | None = None, *, trained: bool = False
    ) -> None:
        self.model, self.crew, self.config = model, crew, model.config
        self.weights = weights or self._own
        everything = list(model.config.params())
        self.params = {n: p for n, p in everything if p.trained or not trained}
        self.mine = {n: (p, names) for n, p, names in model.local_names() if n in self.params}
        parallel = model.parallel
        dtypes = {
            name: DTYPE_NAMES[model.get_parameter(next(iter(names.values()))).dtype]
            for name, (_, names) in self.mine.items()
        }
        tp, ep = parallel.tp, parallel.ep
        self.claims = crew.gather(Claim((tp.rank, tp.world), (ep.rank, ep.world), dtypes))
        self.dtypes = self._agreed_dtypes()
        # the same on every rank, whichever parameters it holds
        self.places = {name: i for i, name in enumerate(self.params)}
        self.holders = self._find_holders()

    def dtype(self, name: str) -> str:
        """Dtype of a parameter in the model."""
        return self.dtypes[name]

    def fetch(self, name: str) -> Tensor:
        """A parameter in full; of one rank alone."""
        assert self.crew.world == 1
        with self.weights(name) as tensor:
            return tensor.detach().clone()

    def fill(
        self, writer: Writer, blocks: Blocks, values: Mapping[str, Weights] | None = None
    ) -> dict[tuple[str, Box], int]:
        """Write this rank's slices.

        Args:
            writer: the files.
            blocks: where each value lies in them, by parameter and the value's ending.
            values: what is written of every parameter, by an ending for its name; None is the
                parameter itself.

        Returns:
            Checksums of the boxes that other ranks hold too.
        """
        values = values or {"": self.weights}
        sums: dict[tuple[str, Box], int] = {}
        failure: OSError | CheckpointError | None = None
        for name, (p, names) in self.mine.items():
            tp, ep = self.model.parallel.tp, self.model.parallel.ep
            parts = held(p, next(iter(names)), tp, ep)
            for (piece, local), (ending, value) in product(names.items(), values.items()):
                with value(local) as tensor:
                    if failure is not None:
                        # the others may wait for this rank's share of a tensor
                        continue
                    try:
                        _check_shape(local, tensor, parts[piece])
                        for part in parts[piece]:
                            if len(self.holders[name, part.box]) > 1:
                                sums[name + ending, part.box] = checksum(part.of(tensor.detach()))
                            mine = self._share(name, part)
                            for found in pieces(blocks[name + ending], mine, tensor):
                                writer.put(found)
                    except (OSError, CheckpointError) as error:
                        failure = error
        if failure is not None:
            raise failure
        return sums

    def _share(self, name: str, part: Held) -> list[Held]:
        """The rows of a box that this rank writes of all that hold it; a small box has one writer.

        Such boxes take turns: the second parameter is its second holder's.
        """
        ranks, n_rows = (
            self.holders[name, part.box],
            part.box[0][1] - part.box[0][0] if part.box else 1,
        )
        n_bytes = _n_elements(part.box) * DTYPES[self.dtypes[name]].itemsize
        n = min(len(ranks), n_rows, -(-n_bytes // _SHARE_BYTES))
        place = (ranks.index(self.crew.rank) - self.places[name]) % len(ranks)
        if place >= n:
            return []
        if n == 1:
            return [part]
        (start, _), row = part.box[0], part.at[0]
        low, high = (n_rows * i // n for i in (place, place + 1))
        return [Held(((start + low, start + high), *part.box[1:]), (row + low, *part.at[1:]))]

    @contextmanager
    def _own(self, local: str) -> Iterator[Tensor]:
        yield self.model.get_parameter(local)

    def _agreed_dtypes(self) -> dict[str, str]:
        dtypes: dict[str, str] = {}
        for rank, claim in enumerate(self.claims):
            for name, dtype in claim.dtypes.items():
                if dtypes.setdefault(name, dtype) != dtype:
                    raise CheckpointError(
                        f"{name}: {dtype} on rank {rank}, {dtypes[name]} on one before it; a "
                        "parameter has one dtype. Cast the model on every rank alike."
                    )
        return dtypes

    def _find_holders(self) -> dict[tuple[str, Box], list[int]]:
        @lru_cache(None)
        def boxes(name: str, tp: tuple[int, int], ep: tuple[int, int]) -> list[Box]:
            parts = held(self.params[name], name, Axis(*tp), Axis(*ep)).values()
            return [part.box for piece in parts for part in piece]

        holders: dict[tuple[str, Box], list[int]] = {}
        for rank, claim in enumerate(self.claims):
            for name in claim.dtypes:
                for box in boxes(name, claim.tp, claim.ep):
                    holders.setdefault((name, box), []).append(rank)
        covered: Counter[str] = Counter()
        for name, box in holders:
            covered[name] += _n_elements(box)
        for name, p in self.params.items():
            if covered[name] != prod(p.shape):
                raise CheckpointError(
                    f"{name}: the ranks that save hold {covered[name]} of its {prod(p.shape)} "
                    "elements; together they hold the model. Save from every rank of it."
                )
        return holders


def _n_elements(box: Box) -> int:
    return prod(stop - start for start, stop in box)


def _check_shape(local: str, tensor: Tensor, parts: Sequence[Held]) -> None:
    shape = shape_of(parts)
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{local}: {tuple(tensor.shape)}, the config wants {shape} here; they must agree. Save "
            "with the config that the model was built from."
        )
