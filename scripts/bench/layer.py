"""One Mamba-1 layer, forward and backward, ours and mamba-ssm's; see train.py."""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from decode import config_of, model_of, peer_name
from measure import FAILURES, error, import_peer, sample, sync
from torch import Tensor, nn
from training import picks

from hybridzoo.layers import Sequence

# y and dx of the two sides, relative in norm: roundings to bf16 on either come to 0.01
MAX_DIFFERENCE = 0.05


class Half(NamedTuple):
    """One side: its forward, and what gets a gradient."""

    forward: Callable[[], Tensor]
    inputs: list[Tensor]

    def whole(self, dy: Tensor) -> tuple[Tensor, ...]:
        """y, and the gradients of x and of every parameter."""
        y = self.forward()
        return y.detach(), *torch.autograd.grad(y, self.inputs, dy)


def layer(shape: tuple[int, int], d_model: int, args: argparse.Namespace) -> dict[str, Any]:
    """A row: milliseconds in the order ours, theirs, ours, and the bytes that autograd keeps."""
    b, l = shape
    module = model_of(config_of(d_model, 1, 64), args, torch.bfloat16).blocks[0].layer
    torch.manual_seed(2)
    x, dy = torch.randn(2, b, l, d_model, device=args.device).bfloat16()
    x.requires_grad_()
    ours = Half(lambda: module(x, None, Sequence.build(l)), [x, *module.parameters()])
    with picks() as backends:
        outputs = ours.whole(dy)
    row = {"batch": b, "length": l, "passes": {"ours": timed(ours, dy, args)}}
    row["backends"] = {name: sorted(some) for name, some in sorted(backends.items())}
    try:
        peer, why = peer_of(module, d_model, args)
        if peer is None:
            row["missing"] = why
        else:
            theirs = Half(lambda: peer(x), [x, *peer.parameters()])
            # y and the gradient of x: the same weights and inputs, each side's own roundings
            pairs = zip(("y", "dx"), outputs, theirs.whole(dy), strict=False)
            row["difference"] = {n: error(m, t.double())["norm"] for n, m, t in pairs}
            row["is_right"] = max(row["difference"].values()) < MAX_DIFFERENCE
            row["passes"]["theirs"] = timed(theirs, dy, args)
    # ours is measured all the same
    except FAILURES as problem:
        row["missing"] = f"fails: {problem!r}"
    row["passes"]["ours again"] = timed(ours, dy, args)
    return row | ratios(row["passes"])


def timed(side: Half, dy: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    budget = 10 if args.tiny else 600
    forward = sample([side.forward], args.device, budget)
    whole = sample([lambda: side.whole(dy)], args.device, budget)
    found = {"forward": forward._asdict(), "whole": whole._asdict()}
    return found | {"kept_bytes": kept_bytes(side.forward, args.device)}


def kept_bytes(forward: Callable[[], Tensor], device: torch.device) -> int | None:
    """Device memory after a warm forward less that before it: what its backward needs, and y."""
    if device.type != "cuda":
        return None
    sync(device)
    before = torch.cuda.memory_allocated(device)
    y = forward()
    kept = torch.cuda.memory_allocated(device) - before
    del y
    return kept


def ratios(passes: dict[str, Any]) -> dict[str, Any]:
    """Mean of ours, and of theirs to it: whole, forward, the difference of the two."""
    mine = [passes[name] for name in ("ours", "ours again")]
    found: dict[str, Any] = {"ours_ms": {}, "theirs_ms": {}, "ratio": {}}
    for part in ("forward", "backward", "whole"):
        ms = sum(_ms(p, part) for p in mine) / len(mine)
        found["ours_ms"][part] = ms
        if "theirs" in passes:
            found["theirs_ms"][part] = _ms(passes["theirs"], part)
            found["ratio"][part] = found["theirs_ms"][part] / ms
    return found


def _ms(found: dict[str, Any], part: str) -> float:
    if part == "backward":
        return found["whole"]["ms"] - found["forward"]["ms"]
    return found[part]["ms"]


@torch.no_grad()
def peer_of(
    module: nn.Module, d_model: int, args: argparse.Namespace
) -> tuple[nn.Module | None, str]:
    """mamba-ssm's layer with the same weights, or why there is none."""
    make, why = import_peer("mamba_ssm.modules.mamba_simple", "Mamba")
    if make is None:
        return None, why
    peer = make(d_model, d_state=16, d_conv=4, expand=2, device=args.device, dtype=torch.bfloat16)
    theirs = dict(peer.named_parameters())
    for name, p in module.named_parameters():
        target = theirs.pop(peer_name(name).removeprefix("backbone."))
        target.copy_(p.view_as(target))
    assert not theirs, f"not copied: {sorted(theirs)}"
    return peer, ""
