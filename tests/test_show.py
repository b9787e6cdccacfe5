"""What the command line prints, at the widths of terminals."""

import io

import pytest
from rich.console import Console

from hybridzoo import list_models, show
from hybridzoo.zoo import find_config

ZOO = list_models()


def printed(renderable, width):
    console = Console(width=width, file=io.StringIO())
    console.print(renderable)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [80, 100, 120, 140])
def test_zoo_is_a_line_a_model_within_the_console(width):
    lines = printed(show.zoo(ZOO, width), width)
    assert len(lines) == 1 + len(ZOO)
    assert max(len(line) for line in lines) <= width
    for entry in ZOO:
        (line,) = [line for line in lines if line.startswith(f" {entry.name} ")]
        assert show.count(entry.n_params) in line


def test_narrow_zoo_says_whether_weights_are_near_and_a_wide_one_where():
    narrow, wide = (
        {line.split()[0]: line.split() for line in printed(show.zoo(ZOO, w), w)} for w in (119, 120)
    )
    assert narrow["shakespeare"][-1] == wide["shakespeare"][-1] == "embedded"
    assert narrow["tiny-hybrid"][-1] == "random"
    assert narrow["falcon-mamba-7b"][-1] == "hub"
    falcon = ["falcon-mamba-7b-license", "tiiuae/falcon-mamba-7b"]
    assert wide["falcon-mamba-7b"][-2:] == falcon


def test_pattern_alone_is_cut_and_from_140_columns_nothing():
    assert not [line for line in printed(show.zoo(ZOO, 80), 80) if "…" in line]
    for line in printed(show.zoo(ZOO, 120), 120):
        assert "…" not in line[45:]
    lines = printed(show.zoo(ZOO, 140), 140)
    assert not [line for line in lines if "…" in line]
    assert [e.name for e in ZOO if not any(e.pattern in line for line in lines)] == []


def test_kin_stand_together_the_smaller_first():
    names = [line.split()[0] for line in printed(show.zoo(ZOO, 80), 80)][1:]
    first = names.index("mamba-130m")
    sizes = ["130m", "370m", "790m", "1.4b", "2.8b", "2.8b-slimpj"]
    assert names[first : first + 6] == [f"mamba-{size}" for size in sizes]
    assert names[first + 6] == "mamba2-130m"
    assert names == [line.split()[0] for line in printed(show.zoo(ZOO[::-1], 80), 80)][1:]


def test_active_parameters_are_shown_where_a_token_does_not_use_all():
    rows = {line.split()[0]: line for line in printed(show.zoo(ZOO, 80), 80)}
    assert " 398.56 B " in rows["jamba-1.5-large"]
    assert " 94.15 B " in rows["jamba-1.5-large"]
    assert rows["mamba-2.8b"].split() == ["mamba-2.8b", "64M", "2.77", "B", "hub"]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", ["mamba-2.8b", "mamba2attn-2.7b", "jamba-1.5-large"])
def test_info_fits_the_console_and_has_the_exact_size(name, width):
    config = find_config(name)
    lines = printed(show.model(config), width)
    assert max(len(line) for line in lines) <= width
    assert lines[0] == f"{name}  {config.pattern}"
    assert [line for line in lines if f" {config.n_params():,} " in line]
