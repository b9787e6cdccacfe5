"""Next-token loss whose logits never exist for the whole batch at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NotRequired, TypedDict

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hybridzoo.kernels.cross_entropy import cross_entropy
from hybridzoo.layers import Sequence
from hybridzoo.layers.moe import MoE
from hybridzoo.model import HybridLM

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
    """Negative log-likelihood of labels (t,) after hidden (t, d), summed.

    The backward computes each piece's logits again; the ranks send nothing for it.
    """
    tp = model.parallel.tp
    size = max(1, max_logits // max(map(len, model.config.vocab_ranges(tp.world))))
    run = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    pieces = zip(hidden.split(size), labels.split(size), strict=True)
    if tp.world == 1:
        return torch.stack([run(_nats, model, *piece) for piece in pieces]).sum()
    lse, logit = torch.cat([run(_own_columns, model, *piece) for piece in pieces], 1)
    # of all ranks: no exp overflows, and one is 1
    largest = tp.all_reduce(lse.detach(), "max")
    total, logit = tp.sum_out(torch.stack([(lse - largest).exp(), logit]))
    return (total.log() + largest - logit).where(labels != IGNORE, 0).sum()


def _nats(model: HybridLM, hidden: Tensor, labels: Tensor) -> Tensor:
    # the op gives a mean; a sum lets pieces of unequal counts add up
    n = (labels != IGNORE).sum()
    return cross_entropy(model.local_logits(hidden), labels, ignore_index=IGNORE) * n


def _own_columns(model: HybridLM, hidden: Tensor, labels: Tensor) -> Tensor:
    """(2, t): log-sum-exp of this rank's logits, and the label's logit, 0 where another has it."""
    logits = model.local_logits(hidden)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    column = labels - model.vocab_range.start
    is_elsewhere = (column < 0) | (column >= wide.shape[-1])
    index = column.masked_fill(is_elsewhere, 0)[..., None]
    logit = wide.gather(-1, index).squeeze(-1).masked_fill(is_elsewhere, 0)
    return torch.stack([wide.logsumexp(-1), logit])
