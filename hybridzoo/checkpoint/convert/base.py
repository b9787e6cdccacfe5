"""What a family file declares, and the one engine that reads and writes every family from it.

A name template is where a parameter's stored tensors are called in the newest published dialect; a
tuple of templates lists older spellings after it, and the first whose tensors are all in the file
is used. In a template `{e}` counts along dimension 0 (one tensor an expert) and `{q,k,v}` names the
parts of a fused parameter in the order of its cut.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hybridzoo.checkpoint.layout import Block, Source
from hybridzoo.checkpoint.pickled import PickleReader
from hybridzoo.checkpoint.reader import Reader
from hybridzoo.checkpoint.recorded import record
from hybridzoo.config import Branch, HybridConfig, branch_prefix
from hybridzoo.errors import CheckpointError
from hybridzoo.layers import Param
from hybridzoo.sharding import Split

# hyperparameters of ours that no family spells: they shape training or rounding, not the function.
_NOT_THE_FUNCTION = {
    *("dt_min", "dt_max", "dt_init_floor", "A_init", "chunk_size"),
    *("aux_loss", "z_loss", "router_fp32"),
}
# fields that change rounding alone: a family without a key for one has its own way.
_ROUNDING = {"residual_fp32", "norm_weight_fp32"}
# widths that may be given or derived: they are compared by what they come to.
_DERIVED = {"expand", "d_inner", "dt_rank", "n_kv_heads", "head_dim"}


@dataclass(frozen=True)
class Conv:
    """A template of a depthwise Conv1d's weight: stored as (i, 1, w), ours is (i, w)."""

    template: str


@dataclass(frozen=True)
class Reordered:
    """A template of a fused parameter stored in one tensor, its parts in another order.

    Attributes:
        template: the stored tensor.
        order: our parts' numbers as they are stored; those that a config lacks are passed over.
    """

    template: str
    order: tuple[int, ...]


Template = str | Conv | Reordered
Names = Mapping[str, Template | tuple[Template, ...]]


@dataclass(frozen=True)
class Family:
    """One published family.

    Attributes:
        model_type: as in its config.json.
        read: the keys of config.json -> the architecture; ConfigError or CheckpointError on what it
            cannot mean.
        write: the architecture -> the newest dialect's keys; CheckpointError on what it cannot say.
        layer: prefix of a published layer's tensors, `{}` for its number.
        norms: names, after that prefix and without `.weight`, of the norm before each of a
            published layer's sublayers; of several the newest first.
        kinds: kind -> parameter -> its template after that prefix.
        top: embed.weight, norm.weight, head.weight -> template.
        unsaid: fields of ours that no key says and that are not the function.
        original: the files of the package that trained them, which takes one pytorch_model.bin, a
            tied head under both names, no key that it does not know, and pads vocab_size itself.
    """

    model_type: str
    read: Callable[[Mapping[str, Any]], HybridConfig]
    write: Callable[[HybridConfig], dict[str, Any]]
    layer: str
    norms: tuple[str | tuple[str, ...], ...]
    kinds: Mapping[str, Names]
    top: Names
    unsaid: Container[str] = ()
    original: bool = False

    def blocks(
        self, config: HybridConfig, available: Container[str] | None = None
    ) -> dict[str, list[Block]]:
        """Each parameter's stored tensors, spelled as in `available` or the newest dialect."""
        there = available or ()
        found = {
            name: _spelled(template, prefix, p, there)
            for name, template, prefix, p in self._templates(config)
        }
        embed = dict(config.params())["embed.weight"]
        head = _spelled(self.top["head.weight"], "", embed, there)
        is_written = head[0].name in there or (self.original and available is None)
        if config.tie_embeddings and is_written:
            # a tied head written out all the same: one parameter, two tensors.
            found["embed.weight"] += head
        return found

    def _templates(
        self, config: HybridConfig
    ) -> Iterator[tuple[str, Template | tuple[Template, ...], str, Param]]:
        params = dict(config.params())
        for name, template in self.top.items():
            if name in params:
                yield name, template, "", params[name]
        kinds = {branch.config.kind for place in config.places for branch in place}
        # a layer of the originals has its second sublayer where the model has any feed-forward.
        norms = self.norms if kinds & {"mlp", "moe"} else self.norms[:1]
        for i, place in enumerate(config.places):
            layer, sublayer = divmod(i, len(norms))
            prefix = self.layer.format(layer)
            norm = norms[sublayer]
            for own in ("norm.weight", "norm.bias"):
                if (name := f"blocks.{i}.{own}") in params:
                    stems = (norm,) if isinstance(norm, str) else norm
                    spellings = tuple(f"{stem}.{own.removeprefix('norm.')}" for stem in stems)
                    yield name, spellings, prefix, params[name]
            for branch in place:
                start = branch_prefix(i, branch.letter, len(place) > 1)
                for own, p in branch.config.params(config.d_model).items():
                    yield start + own, self.kinds[branch.config.kind][own], prefix, p


