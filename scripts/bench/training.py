"""The whole model's steps that train.py times, ours and mamba-ssm's."""

import argparse
import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from decode import config_of, model_of, peer_of
from measure import Clock, spread, sync
from torch import Tensor, nn

from hybridzoo.kernels.dispatch import Op
from hybridzoo.layers import Sequence
from hybridzoo.model import HybridLM
from hybridzoo.parallel.engine import set_recompute
from hybridzoo.parallel.loss import loss as loss_in_pieces

# dense bf16 of an H100 or H200 SXM, by its data sheet
PEAK_FLOPS = 989.4e12
MFU = (
    "MFU = 6 N tokens/s / 989.4e12: 2 N forward and 4 N backward a token, N every parameter (the "
    "tied embedding once, as the head); scan, convolution and optimizer are not counted."
)
# of the two sides' logits, relative in norm: the roundings of 48 layers in bf16 come to 0.04
MAX_DIFFERENCE = 0.1
N_BATCHES = 4
# what ours is to reach, theirs in the same call, at a peak no higher
RATIO = 1.4


class Size(NamedTuple):
    """Of the model, of a step, and how many steps."""

    d_model: int = 2048
    n_layers: int = 48
    vocab_size: int = 50280
    batch: int = 4
    length: int = 2048
    warm: int = 3


class Side(NamedTuple):
    """A model in two halves, and its loss of (ids, labels), (b, l) int64 each."""

    model: nn.Module
    hidden: Callable[[Tensor], Tensor]  # (b, l) -> (b, l, d)
    head: Callable[[Tensor], Tensor]  # (b, l, d) -> (b, l, vocab)
    loss: Callable[[Tensor, Tensor], Tensor]


def nats(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of both sides: in fp32, of all logits at once."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def side_of(
    model: nn.Module, hidden: Callable[[Tensor], Tensor], head: Callable[[Tensor], Tensor]
) -> Side:
    return Side(
        model.train(), hidden, head, lambda ids, labels: nats(head(hidden(ids)), labels)
    )  # fmt: skip


def ours(size: Size, args: argparse.Namespace) -> Side:
    model = model_of(config_of(*size[:3]), args, torch.bfloat16)

    def hidden(ids: Tensor) -> Tensor:
        return model.hidden(ids, None, Sequence.build(ids.shape[1]))

    return side_of(model, hidden, model.logits)


def recomputing(size: Size, args: argparse.Namespace) -> Side:
    """Ours with recompute: mixer, so that only the projections' outputs wait for the backward."""
    side = ours(size, args)
    assert isinstance(side.model, HybridLM)
    set_recompute(side.model, {"M": "mixer"})
    return side


def in_pieces(size: Size, args: argparse.Namespace) -> Side:
    """Ours with the loss of `hybridzoo train`, whose logits never exist all at once."""
    side = ours(size, args)
    model = side.model
    assert isinstance(model, HybridLM)

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        return loss_in_pieces(model, {"input_ids": ids, "labels": labels}, labels.numel())[0]

    return side._replace(loss=loss)


def theirs(size: Size, args: argparse.Namespace) -> Side | str:
    """mamba-ssm's with our weights (fused add and norm, fp32 residual), or why there is none."""
    peer, why = peer_of(model_of(config_of(*size[:3]), args, torch.bfloat16))
    return why if peer is None else side_of(peer, peer.backbone, peer.lm_head)


def batches_of(size: Size, args: argparse.Namespace) -> list[tuple[Tensor, Tensor]]:
    """Random tokens, the same on every side: (ids, labels), (b, l) each."""
    torch.manual_seed(1)
    shape = (N_BATCHES, size.batch, size.length + 1)
    tokens = torch.randint(0, size.vocab_size, shape, device=args.device)
    return [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]


def optimizer_of(side: Side, args: argparse.Namespace) -> torch.optim.AdamW:
    is_fused = args.device.type == "cuda"
    return torch.optim.AdamW(side.model.parameters(), lr=1e-4, fused=is_fused)


