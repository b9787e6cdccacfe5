"""A config in figures and as a drawing: what `info`, the cards and the gallery show."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hybridzoo.config import Branch, HybridConfig
from hybridzoo.layers.attention import AttentionConfig
from hybridzoo.layers.state import StateTensor

CONTEXTS = (4096, 262144)
SEQUENCE_MIXERS = ("ssm_state", "k_cache")


def facts(config: HybridConfig) -> dict[str, Any]:
    """Everything countable about a config, as plain values.

    Returns:
        name, pattern, d_model, vocab_size, n_places, n_stages, n_params, n_active_params,
        weight_bytes (in bf16) and weight_bytes_fp32, flops_per_token, state_bytes and
        transformer_state_bytes (one sequence in bf16, by context), transformer (what that twin is)
        and layers: one row a letter with kind, count, parameters of one and options; several, each
        with its places, for a letter that layers_at changes somewhere.
    """
    twin, n_twins, twin_text = _transformer(config)
    return {
        "name": config.name,
        "pattern": " ".join(config.pattern.split()),
        "d_model": config.d_model,
        "vocab_size": config.vocab_size,
        "n_places": len(config.places),
        "n_stages": config.expanded.n_segments,
        "n_params": config.n_params(),
        "n_active_params": config.n_active_params(),
        "weight_bytes": _weight_bytes(config, 2),
        "weight_bytes_fp32": _weight_bytes(config, 4),
        "flops_per_token": {n: config.flops_per_token(n) for n in CONTEXTS},
        "state_bytes": {n: config.state_bytes(n) for n in CONTEXTS},
        "transformer_state_bytes": {
            n: n_twins * _bytes(twin.state(config.d_model, 1, n)) for n in CONTEXTS
        },
        "transformer": twin_text,
        "layers": [row for letter in config.expanded.letters for row in _rows(config, letter)],
    }


def draw(config: HybridConfig, per_row: int = 16) -> list[tuple[int, list[str]]]:
    """The stack in rows of places, input first: (index of the row's first place, its cells).

    A cell is a place's letter, [MA] for a parallel place, or '|' before one that starts a stage.
    """
    rows: list[tuple[int, list[str]]] = []
    for i, letters in enumerate(config.expanded.places):
        if i % per_row == 0:
            rows.append((i, []))
        if i in config.expanded.cuts:
            rows[-1][1].append("|")
        rows[-1][1].append(letters[0] if len(letters) == 1 else f"[{''.join(letters)}]")
    return rows


def row_name(row: dict[str, Any]) -> str:
    """The letter of a row of facts()["layers"], with its places where others differ."""
    places = row.get("places", [])
    more = ", ..." if len(places) > 4 else ""
    where = f" at {', '.join(map(str, places[:4]))}{more}" if places else ""
    return f"{row['letter']}{where}"


def _rows(config: HybridConfig, letter: str) -> list[dict[str, Any]]:
    groups: list[tuple[Branch, list[int]]] = []
    for i, place in enumerate(config.places):
        for branch in (b for b in place if b.letter == letter):
            same = next((at for b, at in groups if b.config == branch.config), None)
            if same is None:
                groups.append((branch, [i]))
            else:
                same.append(i)
    several = len(groups) > 1
    return [_row(config, b, at) | ({"places": at} if several else {}) for b, at in groups]


def _row(config: HybridConfig, branch: Branch, at: list[int]) -> dict[str, Any]:
    layer = branch.config
    params = layer.params(config.d_model).values()
    row = {
        "letter": branch.letter,
        "kind": layer.kind,
        "count": len(at),
        "n_params": sum(_numel(p.shape) for p in params if p.trained),
        "options": {k: v for k, v in layer.to_dict().items() if k != "kind"},
    }
    return row | ({"shared": branch.shared} if branch.shared else {})


def _mixes(branch: Branch, d_model: int) -> bool:
    return any(name in SEQUENCE_MIXERS for name in branch.config.state(d_model, 1, 1))


def _n_mixers(config: HybridConfig) -> int:
    return sum(any(_mixes(b, config.d_model) for b in place) for place in config.places)


def _transformer(config: HybridConfig) -> tuple[AttentionConfig, int, str]:
    """Its attention, in how many places, and that as text: no comparison with a straw man."""
    # the model's own heads, if it has attention.
    own = Counter(
        b.config for place in config.places for b in place if isinstance(b.config, AttentionConfig)
    )
    head_dim = (
        128 if config.d_model % 128 == 0 else 64 if config.d_model % 64 == 0 else config.d_model
    )
    attention = (
        own.most_common(1)[0][0]
        if own
        else AttentionConfig(n_heads=max(config.d_model // head_dim, 1))
    )
    _, n_kv_heads, p = attention.widths(config.d_model)
    heads = f"{n_kv_heads} key/value head{'s' * (n_kv_heads > 1)} of {p}"
    # a stack of mixers alone is twice as deep as a transformer of its size, half feed-forward.
    n_mixers, n_places = _n_mixers(config), len(config.places)
    n = min(n_mixers, (n_places + 1) // 2)
    where = f"all {n} sequence-mixing" if n == n_mixers else f"{n} of {n_places}"
    return attention, n, f"attention with {heads} in {where} places"


def _weight_bytes(config: HybridConfig, itemsize: int) -> int:
    """Of weights whose items have that size, but for those that stay in fp32."""
    return sum(_numel(p.shape) * (4 if p.fp32 else itemsize) for _, p in config.params())


def _bytes(state: dict[str, StateTensor]) -> int:
    return sum(_numel(s.shape) * (s.dtype.itemsize if s.dtype else 2) for s in state.values())


def _numel(shape: tuple[int, ...]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n