def _spelled(
    template: Template | tuple[Template, ...], prefix: str, p: Param, available: Container[str]
) -> list[Block]:
    """The stored tensors of one parameter, as the files at hand call them."""
    spellings = template if isinstance(template, tuple) else (template,)
    tried = [_expand(spelling, prefix, p) for spelling in spellings]
    # the first of those of which most is there, so that what is missing is named well.
    return max(tried, key=lambda t: sum(b.name in available for b in t))


def _expand(template: Template, prefix: str, p: Param) -> list[Block]:
    """The stored tensors of one parameter."""
    if isinstance(template, Reordered):
        return _reorder(prefix + template.template, template.order, p)
    text = prefix + (template.template if isinstance(template, Conv) else template)
    spread = "{e}" in text
    parts = re.search(r"\{(\w+(?:,\w+)+)\}", text)
    rows = [(e, (e, e + 1)) for e in range(p.shape[0])] if spread else [(0, (0, p.shape[0]))]
    columns = [("", 0, (0, p.shape[0]))]
    if parts:
        assert isinstance(p.cut, Split)
        ends = list(itertools.accumulate((part.width for part in p.cut.parts), initial=0))
        columns = [
            (part, p.cut.dim, span)
            for part, span in zip(parts[1].split(","), itertools.pairwise(ends), strict=True)
        ]
    blocks = []
    for e, row in rows:
        for part, dim, span in columns:
            box = [(0, n) for n in p.shape]
            box[dim] = span
            if spread:
                box[0] = row
            name = text.replace("{e}", str(e)).replace(parts[0] if parts else "{}", part)
            shape = [b - a for a, b in box][1 if spread else 0 :]
            if isinstance(template, Conv):
                shape.insert(1, 1)
            blocks.append(Block(name, tuple(box), tuple(shape)))
    return blocks


def _reorder(name: str, order: tuple[int, ...], p: Param) -> list[Block]:
    """A box a part, each elsewhere in the one stored tensor; in our order."""
    assert isinstance(p.cut, Split)
    dim, widths = p.cut.dim, [part.width for part in p.cut.parts]
    starts = list(itertools.accumulate(widths, initial=0))
    blocks, at = {}, 0
    for i in (i for i in order if i < len(widths)):
        box, start = [(0, n) for n in p.shape], [0] * len(p.shape)
        box[dim], start[dim] = (starts[i], starts[i + 1]), at
        blocks[i] = Block(name, tuple(box), p.shape, tuple(start))
        at += widths[i]
    return [blocks[i] for i in sorted(blocks)]


