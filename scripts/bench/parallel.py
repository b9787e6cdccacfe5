"""Two GPUs against one: the same losses, and how many tokens a second.

    torchrun --nproc-per-node 2 scripts/bench/parallel.py OUT.json [--models jamba] [--tiny]

For a Jamba-style and a Mamba-2-style model of about a billion parameters: logits and a loss curve
of TP=2 against one GPU, then tokens a second of one GPU, TP=2 (with and without sequence
parallelism), PP=2 with 8 micro-batches, and ZeRO-1 over DP=2 (twice the batch). Beside each the
floor: half of one GPU's time (for DP all of it) plus the bytes on the link at its bandwidth.
"""

import argparse
import gc
import json
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from hybridzoo.checkpoint import load, save
from hybridzoo.comm import SINGLE
from hybridzoo.config import HybridConfig
from hybridzoo.model import HybridLM
from hybridzoo.parallel.engine import Engine, initialize
from hybridzoo.parallel.groups import finish, init
from hybridzoo.parallel.optim import lr_at
from hybridzoo.parallel.recipe import DataRecipe, ParallelRecipe, Recipe
from hybridzoo.parallel.stages import stages
from hybridzoo.tokenizer import load_tokenizer
from hybridzoo.train.data import PackedData

# NAME: pattern, its mixer
MODELS = {
    "jamba": (
        "2(MF ME MF ME AF ME MF ME)",
        {"kind": "mamba1", "d_state": 16, "x_norm": "learned"},
    ),
    "mamba2": (
        "2(MF MF MF MF AF MF MF MF)",
        {"kind": "mamba2", "d_state": 128, "n_groups": 8, "head_dim": 64},
    ),
}
# NCCL's all-reduce of 16 MiB and more between the two, NVLink NV18, measured on this machine's kind
LINK_BYTES_PER_S = 2.16e11


