"""Recipe: how one model is trained, as text (YAML or JSON) and as typed values."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from hybridzoo.errors import ConfigError
from hybridzoo.options import check_fields, checked, read_file, read_options
from hybridzoo.recompute import Recompute

Packing = Literal["documents", "none"]
# texts that ship with the zoo
CORPORA = ("shakespeare",)

# keys that a resumed run may change: none of them is part of what one step computes, but for
# steps, which a longer run must be able to raise.
FREE_KEYS = frozenset(
    {"steps", "log_every", "eval_every", "eval_batches", "save_every", "keep_last", "output"}
    | {"device", "compile", "parallel"}
)
# files and directories
_PATHS = frozenset({"model", "output", "data.source", "data.tokenizer", "parallel.deepspeed"})


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """What a model is trained on.

    Attributes:
        source: a corpus of the zoo, a text or token file, or a glob; see `train.data`.
        seq_len: tokens a sequence.
        tokenizer: a tokenizers JSON; None is the model's own.
        packing: documents, several in one sequence and none sees another; none, windows of one.
    """

    source: str
    seq_len: int
    tokenizer: str | None = None
    packing: Packing = "none"


@dataclass(frozen=True, kw_only=True)
class ParallelRecipe:
    """How a run is spread over the ranks that a launcher started; dp is what they leave.

    Attributes:
        tp: ranks that hold slices of each layer.
        pp: ranks that hold different places of the stack.
        ep: data-parallel ranks that hold different experts.
        zero_stage: what data-parallel ranks share of the training state: 0 nothing, 1 optimizer
            state, 2 gradients too, 3 parameters too (ZeRO, arXiv 1910.02054).
        sequence_parallel: between blocks each tp rank keeps its share of the tokens alone.
        balance: pipeline stages at the pattern's cuts ("pattern"), or of equal cost ("auto").
        recompute: activations that a letter's blocks compute again in the backward: none, mixer
            (all but the projections' outputs), full.
        deepspeed: a DeepSpeed config file whose keys join ours.
        timeout_s: after so many seconds without an answer from another rank, a rank gives up.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    zero_stage: Literal[0, 1, 2, 3] = 1
    sequence_parallel: bool = False
    balance: Literal["pattern", "auto"] = "pattern"
    recompute: dict[str, Recompute] = field(default_factory=dict)
    deepspeed: str | None = None
    timeout_s: int = 600

    def __post_init__(self) -> None:
        """Refuse a field of the wrong type or range."""
        check_fields("parallel", self)
        for letter, mode in self.recompute.items():
            checked(f"parallel.recompute.{letter}", mode, Recompute)
        if self.sequence_parallel and self.tp == 1:
            raise ConfigError(
                "parallel.sequence_parallel: (true) needs tp above 1; its ranks share the tokens. "
                "Set tp, or leave it out."
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run.

    Paths in a file are relative to that file, but for output, which is relative to the caller; ~ is
    the home directory.

    Attributes:
        model: a model YAML, or a checkpoint directory to start from.
        data: what to train on.
        output: directory of checkpoints, log and curve.
        steps: updates.
        batch_size: sequences a step.
        lr: highest learning rate.
        accumulate: parts that a step's batch is computed in, one after another.
        schedule: cosine; constant; or wsd, constant and then straight down. All after the warm-up.
        warmup_steps: steps over which the learning rate rises.
        decay_ratio: share of the steps in which wsd goes down.
        min_lr_ratio: where cosine and wsd end, as a share of lr.
        weight_decay: of the parameters declared to decay.
        betas: of AdamW.
        adam_eps: of AdamW.
        clip_norm: largest global gradient norm; null clips nothing.
        ema: decay of an average of the weights, which is evaluated and kept as best; 0 is none.
        seed: of initial weights, data order and dropout.
        precision: fp32; or bf16, fp32 weights under torch.autocast.
        device: auto is a GPU if there is one.
        compile: compile each block with torch.compile.
        log_every: steps between lines of the log.
        eval_every: steps between evaluations; 0 is never.
        eval_batches: batches an evaluation, spread evenly; 0 is all of the held-out split.
        save_every: steps between checkpoints.
        keep_last: checkpoints kept.
        parallel: how several ranks share the work.
    """

    model: str
    data: DataRecipe
    output: str
    steps: int
    batch_size: int
    lr: float
    accumulate: int = 1
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    warmup_steps: int = field(default=0, metadata={"min": 0})
    decay_ratio: float = 0.2
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    adam_eps: float = 1e-8
    clip_norm: float | None = 1.0
    ema: float = 0.0
    seed: int = field(default=0, metadata={"min": 0})
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool = False
    log_every: int = 10
    eval_every: int = field(default=250, metadata={"min": 0})
    eval_batches: int = field(default=0, metadata={"min": 0})
    save_every: int = 500
    keep_last: int = 2
    parallel: ParallelRecipe = field(default_factory=ParallelRecipe)

    def __post_init__(self) -> None:
        """Refuse what cannot work, however the recipe was made."""
        check_fields("recipe", self)
        check_fields("recipe.data", self.data)
        self._check_ranges()
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"accumulate: ({self.accumulate}) must divide batch_size ({self.batch_size}). "
                "Use a divisor of it."
            )

    @classmethod
    def load(cls, path: str | Path, **changes: Any) -> Self:
        """Read a YAML or JSON file; `changes` replace its keys.

        Raises:
            ConfigError: the file, key and value that is wrong.
        """
        options = read_file(path)
        try:
            recipe = cls.from_dict(options)
            recipe = replace(recipe.resolved(Path(path).parent), **changes)
            return replace(recipe, output=_path("", recipe.output))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, options: Any) -> Self:
        """Build from a mapping with the fields as keys."""
        if isinstance(options, Mapping) and "data" in options:
            data = read_options(DataRecipe, "data", options["data"], of="a recipe's data")
            options = {**options, "data": data}
        if isinstance(options, Mapping) and "parallel" in options:
            spread = options["parallel"]
            spread = read_options(ParallelRecipe, "parallel", spread, of="a recipe's parallel")
            options = {**options, "parallel": spread}
        return read_options(cls, "", options, of="a recipe")

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain values; from_dict reads them back equal."""
        return {**asdict(self), "betas": list(self.betas)}

    def values(self) -> dict[str, Any]:
        """What a run computes and how: dotted keys, without paths, which hosts may spell apart."""
        plain = self.to_dict()
        spread = {f"parallel.{k}": v for k, v in plain.pop("parallel").items()}
        return {k: v for k, v in {**_flat(plain), **spread}.items() if k not in _PATHS}

    def resolved(self, root: Path) -> Self:
        """A copy with model, source and tokenizer as paths from `root`; a corpus keeps its name."""
        data = self.data
        if data.source not in CORPORA:
            # brackets in the name of the recipe's directory are no part of a glob
            home = glob.escape(str(root)) if glob.has_magic(data.source) else root
            data = replace(data, source=_path(home, data.source))
        if data.tokenizer not in (None, "bytes"):
            data = replace(data, tokenizer=_path(root, data.tokenizer))
        spread = self.parallel
        if spread.deepspeed is not None:
            spread = replace(spread, deepspeed=_path(root, spread.deepspeed))
        return replace(self, model=_path(root, self.model), data=data, parallel=spread)

    def changed_key(self, other: Mapping[str, Any]) -> str | None:
        """The first key, dotted, in which the plain recipe `other` is another run than this one.

        The model's path is not compared: the trainer compares the configs themselves.
        """
        mine, theirs = _flat(self.to_dict()), _flat(other)
        ignored = FREE_KEYS | {"model"}
        keys = [k for k in {**mine, **theirs} if k not in ignored]
        return next((k for k in keys if mine.get(k) != theirs.get(k)), None)

    def _check_ranges(self) -> None:
        unit = "must lie in 0..1, 1 excluded"
        rules = [
            ("lr", self.lr > 0, "must be above 0"),
            ("decay_ratio", 0 < self.decay_ratio <= 1, "must lie in 0..1, 0 excluded"),
            ("min_lr_ratio", 0 <= self.min_lr_ratio <= 1, "must lie in 0..1"),
            ("weight_decay", self.weight_decay >= 0, "must be 0 or more"),
            ("betas", all(0 <= b < 1 for b in self.betas), unit),
            ("adam_eps", self.adam_eps > 0, "must be above 0"),
            ("clip_norm", self.clip_norm is None or self.clip_norm > 0, "must be above 0, or null"),
            ("ema", 0 <= self.ema < 1, unit),
        ]
        for name, is_fine, rule in rules:
            if not is_fine:
                value = getattr(self, name)
                raise ConfigError(f"{name}: out of range ({value}); it {rule}. Change the value.")


def _path(root: str | Path, name: str) -> str:
    return str(root / Path(name).expanduser())


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    data = {f"data.{k}": v for k, v in options["data"].items()}
    return {**{k: v for k, v in options.items() if k != "data"}, **data}
