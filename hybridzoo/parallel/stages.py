"""Which places of the stack each pipeline stage holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Literal

from hybridzoo.config import HybridConfig
from hybridzoo.errors import ConfigError

Cut = tuple[int, int, tuple[int, ...]]


def stages(
    config: HybridConfig, pp: int, balance: Literal["pattern", "auto"], seq_len: int = 0
) -> list[range]:
    """The places of the stack that each pipeline stage holds.

    Args:
        config: whose pattern may have cuts.
        pp: stages.
        balance: at the pattern's cuts; or "auto", such that the most expensive stage costs least.
        seq_len: tokens a sequence, by which attention costs more than its projections.

    Raises:
        ConfigError: pp stages cannot be made so.
    """
    n, cuts = len(config.places), config.expanded.cuts
    if pp > n:
        rule = "a stage holds one or more"
        raise ConfigError(f"pp: {pp} stages for {n} places; {rule}. Use pp <= {n}.")
    if balance == "auto":
        cuts = _balanced(_costs(config, seq_len), pp)
    elif pp == 1:
        cuts = ()
    elif len(cuts) + 1 != pp:
        raise ConfigError(
            f"pattern: {len(cuts) + 1} segments for pp={pp} pipeline stages; each stage is one. "
            "Set its `|` cuts, or `balance: auto`."
        )
    return [range(a, b) for a, b in pairwise((0, *cuts, n))]


def balance_line(config: HybridConfig, parts: Sequence[range], seq_len: int = 0) -> str:
    """Each stage's places and share of the cost, and the pattern that pins this cut.

    stage 0: places 0-5, 48 %; stage 1: places 6-11, 52 %; pattern: 6M | 6M
    """
    costs = _costs(config, seq_len)
    shares = [
        f"stage {i}: places {part.start}-{part.stop - 1}, "
        f"{100 * sum(costs[part.start : part.stop]) / sum(costs):.0f} %"
        for i, part in enumerate(parts)
    ]
    pinned = replace(config.expanded, cuts=tuple(part.start for part in parts[1:]))
    return "; ".join([*shares, f"pattern: {pinned.compact()}"])


def _costs(config: HybridConfig, seq_len: int) -> list[int]:
    """Forward operations of a token at each place; the head is the last one's."""
    # a token has on average half of the sequence before it
    context = seq_len // 2
    costs = [sum(b.config.flops(config.d_model, context) for b in p) for p in config.places]
    costs[-1] += 2 * config.d_model * config.vocab_size
    return costs


def _balanced(costs: Sequence[int], pp: int) -> tuple[int, ...]:
    """Where stages 1, 2, .. start, such that the largest is smallest; of equals the most even."""
    ends, n = [0, *accumulate(costs)], len(costs)
    # by the last place's end: (largest stage, sum of squares, starts) of the best cut so far
    best: dict[int, Cut] = {stop: (ends[stop], ends[stop] ** 2, ()) for stop in range(1, n + 1)}
    for stage in range(1, pp):
        longer: dict[int, Cut] = {}
        for stop in range(stage + 1, n + 1):
            for start in range(stop - 1, stage - 1, -1):
                cost = ends[stop] - ends[start]
                if stop in longer and cost > longer[stop][0]:
                    break
                largest, squares, starts = best[start]
                cut = (max(largest, cost), squares + cost**2, (*starts, start))
                longer[stop] = min(cut, longer.get(stop, cut))
        best = longer
    return best[n][2]
