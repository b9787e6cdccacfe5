"""Tiny random models whose every tensor matters, and a reference's answers for them."""

import copy
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hybridzoo.checkpoint import convert, load
from hybridzoo.model import HybridLM

VOCAB, LENGTH, N_GREEDY = 128, 21, 16


@dataclass(frozen=True)
class Variant:
    """One tiny model of a family.

    Attributes:
        build: the reference, in eval mode; its forward maps ids (b, l) to logits (b, l, vocab).
        write: writes config.json and weights as they are published.
        reload: reads a directory that we wrote without source_layout back into a reference, and
            asserts that no tensor is missing or left over; None where there is no such class.
        seed: where the search for stable margins starts, so that a run does not search.
        prepare: changes the drawn weights, such as rounding those that are stored in bf16.
    """

    build: Callable[[], nn.Module]
    write: Callable[[nn.Module, Path], None]
    reload: Callable[[Path], nn.Module] | None
    seed: int = 0
    prepare: Callable[[nn.Module], None] = lambda model: None


@dataclass(frozen=True)
class Family:
    """A family's tiny models, and what each key of its config.json does.

    Attributes:
        layout: our name of it.
        variants: by name; `every` has every option off its default.
        keys: the keys of config.json that the converter reads.
        moves: key -> a value that must move the logits of `every`, or be refused.
        idle: key -> a value that must leave them as they are.
    """

    layout: str
    variants: Mapping[str, Variant]
    keys: frozenset[str]
    moves: Mapping[str, Any]
    idle: Mapping[str, Any]


@dataclass
class Tiny:
    """A directory as published and the reference's answers for it.

    Attributes:
        directory: config.json and weights.
        ids: (2, 21).
        logits: (2, 21, vocab), full forward.
        tolerance: 20 times the reference's own fp32 noise, at least 2e-4.
        greedy: (2, 16) ids that follow, each by a full recompute.
        model: the reference.
    """

    directory: Path
    ids: Tensor
    logits: Tensor
    tolerance: float
    greedy: Tensor
    model: nn.Module

    def edited(self, target: Path, **keys: Any) -> Path:
        """A copy of the directory with other keys in config.json."""
        shutil.copytree(self.directory, target)
        edit_config(target, lambda config: {**config, **keys})
        return target

    @torch.no_grad()
    def reference(self, ids: Tensor) -> Tensor:
        """The reference's logits of other ids."""
        return self.model(ids)


def make(variant: Variant, directory: Path) -> Tiny:
    """Build, check and save one; the first seed whose routing and greedy ids are stable."""
    for seed in range(variant.seed, variant.seed + 200):
        model = variant.build()
        randomise(model, seed)
        variant.prepare(model)
        ids = torch.randint(1, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
        margins = watch_routers(model)
        with torch.no_grad():
            logits = model(ids)
        if min(margins, default=1.0) < 1e-3:
            continue
        greedy, margin = greedy_ids(model, ids)
        if margin >= 2e-3 and min(margins, default=1.0) >= 1e-3:
            break
    else:
        raise AssertionError(f"no seed below {variant.seed + 200} gives stable margins")
    check_every_parameter_matters(model, ids)
    with torch.no_grad():
        noise = (copy.deepcopy(model).double()(ids) - logits).abs().max().item()
    variant.write(model, directory)
    return Tiny(directory, ids, logits, max(2e-4, 20 * noise), greedy, model)


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Draw every parameter, in sorted order: the classes' own ones and zeros hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    drawn = dict(sorted(model.named_parameters()))
    is_tied = not any("lm_head" in name for name in drawn)
    for name, p in drawn.items():
        normal = torch.randn(p.shape, generator=generator)
        uniform = torch.rand(p.shape, generator=generator)
        p.copy_(_drawn(name, normal, uniform, is_tied))


def _drawn(name: str, normal: Tensor, uniform: Tensor, is_tied: bool) -> Tensor:
    fan_in = normal.shape[-1]
    if name.endswith("A_log"):
        return (0.5 + 3.5 * uniform).log()
    if name.endswith(("dt_bias", "dt_proj.bias")):
        dt = (math.log(0.03) * (1 - uniform)).exp()
        return dt + (-(-dt).expm1()).log()
    if name.endswith(".D"):
        return 1 + 0.3 * normal
    if name.endswith("conv1d.weight"):
        return normal * 0.6 / (fan_in / 4) ** 0.5
    if normal.ndim == 1:
        return 0.2 * normal + (1.0 if "norm" in name and not name.endswith("bias") else 0.0)
    if "embed" in name:
        return normal * (0.15 if is_tied else 0.5)
    return normal * (2.0 if "router" in name else 1.0) / fan_in**0.5


def watch_routers(model: nn.Module) -> list[float]:
    """A list to which each forward adds the least gap between the last pick and the next score."""
    margins: list[float] = []

    def note(module, _, outputs):
        scores = outputs[0].float().softmax(-1).sort(-1, descending=True).values
        k = module.top_k
        if k < scores.shape[-1]:
            margins.append((scores[..., k - 1] - scores[..., k]).min().item())

    for name, module in model.named_modules():
        if name.endswith("router"):
            module.register_forward_hook(note)
    return margins


@torch.no_grad()
def greedy_ids(model: nn.Module, ids: Tensor) -> tuple[Tensor, float]:
    """16 greedy ids by full recompute, and the smallest lead of the best over the second."""
    start, lead = ids.shape[1], math.inf
    for _ in range(N_GREEDY):
        top = model(ids)[:, -1].topk(2)
        lead = min(lead, (top.values[:, 0] - top.values[:, 1]).min().item())
        ids = torch.cat([ids, top.indices[:, :1]], 1)
    return ids[:, start:], lead


@torch.enable_grad()
def check_every_parameter_matters(model: nn.Module, ids: Tensor) -> None:
    """A random projection of the logits has a gradient above 1e-4 in every parameter."""
    logits = model(ids)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    (logits * weights).sum().backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-4]
    assert not idle, idle
    model.zero_grad(set_to_none=True)


def is_pickled(directory: Path) -> bool:
    """Whether load() refuses a directory because of what its weights are stored in."""
    return (directory / "pytorch_model.bin").exists()


def opened(directory: Path, **options: Any) -> HybridLM:
    """load(), of pickled weights by way of our own layout."""
    if not is_pickled(directory):
        return load(directory, **options)
    with tempfile.TemporaryDirectory() as native:
        convert(directory, native, from_pickle=True)
        return load(native, **options)


def change_tensors(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Rewrite the single file; `change` maps its tensors to others."""
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def rename_tensors(directory: Path, rename: Callable[[str], str]) -> None:
    """Rewrite the single file with other names."""
    change_tensors(directory, lambda tensors: {rename(n): t for n, t in tensors.items()})


def edit_config(directory: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Rewrite config.json; `change` maps the old keys to the new ones."""
    path = directory / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text())), indent=2) + "\n")
