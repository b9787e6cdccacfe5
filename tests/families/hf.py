"""Variants whose reference is a class of transformers."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from tests.families.base import Variant, change_tensors, edit_config


class Logits(nn.Module):
    """A class of transformers as a function of the ids alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """(b, l) -> (b, l, vocab), without a cache."""
        return self.model(ids, use_cache=False).logits


def variant(
    classes: tuple[type[PretrainedConfig], type[PreTrainedModel]],
    options: Mapping[str, Any],
    *,
    edits: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    change: Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]] | None = None,
    alter: Callable[[PreTrainedModel], None] = lambda model: None,
    max_shard_size: str = "5GB",
    reloads: bool = True,
    seed: int = 0,
    half: bool = False,
) -> Variant:
    """A class's model under its options.

    Args:
        classes: of the config and of the model.
        options: of the config.
        edits: of config.json after save_pretrained.
        change: of the tensors after save_pretrained.
        alter: of the model before its weights are drawn.
        max_shard_size: as of save_pretrained.
        reloads: False where the class cannot say what the files say.
        seed: where the search for stable margins starts.
        half: all but A_log and D are stored in bf16.
    """
    config_class, model_class = classes

    def build() -> nn.Module:
        model = model_class(config_class(**options)).eval()
        alter(model)
        return Logits(model)

    def write(model: nn.Module, directory: Path) -> None:
        model.model.save_pretrained(directory, max_shard_size=max_shard_size)
        if edits:
            edit_config(directory, edits)
        if change:
            change_tensors(directory, lambda tensors: change(model.model, tensors))
        if half:
            edit_config(directory, lambda config: {**config, "dtype": "bfloat16"})
            change_tensors(
                directory,
                lambda tensors: {n: t if _wide(n) else t.bfloat16() for n, t in tensors.items()},
            )

    def reload(directory: Path) -> nn.Module:
        model, notes = model_class.from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
        )
        assert not any(notes.values()), notes
        return Logits(model.eval())

    prepare = round_to_bf16 if half else (lambda model: None)
    return Variant(build, write, reload if reloads else None, seed, prepare)


@torch.no_grad()
def round_to_bf16(model: nn.Module) -> None:
    """Give the reference the values that a bf16 file holds."""
    for name, p in model.named_parameters():
        if not _wide(name):
            p.copy_(p.bfloat16())


def _wide(name: str) -> bool:
    return name.endswith(("A_log", ".D"))


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json as transformers 4 wrote it: torch_dtype, and Infinity bare."""
    config = {k: v for k, v in config.items() if k not in ("dtype", "use_associative_scan")}
    if "time_step_limit" in config:
        low, high = config["time_step_limit"]
        config["time_step_limit"] = [low, float("inf") if isinstance(high, dict) else high]
    return {**config, "torch_dtype": "float32", "transformers_version": "4.39.0.dev0"}
