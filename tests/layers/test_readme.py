"""The kind that hybridzoo/layers/README.md writes out is a whole kind."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch

from hybridzoo.config import HybridConfig
from hybridzoo.errors import ConfigError
from hybridzoo.layers import KINDS, Sequence, register
from hybridzoo.model import HybridLM

README = Path(__file__).parents[2] / "hybridzoo" / "layers" / "README.md"


@pytest.fixture
def kind(monkeypatch):
    module = types.ModuleType("decay_of_the_readme")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec(block, module.__dict__)
    monkeypatch.setattr("hybridzoo.layers.KINDS", dict(KINDS))
    register("decay", "decay_of_the_readme:DecayConfig")
    return module.DecayConfig


def test_it_builds_from_a_legend_and_trains(kind):
    layers = {"D": {"kind": "decay", "d_inner": 8}, "F": {"kind": "mlp", "d_ff": 24}}
    options = {"d_model": 16, "vocab_size": 20, "pattern": "DFD", "layers": layers}
    model = HybridLM(HybridConfig.from_dict(options), dtype=torch.float64)
    # not a plain sum: the final norm's output has a gradient that sums to nearly nothing.
    model(torch.randint(0, 20, (2, 9))).logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_states_packs_and_padding_agree_with_one_pass(kind):
    layer = kind.tiny().build(16, dtype=torch.float64)
    layer.init_weights(0, "", 1)
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    whole = layer(x, None, Sequence())
    with torch.no_grad():
        state = layer.init_state(2, 11)
        parts = [layer(part, state, Sequence()) for part in x.split([5, 1, 4, 1], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole)
        starts = torch.tensor([0, 11, 22], dtype=torch.int32)
        packed = Sequence.build(22, cu_seqlens=starts, max_seqlen=11)
        got = layer(x.flatten(0, 1)[None], None, packed)
        torch.testing.assert_close(got[0], whole.flatten(0, 1))
        padded = torch.cat([torch.randn(2, 3, 16, dtype=torch.float64), x], 1)
        mask = torch.tensor([[0, 0, 0] + [1] * 11] * 2)
        masked = layer(padded, None, Sequence.build(14, attention_mask=mask))
        torch.testing.assert_close(masked[:, 3:], whole)


def test_a_name_that_is_taken_is_refused(kind):
    with pytest.raises(ConfigError, match="kind mamba2 is registered already"):
        register("mamba2", "somewhere:Else")
