"""DeepSpeed's config, from the recipe and a file of the user's; and what no ranks can run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

from hybridzoo.comm import Axis, Parallel
from hybridzoo.config import HybridConfig
from hybridzoo.errors import ConfigError
from hybridzoo.options import read_file, shown, suggest
from hybridzoo.parallel.recipe import Recipe

# sections of a user's file that join ours: where DeepSpeed keeps their keys
_MODELS = {
    "zero_optimization": "deepspeed.runtime.zero.config:DeepSpeedZeroConfig",
    "comms_logger": "deepspeed.comm.config:CommsLoggerConfig",
    "tensorboard": "deepspeed.monitor.config:TensorBoardConfig",
    "wandb": "deepspeed.monitor.config:WandbConfig",
    "csv_monitor": "deepspeed.monitor.config:CSVConfig",
    "comet": "deepspeed.monitor.config:CometConfig",
}
# sections without a class of their own
_SECTIONS = {
    "flops_profiler": (
        "enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules",
        "detailed", "output_file",
    ),
    "timers": ("throughput",),
}  # fmt: skip
_VALUES: dict[str, tuple[type, ...]] = {
    "communication_data_type": (str,),
    "prescale_gradients": (bool,),
    "gradient_predivide_factor": (int, float),
    "steps_per_print": (int,),
    "wall_clock_breakdown": (bool,),
    "memory_breakdown": (bool,),
    "dump_state": (bool,),
    "disable_python_gc": (bool,),
    "disable_allgather": (bool,),
    "log_level": (str,),
    "zero_allow_untested_optimizer": (bool,),
}
_PRECISION = "parameters stay fp32. Set the recipe's precision: bf16"
_OURS = "the recipe says it. Leave it out, and set {}"
_STORED = "checkpoints are hybridzoo's own. Leave it out"
_GONE = "hybridzoo does not run it. Leave it out"
# DeepSpeed's other keys: the rule and the way out
_REFUSED = {
    **dict.fromkeys(["fp16", "bf16", "bfloat16", "torch_autocast", "amp"], _PRECISION),
    "optimizer": _OURS.format("lr, betas, adam_eps and weight_decay"),
    "scheduler": _OURS.format("schedule and warmup_steps"),
    "tensor_parallel": "layers are cut by their own rules. Leave it out, and set parallel.tp",
    "expert_parallel": "experts are spread by their layer. Leave it out, and set parallel.ep",
    "sequence_parallel_size": "it would scale gradients. Set parallel.sequence_parallel",
    "seq_parallel_communication_data_type": "it belongs to sequence_parallel_size. Leave it out",
    "pipeline": "stages come from the pattern. Leave it out, and set parallel.pp and balance",
    "activation_checkpointing": "it is chosen by letter. Leave it out, and set parallel.recompute",
    "compile": "blocks are compiled one by one. Leave it out, and set compile",
    "data_types": "gradients are summed in fp32. Leave it out",
    "gradient_allreduce_op": "the loss counts on averages. Leave it out",
    "managed_gradient_accumulation": _OURS.format("accumulate"),
    "dataloader_drop_last": _OURS.format("data"),
    "vocabulary_size": "the config says it. Leave it out",
    "checkpoint": _STORED,
    "datastates_ckpt": _STORED,
    "aio": "it belongs to offloading to a disk, which hybridzoo does not do. Leave it out",
    "zero_force_ds_cpu_optimizer": "AdamW is torch's own. Leave it out",
    "use_data_before_expert_parallelism": "ep takes consecutive data-parallel ranks. Leave it out",
    **dict.fromkeys(
        (
            "autotuning compression_training curriculum_learning data_efficiency eigenvalue "
            "elasticity graph_harvesting hybrid_engine nebula progressive_layer_drop "
            "quantize_training sparse_attention sparse_gradients weight_quantization"
        ).split(),
        _GONE,
    ),
}
# keys of zero_optimization that would break the run, and the value that does not
_ZERO_REFUSED = {
    "compute_grad_norm": (True, "without a norm an update that is not finite would be applied"),
    "reduce_scatter": (True, "experts and norms count on it"),
    **dict.fromkeys(["offload_param", "offload_optimizer"], (None, "the state stays on the GPU")),
    **dict.fromkeys(["cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory"], (None,
        "the state stays on the GPU")),
    **dict.fromkeys(["zero_quantized_weights", "zero_quantized_nontrainable_weights",
        "zero_quantized_gradients"], (False, "what is sent is never rounded to integers")),
    "zero_hpz_partition_size": (1, "partitions lie over all of dp"),
    "zenflow": (None, "its updates are not those of AdamW"),
    "legacy_stage1": (False, "DeepSpeed has dropped it"),
    "elastic_checkpoint": (False, _STORED.partition(".")[0]),
}  # fmt: skip


def build(recipe: Recipe, dp: int) -> dict[str, Any]:
    """DeepSpeed's config of a run over `dp` data-parallel ranks; the user's keys win where legal.

    Raises:
        ConfigError: a key of the user's is unknown, cannot work here, or contradicts the recipe.
    """
    made: dict[str, Any] = {
        **_recipe_keys(recipe, dp),
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": recipe.parallel.zero_stage,
            # a bucket is sent while the backward makes the next; both lie in memory
            "overlap_comm": recipe.parallel.pp == 1,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
        },
    }
    if not recipe.parallel.zero_stage:
        # there DeepSpeed's own norm is wrong with experts and stages: the engine clips
        made["gradient_clipping"] = 0.0
    found = _user_keys(recipe, dp)
    zero = {**made["zero_optimization"], **found.pop("zero_optimization", {})}
    return {**made, **found, "zero_optimization": zero}


def check(recipe: Recipe, world: int, config: HybridConfig) -> None:
    """Refuse what `world` ranks cannot run, before any is started.

    Raises:
        ConfigError: the combination, and the legal ones.
    """
    spread = recipe.parallel
    if world % (spread.tp * spread.pp):
        raise ConfigError(
            f"parallel: tp {spread.tp} x pp {spread.pp} cannot share {world} ranks; the product "
            f"divides their number. Use a product of {_divisors(world)}, or start other ranks."
        )
    dp = world // (spread.tp * spread.pp)
    if dp % spread.ep:
        raise ConfigError(
            f"parallel.ep: ({spread.ep}) must divide the {dp} data-parallel ranks. "
            f"Use {_divisors(dp)}."
        )
    if recipe.batch_size % (dp * recipe.accumulate):
        raise ConfigError(
            f"batch_size: ({recipe.batch_size}) must be a multiple of dp ({dp}) x accumulate "
            f"({recipe.accumulate}). Use a multiple of {dp * recipe.accumulate}."
        )
    _check_stage(recipe, dp)
    _check_model(recipe, config)
    if spread.deepspeed is not None:
        _user_keys(recipe, dp)


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
    if spread.sequence_parallel and spread.tp == 1:
        raise ConfigError(
            "parallel.sequence_parallel: (true) needs tp above 1; its ranks share the tokens. "
            "Set tp, or leave it out."
        )
    if spread.sequence_parallel and length % spread.tp:
        raise ConfigError(
            f"data.seq_len: ({length}) must be a multiple of tp ({spread.tp}) with "
            "sequence_parallel. Change it, or leave sequence_parallel out."
        )
    if spread.ep > 1 and not any(p.experts for _, p in config.params()):
        raise ConfigError(
            f"parallel.ep: ({spread.ep}) spreads experts; this model has none. Use ep 1."
        )
    config.check_parallel(Parallel(tp=Axis(0, spread.tp), ep=Axis(0, spread.ep)))


def _recipe_keys(recipe: Recipe, dp: int) -> dict[str, Any]:
    return {
        "train_batch_size": recipe.batch_size,
        "train_micro_batch_size_per_gpu": recipe.batch_size // (dp * recipe.accumulate),
        "gradient_accumulation_steps": recipe.accumulate,
        "gradient_clipping": recipe.clip_norm or 0.0,
    }


def _user_keys(recipe: Recipe, dp: int) -> dict[str, Any]:
    """What the user's file adds to our config, checked."""
    path = recipe.parallel.deepspeed
    if path is None:
        return {}
    options, ours, found = read_file(path), _recipe_keys(recipe, dp), {}
    if not isinstance(options, Mapping):
        raise ConfigError(f"{path}: expected DeepSpeed's keys ({shown(options)}). Write a mapping.")
    for key, value in options.items():
        where = f"{path}: {key}"
        if key in ours:
            _check_equal(where, value, ours[key])
        elif key in _REFUSED:
            if not (isinstance(value, Mapping) and value.get("enabled") is False):
                raise ConfigError(f"{where}: ({shown(value)}) cannot be used; {_REFUSED[key]}.")
        elif key in _VALUES:
            found[key] = _check_type(where, value, _VALUES[key])
        elif key in _MODELS or key in _SECTIONS:
            found[key] = _section(path, key, value)
        else:
            known = [*ours, *_VALUES, *_MODELS, *_SECTIONS, *_REFUSED]
            raise _unknown(where, key, known)
    if "zero_optimization" in found:
        _check_zero(path, found["zero_optimization"], recipe)
    return found