def config_of(name: str, is_tiny: bool) -> HybridConfig:
    pattern, mixer = MODELS[name]
    d, vocab_size = (128, 320) if is_tiny else (2048, 32768)
    layers = {
        "M": mixer | ({"head_dim": d // 32} if "head_dim" in mixer else {}),
        "A": {"kind": "attention", "n_heads": 16, "n_kv_heads": 4, "head_dim": d // 16},
        "F": {"kind": "mlp", "d_ff": d * 11 // 4},
        "E": {"kind": "moe", "d_ff": d * 11 // 8, "n_experts": 4, "top_k": 2},
    }
    layers = {letter: layer for letter, layer in layers.items() if letter in pattern}
    return HybridConfig(name=name, d_model=d, vocab_size=vocab_size, pattern=pattern, layers=layers)


def recipe_of(
    batch: int, length: int, accumulate: int, steps: int, precision: str = "bf16", **spread
) -> Recipe:
    return Recipe(
        model="in memory", output="none", data=DataRecipe(source="shakespeare", seq_len=length),
        steps=steps, batch_size=batch, accumulate=accumulate, lr=1e-4, warmup_steps=10,
        precision=precision, parallel=ParallelRecipe(**spread),
    )  # fmt: skip


def engine_of(directory: Path, config: HybridConfig, recipe: Recipe, device: torch.device):
    """The engine of a layout, from weights on disk; None on ranks that do not take part."""
    spread = recipe.parallel
    if spread == ParallelRecipe(zero_stage=0):
        if dist.get_rank():
            return None
        return Engine(load(directory, device=device, dtype=torch.float32), recipe)
    parallel = init(
        tp=spread.tp, pp=spread.pp, ep=spread.ep, sequence_parallel=spread.sequence_parallel
    )
    stage = None
    if spread.pp > 1:
        stage = stages(config, spread.pp, spread.balance)[parallel.pp.rank]
    model = load(directory, device=device, dtype=torch.float32, parallel=parallel, stage=stage)
    return initialize(model, recipe)


def batches_of(data: PackedData, recipe: Recipe, step: int):
    n = recipe.accumulate
    return [data.batch_at(step * n + i) for i in range(n)]


def data_of(engine: Engine, recipe: Recipe) -> PackedData:
    dp = engine.parallel.dp
    return PackedData(
        "shakespeare", load_tokenizer("bytes"), seq_len=recipe.data.seq_len,
        batch_size=recipe.batch_size // recipe.accumulate, rank=dp.rank, world=dp.world,
    )  # fmt: skip


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free() -> None:
    # DeepSpeed's engines hold themselves in circles
    gc.collect()
    torch.cuda.empty_cache()
    dist.barrier()


def curve(engine: Engine | None, recipe: Recipe) -> list[tuple[float, float]]:
    if engine is None:
        return []
    data = data_of(engine, recipe)
    found = [
        engine.step(batches_of(data, recipe, i), lr_at(recipe, i)) for i in range(recipe.steps)
    ]
    return [(o.nats, o.norm) for o in found]


def timed(engine: Engine | None, recipe: Recipe, device: torch.device) -> dict:
    """Median seconds of a step after two warm ones, and the highest memory of this rank."""
    if engine is None:
        return {}
    data, seconds = data_of(engine, recipe), []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for i in range(recipe.steps + 2):
        batches = batches_of(data, recipe, i)
        sync(device)
        start = time.perf_counter()
        engine.step(batches, recipe.lr)
        sync(device)
        seconds.append(time.perf_counter() - start)
    seconds = seconds[2:]
    tokens = recipe.batch_size * recipe.data.seq_len
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    middle = statistics.median(seconds)
    return {
        "step_ms": middle * 1e3, "fastest_ms": min(seconds) * 1e3, "slowest_ms": max(seconds) * 1e3,
        "tokens_per_s": tokens / middle, "peak_gib": peak,
    }  # fmt: skip


def link_bytes(config: HybridConfig, recipe: Recipe) -> int:
    """Bytes that a rank must send over the link in a step, of two ranks, as our collectives do."""
    spread, d = recipe.parallel, config.d_model
    tokens = recipe.batch_size * recipe.data.seq_len
    if spread.tp > 1:
        # an all-reduce of two ranks sends its size once: bf16, one in and one out of each place,
        # embedding and head
        return 2 * tokens * d * 2 * (len(config.places) + 1)
    if spread.pp > 1:
        return 2 * tokens * d * 4
    # gradients reduced, parameters gathered, fp32
    return 2 * 4 * config.n_params() // 2


def logits_of(directory: Path, config: HybridConfig, device: torch.device) -> dict:
    ids = torch.arange(2 * 512, device=device).reshape(2, 512) % 256
    parallel, found = init(tp=2), {}
    for dtype in (torch.float32, torch.bfloat16):
        two = load(directory, device=device, dtype=dtype, parallel=parallel)
        with torch.no_grad():
            shared = two(ids).float()
        del two
        if dist.get_rank() == 0:
            with torch.no_grad():
                alone = load(directory, device=device, dtype=dtype)(ids).float()
                if dtype is torch.float32:
                    truth = alone
            found[str(dtype)] = {
                "max_difference": (shared - alone).abs().max().item(),
                "rms_difference": (shared - alone).square().mean().sqrt().item(),
                "rms_logit": alone.square().mean().sqrt().item(),
                "rms_error_of_one": (alone - truth).square().mean().sqrt().item(),
                "rms_error_of_two": (shared - truth).square().mean().sqrt().item(),
            }
        dist.barrier()
    return found


LAYOUTS = {
    "one GPU": {"zero_stage": 0},
    "tp=2": {"tp": 2},
    "tp=2 sequence_parallel": {"tp": 2, "sequence_parallel": True},
    "pp=2, 8 micro-batches": {"pp": 2, "balance": "auto"},
    "dp=2 zero 1": {"zero_stage": 1},
}


def bench(name: str, args: argparse.Namespace, device: torch.device) -> dict:
    config, folder = config_of(name, args.tiny), Path("/tmp/hybridzoo-bench") / name
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        with torch.device(device):
            save(HybridLM(config, device=device, parallel=SINGLE), folder)
    dist.barrier()
    length, batch = (64, 8) if args.tiny else (2048, 16)
    found = {"n_params": config.n_params(), "logits": logits_of(folder, config, device)}
    curves = {}
    # how far bf16 lies from fp32 on one GPU is its noise, in which tp=2 must stay
    for precision in ("fp32", "bf16"):
        for layout in ("one GPU", "tp=2"):
            recipe = recipe_of(4, length // 2, 1, args.steps, precision, **LAYOUTS[layout])
            curves[f"{layout} {precision}"] = curve(
                engine_of(folder, config, recipe, device), recipe
            )
            free()
    found["curves"] = curves
    times = {}
    for layout, spread in LAYOUTS.items() if args.timed else ():
        weak = 2 if "dp" in layout else 1
        accumulate = 8 if "pp" in layout else 4 if not args.tiny else 1
        recipe = recipe_of(batch * weak, length, accumulate, args.timed, **spread)
        times[layout] = timed(engine_of(folder, config, recipe, device), recipe, device)
        free()
    if times and dist.get_rank() == 0:
        one = times["one GPU"]
        for layout, row in times.items():
            if layout == "one GPU":
                continue
            weak = 2 if "dp" in layout else 1
            recipe = recipe_of(batch * weak, length, 1, 1, **LAYOUTS[layout])
            bubble = 9 / 8 if "pp" in layout else 1.0
            compute = one["step_ms"] * weak / 2 * bubble
            link = link_bytes(config, recipe) / LINK_BYTES_PER_S * 1e3
            row |= {
                "speedup": row["tokens_per_s"] / one["tokens_per_s"],
                "compute_floor_ms": compute, "link_floor_ms": link,
                "floor_over_time": (compute + link) / row["step_ms"],
            }  # fmt: skip
    return found | {"times": times, "batch": batch, "length": length}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--timed", type=int, default=5)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    init(tp=2)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    report = {"device": str(torch.cuda.get_device_name() if device.type == "cuda" else "CPU")}
    for name in args.models:
        report[name] = bench(name, args, device)
        if dist.get_rank() == 0:
            args.out.write_text(json.dumps(report, indent=1))
            print(name, json.dumps(report[name]["times"], indent=1), file=sys.stderr)
    finish()


if __name__ == "__main__":
    main()
