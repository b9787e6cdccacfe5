"""Next-token loss whose logits never exist for the whole batch at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NotRequired, TypedDict

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, noop_context_fn

from hybridzoo.comm import Axis
from hybridzoo.kernels.cross_entropy import cross_entropy
from hybridzoo.layers import Sequence
from hybridzoo.layers.moe import MoE
from hybridzoo.model import HybridLM
from hybridzoo.recompute import ALL_REDUCES, keeping

IGNORE = -100
# logits at once: 128 MiB in fp32
_MAX_LOGITS = 1 << 25


class Batch(TypedDict):
    """One step's tensors; the last two only with packing "documents"."""

    input_ids: Tensor
    labels: Tensor
    cu_seqlens: NotRequired[Tensor]
    max_seqlen: NotRequired[int]


def sequence(batch: Batch) -> Sequence:
    """What a batch's layers are told of it; they add their balance losses to its aux."""
    cu_seqlens, max_seqlen = batch.get("cu_seqlens"), batch.get("max_seqlen")
    length = batch["input_ids"].shape[1]
    return Sequence.build(length, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, aux=[])


def loss(
    model: HybridLM,
    batch: Batch,
    n_targets: Tensor | int,
    *,
    h: Tensor | None = None,
    max_logits: int = _MAX_LOGITS,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A batch's share of the loss of all `n_targets` labels of a step.

        loss = sum over valid t of -log p(label[t]) / n_targets + aux * valid / n_targets

    aux is what layers add (balance of experts). So the losses of a step's parts sum to that of
    the whole, whatever is padding in which part.

    Args:
        model: its own device holds the batch.
        batch: input_ids and labels, (b, l) int64, and perhaps cu_seqlens; labels -100 do not count.
        n_targets: valid labels of the step.
        h: the residual stream, (b, l, d), where a pipeline stage before this one computed it.
        max_logits: logits computed at once, again in the backward; changes memory, not the value.

    Returns:
        The loss, a scalar that has a gradient; and "nats", the summed negative log-likelihood,
        "aux" and "n_targets" of this batch, scalars without one.
    """
    labels, ctx = batch["labels"].flatten(), sequence(batch)
    if h is None:
        hidden = model.hidden(batch["input_ids"], None, ctx).flatten(0, 1)  # (t, d)
    else:
        hidden = model.finish(*model.stream(h, None, ctx)).flatten(0, 1)
    nats = _summed_nats(model, hidden, labels, max_logits)
    n_here = (labels != IGNORE).sum()
    extra = torch.stack(ctx.aux).sum() if ctx.aux else torch.zeros_like(nats)
    total = (nats + extra * n_here) / n_targets
    return total, {"nats": nats.detach(), "aux": extra.detach(), "n_targets": n_here}


@contextmanager
def expert_loads(model: HybridLM) -> Iterator[dict[str, list[Tensor]]]:
    """Until the block ends, collect what each mixture of experts' `load` was in each forward.

    Keys are the layers' names; a list has one (e,) share of picks a forward.
    """
    loads: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Callable[[MoE, tuple[Tensor, ...]], None]:
        return lambda layer, inputs: loads.setdefault(name, []).append(layer.load(inputs[0]))

    experts = [(name, layer) for name, layer in model.named_layers() if isinstance(layer, MoE)]
    hooks = [layer.register_forward_pre_hook(watch(name.rstrip("."))) for name, layer in experts]
    try:
        yield loads
    finally:
        for hook in hooks:
            hook.remove()


def _summed_nats(model: HybridLM, hidden: Tensor, labels: Tensor, max_logits: int) -> Tensor:
    """Negative log-likelihood of labels (t,) after hidden (t, d), summed piece by piece."""
    tp = model.parallel.tp
    # as many pieces on every rank, however their vocabularies differ
    size = max(1, max_logits // max(map(len, model.config.vocab_ranges(tp.world))))
    # the backward computes a piece's logits again, but never a collective
    contexts = noop_context_fn if tp.world == 1 else keeping(ALL_REDUCES)
    nats = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for tokens, target in zip(hidden.split(size), labels.split(size), strict=True):
        piece = (_nats, model, tokens, target)
        nats = nats + checkpoint(
            *piece, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
        )
    return nats


def _nats(model: HybridLM, hidden: Tensor, labels: Tensor) -> Tensor:
    # the op gives a mean; a sum lets pieces of unequal counts add up
    n, logits, tp = (labels != IGNORE).sum(), model.local_logits(hidden), model.parallel.tp
    if tp.world == 1:
        return cross_entropy(logits, labels, ignore_index=IGNORE) * n
    return cross_entropy_over(tp, logits, labels, start=model.vocab_range.start) * n


def cross_entropy_over(
    tp: Axis,
    logits: Tensor,
    targets: Tensor,
    *,
    start: int,
    ignore_index: int = IGNORE,
    z_loss: float = 0.0,
) -> Tensor:
    """What kernels.cross_entropy gives for all ranks' logits, from two small collectives.

    Args:
        tp: the ranks.
        logits: (..., v), this rank's columns.
        targets: (...), int64, over the whole vocabulary.
        start: the id of this rank's first column.
        ignore_index: as in the op.
        z_loss: as in the op.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # of all ranks: no exp overflows, and one is 1
    shifted = wide - (peak := tp.all_reduce(wide.detach().amax(-1), "max"))[..., None]
    column = targets - start
    is_elsewhere = (column < 0) | (column >= wide.shape[-1])
    index = column.masked_fill(is_elsewhere, 0)[..., None]
    target = shifted.gather(-1, index).squeeze(-1).masked_fill(is_elsewhere, 0)
    total, target = tp.sum_out(torch.stack([shifted.exp().sum(-1), target]))
    nats, is_valid = total.log() - target, targets != ignore_index
    if z_loss:
        nats = nats + z_loss * (total.log() + peak).square()
    return nats.where(is_valid, 0).sum() / is_valid.sum().clamp(min=1)