def compact(groups: list[str]) -> str:
    """A pattern for groups of letters, repeats as counts: ["MF", "AF"] * 2 -> "2(MF AF)"."""
    n = len(groups)
    period = next(p for p in range(1, n + 1) if n % p == 0 and groups == groups[:p] * (n // p))
    runs = [(group, len(list(run))) for group, run in itertools.groupby(groups[:period])]
    words = [g if k == 1 else f"{k}{g}" if len(g) == 1 else f"{k}({g})" for g, k in runs]
    inner = " ".join(words)
    if period == n:
        return inner
    return f"{n // period}{inner}" if len(inner) == 1 else f"{n // period}({inner})"


def only_layer(config: HybridConfig, family: str, kind: str) -> Any:
    """The layer of a stack that has no other kind; CheckpointError if it has one."""
    layers = [branch.config for place in config.places for branch in place]
    if len(layers) > len(config.places) or any(layer.kind != kind for layer in layers):
        raise CheckpointError(
            f"{family}: cannot express the pattern ({config.pattern}); every layer is one {kind}. "
            "Save in the native layout."
        )
    return layers[0]


def open_family(family: Family, config: HybridConfig, reader: Reader | PickleReader) -> Source:
    """A published directory as parameters; the config remembers its files for an exact export."""
    specs = reader.specs
    blocks = family.blocks(config, specs)
    config = config.with_options(source_layout=record(family.model_type, reader))
    source = Source(config, reader, blocks)
    for copy in blocks["embed.weight"][1:]:
        first = blocks["embed.weight"][0].name
        # as bytes: rows of no token may hold anything, NaN as well
        a, b = (reader.view(name).view(torch.uint8) for name in (first, copy.name))
        if specs[first] != specs[copy.name] or not torch.equal(a, b):
            raise CheckpointError(
                f"{reader.directory}: {copy.name} differs from {first}, but config.json ties "
                "them; tied weights are one. Untie them there."
            )
    return source


def published_config(family: Family, config: HybridConfig, dtype: str) -> dict[str, Any]:
    """The family's config.json of an architecture; CheckpointError if it cannot express it."""
    published = family.write(config)
    found = differences(config, family.read(published))
    unsaid = [d for d in found if d not in _ROUNDING and d not in family.unsaid]
    if unsaid:
        more = f" and {len(unsaid) - 3} more" if len(unsaid) > 3 else ""
        raise CheckpointError(
            f"{family.model_type}: cannot express {', '.join(unsaid[:3])}{more} of this config; "
            "its config.json has no such key. Save in the native layout."
        )
    return published if family.original else {**published, "dtype": dtype}


def differences(ours: HybridConfig, theirs: HybridConfig) -> list[str]:
    """Where two configs compute different functions; empty when they are one architecture."""
    fields = (
        "d_model",
        "vocab_size",
        "shared",
        "norm",
        "norm_eps",
        "tie_embeddings",
        "residual_multiplier",
        "embedding_multiplier",
        "logits_multiplier",
        "eos_token_id",
        *sorted(_ROUNDING),
    )
    found = [f for f in fields if getattr(ours, f) != getattr(theirs, f)]
    if len(ours.places) != len(theirs.places):
        return [*found, "pattern"]
    for i, (a, b) in enumerate(zip(ours.places, theirs.places, strict=True)):
        for x, y in itertools.zip_longest(_functions(a, ours), _functions(b, theirs)):
            if x is None or y is None or x["kind"] != y["kind"]:
                return [*found, f"pattern (place {i})"]
            found += [f"blocks.{i}.{key}" for key in x if x[key] != y.get(key)]
    return found


def _functions(place: tuple[Branch, ...], config: HybridConfig) -> list[dict[str, Any]]:
    """The options of a place's layers that shape its function, widths resolved."""
    found = []
    for branch in place:
        options = asdict(branch.config)
        shapes = {k: p.shape for k, p in branch.config.params(config.d_model).items()}
        if "none" in (options.get("x_norm"), options.get("norm")):
            options.pop("norm_eps")
        if branch.config.kind == "mamba2":
            # its heads show in the shapes; attention's do not.
            options.pop("n_heads")
        kept = {k: v for k, v in options.items() if k not in _NOT_THE_FUNCTION | _DERIVED}
        found.append({"kind": branch.config.kind, "shapes": shapes, **kept})
    return found
