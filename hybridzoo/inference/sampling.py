"""From next-token logits to token ids: pure filters on (b, v) fp32 logits, then one draw a row."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridzoo.errors import ConfigError


def check_sampling(
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
) -> None:
    """Refuse options that name no distribution.

    Raises:
        ConfigError: one option is out of its range; None switches top_k, top_p and min_p off.
    """
    rules = [
        ("temperature", temperature, 0 <= temperature < math.inf, "finite and >= 0; 0 is greedy"),
        ("top_k", top_k, top_k is None or top_k >= 1, "a count >= 1; None keeps every id"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "a mass, > 0 and <= 1; 1 keeps every id"),
        ("min_p", min_p, min_p is None or 0 <= min_p <= 1, "a share, 0 to 1; 0 keeps every id"),
        (
            "repetition_penalty",
            repetition_penalty,
            0 < repetition_penalty < math.inf,
            "finite and > 0; 1 is none",
        ),
    ]
    for name, value, is_legal, rule in rules:
        if not is_legal:
            raise ConfigError(f"sampling: {name} cannot be {value}; it is {rule}.")


def apply_repetition_penalty(logits: Tensor, previous: Tensor, penalty: float) -> Tensor:
    """Make ids seen before less likely (CTRL, arXiv 1909.05858, section 4.1).

    Args:
        logits: (b, v) fp32.
        previous: ids seen, (b, t) int64; -1 is ignored, repeats count once.
        penalty: divides positive logits and multiplies negative ones, so that > 1 always lowers.
    """
    b, v = logits.shape
    # one column more than the vocabulary takes the -1s
    columns = torch.where(previous < 0, v, previous)
    is_seen = torch.zeros(b, v + 1, dtype=torch.bool, device=logits.device)
    is_seen = is_seen.scatter(1, columns, True)[:, :v]
    return torch.where(is_seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """(logits - max) / temperature, (b, v): the best id is at 0, so that none overflows to NaN."""
    return (logits - logits.amax(-1, keepdim=True)) / temperature


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """-inf on all but the `top_k` best ids of each row; of equals the lower ids stay."""
    order = logits.argsort(dim=-1, descending=True, stable=True)
    return logits.scatter(-1, order[:, top_k:], -math.inf)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """-inf outside the smallest set of best ids with mass >= top_p (arXiv 1904.09751, eq. 2).

    Mass is summed in float64. The best id always stays; of equals the lower ids come first.
    """
    if top_p == 1.0:
        # the rounded sum may reach 1 before the last token does
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    mass = ordered.softmax(-1, dtype=torch.float64).cumsum(-1)
    # a token goes when those before it have the mass already
    mass_before = F.pad(mass[:, :-1], (1, 0))
    return logits.scatter(-1, order, ordered.masked_fill(mass_before >= top_p, -math.inf))


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """-inf where the probability is below min_p times the best one's (arXiv 2407.01082)."""
    if min_p == 0.0:
        return logits
    floor = logits.amax(-1, keepdim=True) + math.log(min_p)
    return logits.masked_fill(logits < floor, -math.inf)


def draw(
    logits: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None
) -> Tensor:
    """One id a row from softmax(logits): the first of v exponential clocks, argmax_i p_i / e_i.

    Row i reads its own v numbers of the generator, so the other rows' logits never change its
    draw; with a generator a row, neither does their number. An id of probability 0 never wins, as
    an inverse CDF summed in parallel would let it. The clocks are float64: in fp32, ids of
    probability below 1e-7 would lose their chance.

    Args:
        logits: (b, v) fp32; -inf is probability 0.
        generator: on the logits' device; b * v numbers are taken from it. Or b of them, one a row.

    Returns:
        (b,) int64.
    """
    clocks = torch.empty(logits.shape, dtype=torch.float64, device=logits.device)
    if isinstance(generator, Sequence):
        for row, own in zip(clocks, generator, strict=True):
            row.exponential_(generator=own)
    else:
        clocks.exponential_(generator=generator)
    return (logits - clocks.log()).argmax(-1)


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    previous: Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Next ids: repetition penalty, temperature, top_k, top_p, min_p, then one draw a row.

    Nothing here waits for the device.

    Args:
        logits: (b, v), any float dtype; computed in fp32.
        temperature: divides the logits; 0 takes the best id, of equals the lowest, without a draw.
        top_k: keep so many best ids.
        top_p: keep the smallest set of best ids with at least this mass.
        min_p: keep ids with at least this share of the best one's probability.
        repetition_penalty: > 1 makes the ids in `previous` less likely.
        previous: prompt and generated ids, (b, t) int64, -1 = ignore; for repetition_penalty.
        generator: on the logits' device, or one a row; one seed gives one sequence of draws.

    Returns:
        (b,) int64.

    Raises:
        ConfigError: an option is out of its range, or repetition_penalty has no `previous`.
    """
    check_sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    logits = logits.float()
    if repetition_penalty != 1.0:
        if previous is None:
            raise ConfigError(
                f"sampling: repetition_penalty ({repetition_penalty}) has no ids to read; they "
                "come in `previous`. Pass them, or use 1."
            )
        logits = apply_repetition_penalty(logits, previous, repetition_penalty)
    if temperature == 0:
        return logits.argmax(-1)
    logits = apply_temperature(logits, temperature)
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    if min_p is not None:
        logits = keep_min_p(logits, min_p)
    return draw(logits, generator)
