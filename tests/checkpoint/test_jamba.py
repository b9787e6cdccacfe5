"""What Jamba alone has: periods of attention and experts, and the first remote code's names."""

from pathlib import Path

import pytest
import torch
from transformers import JambaForCausalLM

from hybridzoo.checkpoint import load, open_source, save
from hybridzoo.config import HybridConfig
from hybridzoo.errors import CheckpointError, HybridzooError
from hybridzoo.model import HybridLM

REPO = Path(__file__).parents[2]


def test_own_pattern_exports_and_reads_back(tmp_path):
    config = HybridConfig.load(REPO / "configs/jamba-v0.1.yaml").to_dict()
    layers = {
        "M": {**config["layers"]["M"], "d_state": 4},
        "A": {**config["layers"]["A"], "n_heads": 2, "n_kv_heads": 1},
        "F": {**config["layers"]["F"], "d_ff": 12},
        "E": {**config["layers"]["E"], "d_ff": 12, "n_experts": 3},
    }
    config |= {"d_model": 32, "vocab_size": 50, "pattern": "MF ME AF ME", "layers": layers}
    model = HybridLM(HybridConfig.from_dict(config)).eval()
    save(model, tmp_path, layout="jamba")
    theirs = JambaForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(1, 22)[None]
    with torch.no_grad():
        # both in fp32, logits below 0.1 at this initialisation: 1e-5 is a hundred roundings of the
        # largest.
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-5, rtol=0)


def test_v01_has_the_published_counts():
    config = HybridConfig.load(REPO / "configs/jamba-v0.1.yaml")
    assert config.n_params() == 51_570_323_328
    assert config.n_active_params() == 12_110_311_296


@pytest.mark.parametrize(
    ("variant", "keys"),
    [
        ("every", {"num_attention_heads": 4, "num_key_value_heads": 1}),
        ("attention_only", {"hidden_act": "silu"}),
    ],
    ids=str,
)
def test_key_that_fits_the_shapes_moves_the_logits(made, variant, keys, tmp_path):
    """Negative control: the comparison with the reference would see these keys read wrongly."""
    tiny, _ = made("jamba", variant)
    with torch.no_grad():
        moved = load(tiny.edited(tmp_path / "changed", **keys)).eval()(tiny.ids) - tiny.logits
    assert moved.abs().max() > 1e-3


@pytest.mark.parametrize(
    "keys",
    [
        {"num_hidden_layers": 5},
        {"num_experts": 6},
        {"num_experts": 1},
        {"mamba_dt_rank": "auto"},
        {"hidden_act": "softplus"},
        {"attn_layer_offset": 3},
        {"num_experts_per_tok": 9},
        {"rms_norm_eps": "1e-6"},
        {"quantization_config": {"bits": 4}},
        {"mamba_dt_ranks": 5},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 2**31 - 1},
        {"num_experts": 2**31 - 1},
    ],
    ids=str,
)
def test_key_that_contradicts_the_tensors_is_refused(made, keys, tmp_path):
    tiny, _ = made("jamba", "every")
    with pytest.raises(HybridzooError) as refused:
        open_source(tiny.edited(tmp_path / "changed", **keys))
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"use_cache": False},
        {"initializer_range": 9.0},
        {"max_position_embeddings": 1},
        {"use_mambapy": True},
        {"num_logits_to_keep": 3},
        {"layers_block_type": ["mamba", "attention", "mamba"] * 2},
        {"layer_types": ["linear_attention", "full_attention", "linear_attention"] * 2},
    ],
    ids=str,
)
def test_key_that_computes_nothing_is_ignored(made, keys, tmp_path):
    tiny, ours = made("jamba", "every")
    with torch.no_grad():
        assert torch.equal(
            load(tiny.edited(tmp_path / "changed", **keys)).eval()(tiny.ids), ours(tiny.ids)
        )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pattern": "MF MM AE"}, "pattern"),
        ({"pattern": "MF M AE"}, "pattern"),
        ({"pattern": "MF AF AF MF"}, "once in a fixed period"),
        ({"embedding_multiplier": 2.0}, "embedding_multiplier"),
        ({"norm_eps": 1e-4}, "norm_eps"),
    ],
)
def test_config_that_jamba_cannot_say_is_refused(made, change, said, tmp_path):
    _, ours = made("jamba", "every")
    model = HybridLM(ours.config.with_options(source_layout=None, **change), device="meta")
    with pytest.raises(CheckpointError, match=said):
        save(model, tmp_path, layout="jamba")
    assert not list(tmp_path.iterdir())


def test_changed_architecture_is_written_in_the_newest_dialect(made, tmp_path):
    """The files that the source had no longer fit; remembering them would lose the change."""
    tiny, ours = made("jamba", "legacy")
    changed = HybridLM(ours.config.with_options(tie_embeddings=True), init=False)
    changed.load_state_dict(ours.state_dict() | {"head.weight": ours.embed.weight})
    save(changed, tmp_path, layout="jamba")
    theirs = JambaForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        got, want = changed.eval()(tiny.ids), theirs(tiny.ids).logits
    torch.testing.assert_close(got, want, atol=tiny.tolerance, rtol=0)
