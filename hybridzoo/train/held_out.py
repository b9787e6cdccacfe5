"""The held-out loss of a model in training, over all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from hybridzoo.parallel.agree import exchange
from hybridzoo.parallel.engine import Engine
from hybridzoo.parallel.loss import Batch, expert_loads
from hybridzoo.train.data import PackedData

Loads = dict[str, list[float]]


def held_out(engine: Engine, data: PackedData) -> tuple[float, Loads]:
    """Nats a label over the held-out split, and each expert's share of the picks.

    Args:
        engine: has the model, and a recipe that says how much is read.
        data: of this rank.
    """
    with expert_loads(engine.model) as loads:
        nats, count = engine.evaluate(batches(data, engine.recipe.eval_batches))
    mine = {name: torch.stack(each).mean(0).cpu() for name, each in loads.items()}
    found: dict[str, list[Tensor]] = {}
    told = exchange((nats / max(1, count), mine))
    # of a pipeline each rank has the loads of its own layers
    for _, share in told:
        for name, mean in share.items():
            found.setdefault(name, []).append(mean)
    means = {name: torch.stack(each).mean(0).tolist() for name, each in found.items()}
    # rank 0's: what hangs on it, like the best weights' writing, is decided alike to the last bit
    return told[0][0], means


def batches(data: PackedData, limit: int) -> Iterator[Batch]:
    """This rank's share of the held-out split; or of `limit` batches of it, at even distances."""
    n_windows = 2 * data.documents("val").n_targets / data.seq_len
    n_batches = n_windows / data.batch_size
    stride = max(1, int(n_batches / (limit or math.inf)))
    return (b for i, b in enumerate(data.eval_batches("val")) if i % stride == 0)
