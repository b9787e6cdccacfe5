"""What a trainer remembers of each parameter (moments, an average), stored as the parameters are.

Tensors are named `{parameter}:{slot}` and have the parameter's full shape, so what one layout of
ranks wrote is read by any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from hybridzoo.checkpoint.copies import check_copies
from hybridzoo.checkpoint.crew import Crew
from hybridzoo.checkpoint.io import MAX_SHARD_BYTES, commit, plan
from hybridzoo.checkpoint.layout import Block, all_of, held, pieces, shape_of
from hybridzoo.checkpoint.reader import Reader, undisturbed
from hybridzoo.checkpoint.shard import DTYPE_NAMES, DTYPES, Spec
from hybridzoo.checkpoint.spread import Spread, Weights
from hybridzoo.checkpoint.transfer import Piece
from hybridzoo.checkpoint.writer import Writer
from hybridzoo.errors import CheckpointError
from hybridzoo.layers import Param
from hybridzoo.model import HybridLM


def save_slots(
    directory: str | Path,
    model: HybridLM,
    slots: Sequence[str],
    read: Callable[[str, str], Tensor],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write slots of every trained parameter, all or nothing, in at least fp32.

    Every rank that shares the model calls it and writes its own slices.

    Args:
        directory: made if missing; slots there are replaced. All ranks see it.
        model: this rank's part.
        slots: their names.
        read: this rank's tensor of a (name in the model, slot), in the parameter's shape here;
            asked in the order of model.local_names(), slot by slot.
        max_shard_bytes: size of a file.

    Raises:
        CheckpointError: as checkpoint.save's, the same on every rank.
    """

    def value(slot: str) -> Weights:
        @contextmanager
        def given(local: str) -> Iterator[Tensor]:
            yield read(local, slot)

        return given

    spread = Spread(model, Crew.of(model.parallel), trained=True)
    values = {f":{slot}": value(slot) for slot in slots}
    specs = {
        name + ending: Spec(_wide(spread.dtype(name)), p.shape)
        for name, p in spread.params.items()
        for ending in values
    }
    blocks = {name: [_block(name, spec.shape)] for name, spec in specs.items()}

    def fill(writer: Writer) -> object:
        return spread.fill(writer, blocks, values)

    layout = plan(specs, max_shard_bytes)
    commit(directory, layout, fill, texts={}, crew=spread.crew, check=check_copies)


def load_slots(
    directory: str | Path, model: HybridLM, slots: Sequence[str]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Read slots, whatever layout of ranks wrote them; each rank reads only its slices.

    Args:
        directory: where save_slots wrote.
        model: this rank's part of the same architecture.
        slots: their names.

    Returns:
        Name in the model and its slots, in at least fp32, on the parameter's device; every trained
        parameter here, in the order of model.local_names().

    Raises:
        CheckpointError: the files are not those of this architecture and these slots; raised before
            anything is read.
    """
    directory = Path(directory)
    reader = undisturbed(directory, lambda: Reader(directory))
    params = {n: p for n, p in model.config.params() if p.trained}
    _check(reader, params, slots)
    return _slots(reader, model, slots)


def _slots(
    reader: Reader, model: HybridLM, slots: Sequence[str]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    tp, ep = model.parallel.tp, model.parallel.ep
    for name, p, names in model.local_names():
        if not p.trained:
            continue
        parts = held(p, next(iter(names)), tp, ep)
        for piece, local in names.items():
            like = model.get_parameter(local)
            # not its own shape: it may be partitioned
            shape, dtype = shape_of(parts[piece]), _wide(DTYPE_NAMES[like.dtype])
            values, wanted = {}, list[Piece]()
            for slot in slots:
                values[slot] = torch.empty(shape, dtype=DTYPES[dtype], device=like.device)
                stored = [_block(f"{name}:{slot}", p.shape)]
                wanted += pieces(stored, parts[piece], values[slot])
            reader.fill(wanted)
            yield local, values


def _block(name: str, shape: tuple[int, ...]) -> Block:
    return Block(name, all_of(shape).box, shape)


def _wide(dtype: str) -> str:
    return DTYPE_NAMES[torch.promote_types(DTYPES[dtype], torch.float32)]


def _check(reader: Reader, params: dict[str, Param], slots: Sequence[str]) -> None:
    wanted = {f"{name}:{slot}": p.shape for name, p in params.items() for slot in slots}
    found = {name: spec.shape for name, spec in reader.specs.items()}
    for name in sorted(wanted.keys() ^ found.keys()):
        what = "missing" if name in wanted else "unexpected"
        raise CheckpointError(
            f"{reader.directory}: {name} is {what}; there is one tensor for each slot of each "
            "trained parameter. Resume with the recipe of the run."
        )
    for name, shape in wanted.items():
        if found[name] != shape:
            raise CheckpointError(
                f"{reader.directory / reader.file_of(name)}: {name} is {found[name]}, the config "
                f"wants {shape}. Resume with the recipe of the run."
            )
