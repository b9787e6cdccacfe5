"""Whether training by the chosen kernels is right: gradients against float64's; see train.py."""

import argparse
import re
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from decode import WORSE, config_of, model_of
from measure import error
from torch import Tensor

from hybridzoo.kernels.dispatch import list_ops, use
from hybridzoo.model import HybridLM


def check(args: argparse.Namespace) -> dict[str, Any]:
    """Errors of a small model's gradients against float64's: the chosen kernels', and torch's.

    By the parameter's name, over all layers: root mean square of the relative errors.
    """
    config = config_of(64 if args.tiny else 512, 4, 512)
    model = model_of(config, args, torch.bfloat16)
    truth = model_of(config, args, torch.float64)
    truth.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    tokens = torch.randint(0, config.vocab_size, (2, 98), device=args.device)
    with use(**dict.fromkeys(list_ops(), "reference")):
        wanted, plain = _gradients(truth, tokens), _gradients(model, tokens)
    found = _gradients(model, tokens)
    alike: dict[str, list[str]] = {}
    for key in wanted:
        alike.setdefault(re.sub(r"^blocks\.\d+\.", "blocks.", key), []).append(key)
    errors = {
        name: {
            side: statistics.fmean(error(g[k], wanted[k])["norm"] ** 2 for k in keys) ** 0.5
            for side, g in (("ours", found), ("torch", plain))
        }
        for name, keys in alike.items()
    }
    is_right = all(e["ours"] <= WORSE * e["torch"] for e in errors.values())
    return {"errors": errors, "is_right": is_right}


def _gradients(model: HybridLM, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    logits = model(tokens[:, :-1])
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    F.cross_entropy(wide.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