def measured(
    make: Callable[[Size, argparse.Namespace], Side | str],
    size: Size,
    args: argparse.Namespace,
    extra: Callable[..., dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """One pass: a model built, warmed, timed and dropped, alone on the device.

    Args:
        make: builds the side, or says why there is none.
        size: of model and step.
        args: of the command line.
        extra: what is measured of the warm side besides, as `breakdown` is.
    """
    held = _settle(args.device)
    side = make(size, args)
    if isinstance(side, str):
        return {"missing": side}
    optimizer, batches = optimizer_of(side, args), batches_of(size, args)
    logits = some_logits(side, batches[0][0])
    with picks() as backends:
        _, losses = steps(side, optimizer, batches, size.warm, args)
    sync(args.device)
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(args.device)
    clock = Clock(args.device)
    started = clock.start()
    marks, more = steps(side, optimizer, batches, args.steps, args)
    sync(args.device)
    found = _figures(marks, size, side.model)
    found |= {"peak_gib": _peak_gib(args.device), "held_before_gib": held}
    found["sm_mhz"] = clock.read(started)
    found |= {"losses": torch.stack(losses + more).tolist(), "logits": logits}
    found["backends"] = {name: sorted(some) for name, some in sorted(backends.items())}
    found["n_by_dtype"] = dict(_by_dtype(side.model))
    if extra:
        found["breakdown"] = extra(side, *batches[0], optimizer, args.device)
    return found


@torch.no_grad()
def some_logits(side: Side, ids: Tensor) -> list[float]:
    """Logits of a few tokens and ids, by which two sides are compared that never meet."""
    logits = side.head(side.hidden(ids)[:, :: max(1, ids.shape[1] // 8)])
    return logits[..., :: max(1, logits.shape[-1] // 16)].flatten().tolist()


def steps(
    side: Side,
    optimizer: torch.optim.Optimizer,
    batches: list[tuple[Tensor, Tensor]],
    n: int,
    args: argparse.Namespace,
) -> tuple[list[list[Any]], list[Tensor]]:
    """A plain loop of n steps: four marks of each, and its loss. Nothing waits for the device."""
    marks, losses = [], []
    for i in range(n):
        ids, labels = batches[i % len(batches)]
        seen = [_mark(args.device)]
        loss = side.loss(ids, labels)
        seen.append(_mark(args.device))
        loss.backward()
        seen.append(_mark(args.device))
        optimizer.step()
        seen.append(_mark(args.device))
        optimizer.zero_grad(set_to_none=True)
        marks.append(seen)
        losses.append(loss.detach())
    return marks, losses


def _mark(device: torch.device) -> Any:
    """A moment of the device's stream; of the host's clock on a CPU."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _ms(before: Any, after: Any) -> float:
    if isinstance(before, float):
        return (after - before) * 1e3
    return before.elapsed_time(after)


def _figures(marks: list[list[Any]], size: Size, model: nn.Module) -> dict[str, Any]:
    """Medians of a step and its phases, and what follows from them."""
    step = spread([_ms(seen[0], seen[3]) for seen in marks], 0.0)
    phases = {
        name: statistics.median(_ms(seen[i], seen[i + 1]) for seen in marks)
        for i, name in enumerate(("forward", "backward", "optimizer"))
    }
    tokens, n_params = size.batch * size.length, sum(p.numel() for p in model.parameters())
    without = phases["forward"] + phases["backward"]
    return {
        "n_params": n_params, "n_tokens": tokens, "n_steps": len(marks),
        "ms": step.ms, "low": step.low, "high": step.high, "phases_ms": phases,
        # from the first step's start to the last one's end: no gap between steps is left out
        "whole_loop_ms": _ms(marks[0][0], marks[-1][3]) / len(marks),
        "tokens_per_s": tokens / step.ms * 1e3,
        "tokens_per_s_without_optimizer": tokens / without * 1e3,
        "model_flops_per_s": 6 * n_params * tokens / step.ms * 1e3,
    }  # fmt: skip


def _by_dtype(model: nn.Module) -> Counter[str]:
    found: Counter[str] = Counter()
    for p in model.parameters():
        found[str(p.dtype).removeprefix("torch.")] += p.numel()
    return found


def _peak_gib(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def _settle(device: torch.device) -> float | None:
    """Free what an earlier pass held, also in circles, so that no peak counts it; GiB left."""
    gc.collect()
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device) / 2**30


@contextmanager
def picks() -> Iterator[dict[str, set[str]]]:
    """What dispatch picks until the block ends: the backends of each op that runs."""
    found: dict[str, set[str]] = {}
    pick = Op.pick

    def seen(op: Op, *inputs: Any, **options: Any) -> str:
        backend = pick(op, *inputs, **options)
        found.setdefault(op.name, set()).add(backend)
        return backend

    with mock.patch.object(Op, "pick", seen):
        yield found


def summary(passes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the passes come to: the ratio is of theirs to the mean of ours and ours again."""
    mine = [passes[name] for name in ("ours", "ours again") if "ms" in passes.get(name, {})]
    peer = passes.get("mamba-ssm", {})
    if not mine:
        return {}
    ms = statistics.fmean(p["ms"] for p in mine)
    found: dict[str, Any] = {"ours_ms": ms, "tokens_per_s": mine[0]["n_tokens"] / ms * 1e3}
    if "ms" in peer:
        # before any update: the same weights, the same tokens
        a, b = torch.tensor([mine[0]["logits"], peer["logits"]])
        found |= {"theirs_ms": peer["ms"], "ratio": peer["ms"] / ms}
        found["difference"] = float((a - b).norm() / b.norm())
        found["is_right"] = found["difference"] < MAX_DIFFERENCE
        found["bars"] = {f"ratio >= {RATIO}": found["ratio"] >= RATIO}
        if peer["peak_gib"] is not None:
            found["peak_ratio"] = max(p["peak_gib"] for p in mine) / peer["peak_gib"]
            found["bars"]["peak no higher than theirs"] = found["peak_ratio"] <= 1
    return found
