"""DeepSpeed's config: from the recipe, merged with a file of the user's; what cannot work."""

from __future__ import annotations

from typing import Any

from hybridzoo.config import HybridConfig
from hybridzoo.parallel.recipe import Recipe


def build(recipe: Recipe, dp: int) -> dict[str, Any]:
    """DeepSpeed's config of a run over `dp` data-parallel ranks."""
    stage = recipe.parallel.zero_stage
    return {
        "train_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.accumulate,
        "gradient_clipping": (recipe.clip_norm or 0.0) if stage else 0.0,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": True,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
        },
        "zero_allow_untested_optimizer": True,
    }


def check(recipe: Recipe, world: int, config: HybridConfig) -> None:
    """Raise ConfigError, naming what is legal, when `world` ranks cannot run the recipe."""
