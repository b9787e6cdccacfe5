"""DeepSpeed's config, from the recipe and a file of the user's; and what no ranks can run."""

from __future__ import annotations

from typing import Any

from hybridzoo.comm import Axis, Parallel
from hybridzoo.config import HybridConfig
from hybridzoo.errors import ConfigError
from hybridzoo.parallel.ds_keys import check_installed, keeps_products, user_keys
from hybridzoo.parallel.engine import recompute_at
from hybridzoo.parallel.groups import check_layout
from hybridzoo.parallel.recipe import Recipe
from hybridzoo.parallel.stages import stages


def build(recipe: Recipe, dp: int) -> dict[str, Any]:
    """DeepSpeed's config of a run over `dp` data-parallel ranks; the user's keys win where legal.

    Raises:
        ConfigError: a key of the user's is unknown, cannot work here, or contradicts the recipe.
    """
    made: dict[str, Any] = {
        **_recipe_keys(recipe, dp),
        "zero_optimization": {
            "stage": recipe.parallel.zero_stage,
            # a bucket is sent while the backward makes the next; both lie in memory
            "overlap_comm": recipe.parallel.pp == 1,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
            # its linear adds the bias in place to a product that "mixer" has kept; else it spares
            # the half-precision copies of all weights
            "memory_efficient_linear": not keeps_products(recipe),
        },
        # it would wait for the GPU before every part's forward
        "timers": {"throughput": {"enabled": False}},
    }
    if not recipe.parallel.zero_stage:
        # there DeepSpeed's own norm is wrong with experts and stages: the engine clips
        made["gradient_clipping"] = 0.0
    found = user_keys(recipe, _recipe_keys(recipe, dp))
    zero = {**made["zero_optimization"], **found.pop("zero_optimization", {})}
    return {**made, **found, "zero_optimization": zero}


def check(recipe: Recipe, world: int, config: HybridConfig) -> None:
    """Refuse what `world` ranks cannot run, before any tensor is made.

    Raises:
        ConfigError: the combination, and the legal ones.
    """
    check_installed()
    spread = recipe.parallel
    check_layout(world, spread.tp, spread.pp, spread.ep)
    dp = world // (spread.tp * spread.pp)
    if recipe.batch_size % (dp * recipe.accumulate):
        raise ConfigError(
            f"batch_size: ({recipe.batch_size}) must be a multiple of dp ({dp}) x accumulate "
            f"({recipe.accumulate}). Use a multiple of {dp * recipe.accumulate}."
        )
    _check_stage(recipe, dp)
    _check_model(recipe, config)
    user_keys(recipe, _recipe_keys(recipe, dp))


def _check_stage(recipe: Recipe, dp: int) -> None:
    spread, stage = recipe.parallel, recipe.parallel.zero_stage
    where = f"parallel.zero_stage: ({stage})"
    if spread.pp > 1 and stage > 1:
        raise ConfigError(
            f"{where} cannot work with pp {spread.pp}; pipeline stages keep their gradients until "
            "the last part. Use zero_stage 0 or 1."
        )
    if stage == 3 and spread.ep > 1:
        raise ConfigError(
            f"{where} cannot work with ep {spread.ep}; DeepSpeed does not partition experts. "
            "Use zero_stage 0, 1 or 2."
        )
    if stage == 3 and recipe.ema:
        raise ConfigError(
            f"{where} cannot work with ema {recipe.ema}; no rank has all weights to average. "
            "Use zero_stage 0, 1 or 2, or ema 0."
        )
    if stage == 3 and recipe.compile:
        raise ConfigError(
            f"{where} cannot work with compile; weights are gathered between the operations of a "
            "block. Use zero_stage 0, 1 or 2, or compile: false."
        )


def _check_model(recipe: Recipe, config: HybridConfig) -> None:
    spread, length = recipe.parallel, recipe.data.seq_len
    if spread.sequence_parallel and length % spread.tp:
        raise ConfigError(
            f"data.seq_len: ({length}) must be a multiple of tp ({spread.tp}) with "
            "sequence_parallel. Change it, or leave sequence_parallel out."
        )
    if spread.ep > 1 and not any(p.experts for _, p in config.params()):
        raise ConfigError(
            f"parallel.ep: ({spread.ep}) spreads experts; this model has none. Use ep 1."
        )
    stages(config, spread.pp, spread.balance, length)
    recompute_at(config, spread.recompute)
    config.check_parallel(Parallel(tp=Axis(0, spread.tp), ep=Axis(0, spread.ep)))


def _recipe_keys(recipe: Recipe, dp: int) -> dict[str, Any]:
    return {
        "train_batch_size": recipe.batch_size,
        "train_micro_batch_size_per_gpu": recipe.batch_size // (dp * recipe.accumulate),
        "gradient_accumulation_steps": recipe.accumulate,
        "gradient_clipping": recipe.clip_norm or 0.0,
    }
