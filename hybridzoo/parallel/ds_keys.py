"""What a DeepSpeed config of the user's may say beside a recipe; nothing in it is ignored."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from hybridzoo.errors import ConfigError
from hybridzoo.options import read_file, shown, suggest
from hybridzoo.parallel.engine import pick_device
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
# keys with one value: its legal types, or words
_VALUES: dict[str, tuple[type | str, ...]] = {
    "communication_data_type": ("fp32", "bf16"),
    "prescale_gradients": (bool,),
    "gradient_predivide_factor": (int, float),
    "steps_per_print": (int,),
    "wall_clock_breakdown": (bool,),
    "memory_breakdown": (bool,),
    "dump_state": (bool,),
    "disable_python_gc": (bool,),
    "log_level": ("debug", "info", "warning", "error"),
    "zero_allow_untested_optimizer": (bool,),
}
# what ZeRO ignores at stage 1 and asserts at 2 and 3: the value that does no harm
_WITHOUT_ZERO = {"prescale_gradients": False, "gradient_predivide_factor": 1}
_PRECISION = "parameters stay fp32. Set the recipe's precision: bf16"
_OURS = "the recipe says it. Leave it out, and set {}"
_STORED = "checkpoints are hybridzoo's own. Leave it out"
_GONE = "hybridzoo does not run it. Leave it out"
# DeepSpeed's other keys: the rule and the way out
_REFUSED = {
    **dict.fromkeys(["fp16", "bf16", "bfloat16", "torch_autocast"], _PRECISION),
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
    "weight_quantization": _GONE,
    "zero_force_ds_cpu_optimizer": "AdamW is torch's own. Leave it out",
    "use_data_before_expert_parallelism": "ep takes consecutive data-parallel ranks. Leave it out",
    **dict.fromkeys(("autotuning", "data_efficiency", "disable_allgather", "hybrid_engine"), _GONE),
}
# keys of zero_optimization that would break the run, and the value that does not
_OFFLOAD = (None, "the state stays on the GPU")
_ROUNDED = (False, "what is sent is never rounded to integers")
_ZERO_REFUSED: dict[str, tuple[Any, str]] = {
    "compute_grad_norm": (True, "without a norm an update that is not finite would be applied"),
    "reduce_scatter": (True, "experts count on it"),
    "offload_param": _OFFLOAD,
    "offload_optimizer": _OFFLOAD,
    "cpu_offload": _OFFLOAD,
    "cpu_offload_param": _OFFLOAD,
    "cpu_offload_use_pin_memory": _OFFLOAD,
    "zero_quantized_weights": _ROUNDED,
    "zero_quantized_nontrainable_weights": _ROUNDED,
    "zero_quantized_gradients": _ROUNDED,
    "zero_hpz_partition_size": (1, "partitions lie over all of dp"),
    "zenflow": (None, "its updates are not AdamW's"),
    "legacy_stage1": (False, "DeepSpeed has dropped it"),
    "elastic_checkpoint": (False, "checkpoints are hybridzoo's own"),
}


def check_installed() -> None:
    """Raise ConfigError where DeepSpeed is not installed; it is not imported."""
    if find_spec("deepspeed") is None:
        raise ConfigError(
            "parallel: DeepSpeed is not installed; ranks train with it. Type: pip install "
            "'deepspeed>=0.19.8,<0.20', or start one process without a launcher."
        )


def imported(device: str) -> ModuleType:
    """DeepSpeed, imported quietly for tensors on "cpu" or "cuda"; ConfigError where it is not."""
    check_installed()
    # its own guess would take any GPU that it sees
    os.environ.setdefault("DS_ACCELERATOR", device)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed  # type: ignore[no-any-return]


def user_keys(recipe: Recipe, ours: Mapping[str, Any]) -> dict[str, Any]:
    """What the user's file adds to the config.

    Args:
        recipe: of the run; it names the file.
        ours: the keys that the recipe gives, which the file may repeat.

    Raises:
        ConfigError: a key is unknown, cannot work here, or contradicts the recipe.
    """
    path = recipe.parallel.deepspeed
    if path is None:
        return {}
    options, found = read_file(path), {}
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
            found[key] = _check_value(where, value, _VALUES[key])
            stage = recipe.parallel.zero_stage
            if stage and value != _WITHOUT_ZERO.get(key, value):
                raise ConfigError(
                    f"{where}: ({shown(value)}) cannot work with zero_stage {stage}; ZeRO averages "
                    "gradients its own way. Leave it out, or set parallel.zero_stage: 0."
                )
        elif key in _MODELS or key in _SECTIONS:
            found[key] = _section(path, key, value, recipe)
        else:
            known = [*ours, *_VALUES, *_MODELS, *_SECTIONS, *_REFUSED]
            raise _unknown(where, key, known)
    return found


def _check_equal(where: str, value: Any, ours: Any) -> None:
    if value not in ("auto", ours):
        raise ConfigError(
            f"{where}: ({shown(value)}) contradicts the recipe, which gives {ours}. "
            'Leave it out, or write "auto".'
        )


def _check_value(where: str, value: Any, legal: tuple[type | str, ...]) -> Any:
    # not isinstance: true and false are no numbers here
    if type(value) not in legal and value not in legal:
        names = " or ".join(t if isinstance(t, str) else t.__name__ for t in legal)
        raise ConfigError(f"{where}: wrong value ({shown(value)}); it must be {names}. Change it.")
    return value


def _section(path: str, key: str, value: Any, recipe: Recipe) -> dict[str, Any]:
    """A section of the user's, whose keys DeepSpeed knows and whose values it takes."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}: {key}: wrong type ({shown(value)}); write a mapping.")
    if key in _SECTIONS:
        for name in value:
            if name not in _SECTIONS[key]:
                raise _unknown(f"{path}: {key}.{name}", name, _SECTIONS[key])
        return dict(value)
    if key == "zero_optimization":
        value = {"stage": recipe.parallel.zero_stage, **value}
        _check_zero(path, value, recipe)
    from pydantic import ValidationError

    # DeepSpeed keeps the device of its first import: the run's, not one that would serve here
    imported(pick_device(recipe).type)
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
    if zero["stage"] == "auto":
        zero["stage"] = recipe.parallel.zero_stage
    if zero["stage"] != recipe.parallel.zero_stage:
        raise ConfigError(
            f"{where}.stage: ({shown(zero['stage'])}) contradicts the recipe's parallel.zero_stage "
            f"({recipe.parallel.zero_stage}). Make them equal, or leave it out."
        )
    for key, value in zero.items():
        legal, rule = _ZERO_REFUSED.get(key, (value, ""))
        if value not in ("auto", legal):
            raise ConfigError(f"{where}.{key}: ({shown(value)}) cannot work; {rule}. Leave it out.")
    if zero.get("memory_efficient_linear") and keeps_products(recipe):
        raise ConfigError(
            f"{where}.memory_efficient_linear: (true) cannot work with recompute: mixer; it "
            "changes products that were kept. Leave it out, or recompute: full."
        )
    if zero.get("overlap_comm") and recipe.parallel.pp > 1:
        raise ConfigError(
            f"{where}.overlap_comm: (true) cannot work with pp {recipe.parallel.pp}; a stage "
            "reduces after its last part. Leave it out."
        )


def keeps_products(recipe: Recipe) -> bool:
    """Whether a block keeps its products for the backward, so that none may be changed."""
    return "mixer" in recipe.parallel.recompute.values()


def _unknown(where: str, key: str, known: Iterable[str]) -> ConfigError:
    hint = suggest(str(key), known)
    return ConfigError(
        f"{where}: not a key of DeepSpeed's; {hint}it would be ignored. Correct or remove it."
    )
