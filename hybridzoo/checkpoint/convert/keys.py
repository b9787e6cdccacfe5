"""The keys of a published config.json: each typed and checked, and none passed over unread."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hybridzoo.checkpoint.convert import CONVERTERS
from hybridzoo.errors import CheckpointError
from hybridzoo.options import checked, shown, suggest

# theirs -> ours; of several names for one function the first is written.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
# keys of every family that change nothing a forward computes.
_IDLE = (
    "model_type|architectures|auto_map|(torch_)?dtype|transformers_version|_name_or_path|"
    "_attn_implementation.*|initializer_range|use_cache|return_dict|(pad|bos)_token_id|"
    "output_(attentions|hidden_states)|tokenizer_class|chunk_size_feed_forward|problem_type|"
    "id2label|label2id|is_(encoder_)?decoder|sep_token_id|torchscript|pruned_heads|_commit_hash|"
    "attn_implementation|use_return_dict|model_max_length|unsloth_\\w+|do_sample|temperature|"
    "top_[kp]|max_(new_tokens|length)|quantization_config"
)
# beyond these a number is a typing error, refused before anything is listed.
_LIMITS = {
    "num_hidden_layers": {"min": 1, "max": 10_000},
    **{key: {"min": 1} for key in ("hidden_size", "d_model", "vocab_size")},
}
_COUNT = {"min": 0}


@dataclass(frozen=True)
class Keys:
    """The keys of one family's config.json.

    Attributes:
        family: its model_type.
        table: key -> type and default: what the class falls back to where a file leaves it out.
        limits: key -> "min" and "max" of its number; "min" is 0 unless it says otherwise.
        only: key -> the one value that can be read, where others would change the function.
        idle: regular expression of keys that change nothing a forward computes, besides those that
            every family has.
    """

    family: str
    table: Mapping[str, tuple[Any, Any]]
    limits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)
    idle: str = r"(?!)"

    def read(self, published: Mapping[str, Any]) -> dict[str, Any]:
        """Every key of the table, of its type.

        Raises:
            CheckpointError: a key that is not known at all, a value that hybridzoo does not have,
                or `architectures` of another family.
            ConfigError: a value of the wrong type or range.
        """
        self._check_class(published.get("architectures"))
        if published.get("quantization_config") is not None:
            raise CheckpointError(
                f"quantization_config is set ({shown(published['quantization_config'])}); "
                "hybridzoo reads weights as they were trained. Use an unquantised checkpoint."
            )
        idle = re.compile(f"{_IDLE}|{self.idle}")
        only, known = self.only, [*self.table, *self.only]
        for key, value in published.items():
            if key not in known and not idle.fullmatch(key):
                raise CheckpointError(
                    f"{key} is not a key of {self.family} ({shown(value)}); {suggest(key, known)}"
                    "an unknown key may change the function. Remove it if it does not."
                )
            if key in only and value != only[key]:
                one = json.dumps(only[key])
                raise CheckpointError(
                    f"{key} is set ({shown(value)}); hybridzoo reads {self.family} with {one} "
                    f"only. Use a checkpoint that has it {one}."
                )
        limits = {**_LIMITS, **self.limits}
        return {
            key: checked(key, published.get(key, default), hint, limits.get(key, _COUNT))
            for key, (hint, default) in self.table.items()
        }

    def _check_class(self, names: Any) -> None:
        """Early clones say one family's model_type and another's class."""
        classes = {f"{known.replace('_', '')}forcausallm": known for known in CONVERTERS}
        for name in names if isinstance(names, list) else []:
            other = classes.get(str(name).lower(), self.family)
            if other != self.family:
                raise CheckpointError(
                    f"architectures: {name} is not {self.family}'s, the model_type; the two "
                    f"compute different functions. Set model_type to {other} if that is what the "
                    "weights are."
                )


def activation(options: Mapping[str, Any], key: str = "hidden_act") -> str:
    """Our name of the activation that a key names; CheckpointError lists the known ones."""
    name: str = options[key]
    if name not in _ACTIVATIONS:
        raise CheckpointError(
            f"unknown {key} ({shown(name)}); {suggest(name, _ACTIVATIONS)}known: "
            f"{', '.join(_ACTIVATIONS)}. Choose one of them."
        )
    return _ACTIVATIONS[name]


def write_activation(name: str) -> str:
    """The published name of our activation."""
    return next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == name)


def first_eos(options: Mapping[str, Any]) -> Any:
    """Of several ends the first is the text's; the others are a chat template's."""
    eos = options["eos_token_id"]
    return next(iter(eos), None) if isinstance(eos, list) else eos