def _check_equal(where: str, value: Any, ours: Any) -> None:
    if value not in ("auto", ours):
        raise ConfigError(
            f"{where}: ({shown(value)}) contradicts the recipe, which gives {ours}. "
            'Leave it out, or write "auto".'
        )


def _check_type(where: str, value: Any, types: tuple[type, ...]) -> Any:
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        names = " or ".join(t.__name__ for t in types)
        raise ConfigError(f"{where}: wrong type ({shown(value)}); expected {names}. Change it.")
    return value


def _section(path: str, key: str, value: Any) -> dict[str, Any]:
    """A section of the user's, whose keys DeepSpeed knows and whose values it takes."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}: {key}: wrong type ({shown(value)}); write a mapping.")
    if key in _SECTIONS:
        for name in value:
            if name not in _SECTIONS[key]:
                raise _unknown(f"{path}: {key}.{name}", name, _SECTIONS[key])
        return dict(value)
    from pydantic import ValidationError

    module, name = _MODELS[key].split(":")
    model = getattr(import_module(module), name)
    try:
        model(**value)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join([key, *map(str, first["loc"])])
        if first["type"] == "extra_forbidden":
            known = [f.alias or name for name, f in model.model_fields.items()]
            raise _unknown(f"{path}: {at}", str(first["loc"][-1]), known) from None
        raise ConfigError(
            f"{path}: {at}: ({shown(first['input'])}) is refused by DeepSpeed; {first['msg']}. "
            "Change the value."
        ) from None
    return dict(value)


def _check_zero(path: str, zero: dict[str, Any], recipe: Recipe) -> None:
    where = f"{path}: zero_optimization"
    if zero.get("stage") == "auto":
        del zero["stage"]
    stage = zero.get("stage", recipe.parallel.zero_stage)
    if stage != recipe.parallel.zero_stage:
        raise ConfigError(
            f"{where}.stage: ({shown(stage)}) contradicts the recipe's parallel.zero_stage "
            f"({recipe.parallel.zero_stage}). Make them equal, or leave it out."
        )
    for key, value in zero.items():
        legal, rule = _ZERO_REFUSED.get(key, (value, ""))
        if value != legal:
            raise ConfigError(f"{where}.{key}: ({shown(value)}) cannot work; {rule}. Leave it out.")
    if zero.get("overlap_comm") and recipe.parallel.pp > 1:
        raise ConfigError(
            f"{where}.overlap_comm: (true) cannot work with pp {recipe.parallel.pp}; a stage "
            "reduces after its last part. Leave it out."
        )


def _unknown(where: str, key: str, known: Iterable[str]) -> ConfigError:
    hint = suggest(str(key), known)
    return ConfigError(
        f"{where}: not a key of DeepSpeed's; {hint}it would be ignored. Correct or remove it."
    )


def _divisors(n: int) -> str:
    return ", ".join(str(k) for k in range(1, n + 1) if n % k == 0)
