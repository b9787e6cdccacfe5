"""csrc/packaged.txt holds just what launches ask for, so that a wheel with cubins compiles nothing.

To list a launch, add it to LAUNCHES; the failing test gives the lines.
"""

from math import inf

import pytest
import torch

from hybridzoo.kernels import loader, sources
from hybridzoo.kernels.dispatch import use
from hybridzoo.kernels.selective_scan import bwd, fwd
from hybridzoo.layers import Sequence, kind_config
from tests.kernels import sass

BF16, FP32 = torch.bfloat16, torch.float32
# (b, l, i), dtype, is_packed: Mamba-1's call, with 16 states, at each mapping that it leads to on
# an H100 or H200; in fp32 too, as small models train; packs in bf16 alone
SHAPES = [
    (8, 2048, 4096), (32, 2048, 1536), (1, 2048, 1536), (1, 65536, 4096), (1, 8192, 8192),
    (2, 2048, 256),
]  # fmt: skip
LAUNCHES = [(shape, dtype, False) for shape in SHAPES for dtype in (BF16, FP32)]
LAUNCHES += [(shape, BF16, True) for shape in SHAPES[1:] if shape[0] == 1]
LAUNCHES += [((1, 8192, 16384), BF16, True)]


@pytest.fixture
def asked(monkeypatch):
    """Lines of what launches ask for from here on, and the key of each."""
    found = {}

    def load(source, name, defines, device):
        found[line(source, name, defines)] = sources.key(source, defines, "sm_90")
        return lambda *_: None

    monkeypatch.setattr(loader, "load", load)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: sass.HOPPER)
    return found


def line(source, name, defines):
    return " ".join([source, name, *(f"{k}={v}" for k, v in defines.items())])


def launch(shape, dtype, is_packed):
    b, l, i = shape
    with torch.device("meta"):
        wide, maps = torch.zeros(shape, dtype=dtype), torch.zeros(b, l, 1, 16, dtype=dtype)
        A, weight = torch.zeros(i, 16), torch.zeros(i)
        ends = torch.zeros(3, dtype=torch.int32) if is_packed else None
    options = (weight, wide, weight, None, ends, True, 0.0, inf)
    given = fwd.Arguments(wide, wide, A, maps, maps, *options)
    mapping = fwd.choose(shape, 16, wide.device)
    fwd.launch(given, mapping)
    for is_lean in (False, True):
        _, state, checkpoints = fwd.launch(given, mapping, bwd.distance(16, is_lean=is_lean))
        back = bwd.choose(shape, 16, wide.device, is_packed=is_packed, is_lean=is_lean)
        bwd.launch(given, wide, state, checkpoints, back)


def test_list_is_what_launches_ask_for(asked):
    for each in LAUNCHES:
        launch(*each)
    listed = [line(*instance) for instance in sources.listed()]
    assert "\n".join(sorted(listed)) == "\n".join(sorted(asked))
    # a cubin has its name from the list's words, and is looked for by a launch's numbers
    keys = {sources.key(i.source, i.defines, "sm_90") for i in sources.listed()}
    assert keys == set(asked.values())


@pytest.mark.parametrize("is_packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_layer_asks_for_what_is_listed(asked, monkeypatch, rows, is_packed):
    """The published widths' alignment, in parts of in_proj's and x_proj's outputs."""
    monkeypatch.setattr(loader, "available", lambda device: None)
    config = kind_config("test", "mamba1").from_dict("test", {"d_state": 16})
    layer = config.build(768, dtype=BF16)
    layer.init_weights(0, "", 1)
    ctx, n = Sequence(), 40
    if is_packed:
        rows, n = 1, 40 * rows
        ends = torch.tensor([0, 7, n], dtype=torch.int32)
        ctx = Sequence.build(n, cu_seqlens=ends, max_seqlen=n - 7)
    x = torch.randn(rows, n, 768, dtype=BF16)
    with use(selective_scan="cuda"):
        layer(x, None, ctx).sum().backward()
        with torch.no_grad():
            layer(x, None, ctx)
    assert asked
    assert asked.keys() <= {line(*instance) for instance in sources.listed()}
