"""Blocks that lie anywhere in a stored tensor: parts in another order, or rows left out."""

import torch
from safetensors.torch import save_file

from hybridzoo.checkpoint.convert.base import Reordered, _expand
from hybridzoo.checkpoint.layout import Block, Held, Source, unfused, whole
from hybridzoo.checkpoint.reader import Reader
from hybridzoo.config import HybridConfig

CONFIG = HybridConfig.from_dict(
    {
        "d_model": 4,
        "vocab_size": 5,
        "pattern": "F",
        "layers": {"F": {"kind": "mlp", "d_ff": 6}},
    }
)
FUSED = "blocks.0.layer.gate_up_proj.weight"


def source(tmp_path):
    """The up rows stored first, and an embedding with three rows of padding."""
    params = dict(CONFIG.params())
    torch.manual_seed(0)
    tensors = {name: torch.randn(p.shape) for name, p in params.items()}
    stored = dict(tensors)
    gate, up = tensors[FUSED].chunk(2)
    stored["fc1"] = torch.cat([up, gate])
    del stored[FUSED]
    stored["embed.weight"] = torch.cat([tensors["embed.weight"], torch.ones(3, 4)])
    save_file(stored, tmp_path / "model.safetensors")
    blocks = whole(CONFIG)
    blocks[FUSED] = _expand(Reordered("fc1", (1, 0, 2)), "", params[FUSED])
    blocks["embed.weight"] = [Block("embed.weight", ((0, 5), (0, 4)), (8, 4), (0, 0))]
    return Source(CONFIG, Reader(tmp_path), blocks), tensors, stored


def test_a_parameter_is_gathered_from_where_its_parts_lie(tmp_path):
    opened, tensors, _ = source(tmp_path)
    for name, expected in tensors.items():
        assert torch.equal(opened.fetch(name), expected)
        target = torch.empty(expected.shape)
        opened.read_into(target, name)
        assert torch.equal(target, expected)


def test_slices_cross_the_parts(tmp_path):
    opened, tensors, _ = source(tmp_path)
    target = torch.empty(6, 4)
    # the second half of gate and of up: a rank's share
    parts = [Held(((3, 6), (0, 4)), (0, 0)), Held(((9, 12), (0, 4)), (3, 0))]
    opened.read_into(target, FUSED, parts)
    assert torch.equal(target, torch.cat([tensors[FUSED][3:6], tensors[FUSED][9:]]))


def test_a_stored_tensor_is_put_together_again(tmp_path):
    opened, _, stored = source(tmp_path)
    blocks = {FUSED: opened.blocks[FUSED]}
    assert torch.equal(unfused(opened.fetch, blocks)("fc1"), stored["fc1"])
