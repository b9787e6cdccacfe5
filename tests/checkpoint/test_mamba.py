"""What the classes of Mamba alone have: clones, stale widths, bounds on dt, and what they lack."""

import json

import pytest
import torch

from hybridzoo.checkpoint import load, open_source, read_config, save
from hybridzoo.config import HybridConfig
from hybridzoo.errors import CheckpointError, HybridzooError
from hybridzoo.model import HybridLM
from tests.families.base import change_tensors

BASE = {"d_model": 16, "vocab_size": 23, "pattern": "3M"}


def stack(kind, pattern="3M", **options):
    layers = {"M": {"kind": kind, **options}, "F": {"kind": "mlp", "d_ff": 8}}
    return HybridConfig.from_dict({**BASE, "pattern": pattern, "layers": layers})


@pytest.mark.parametrize(
    "keys",
    [
        {"model_type": "mamba"},
        {"model_type": "mamba", "architectures": ["MambaForCausalLM"]},
        {"model_type": "mamba", "architectures": None, "mixer_rms_eps": 1e-6},
        {"model_type": "mamba2"},
    ],
    ids=str,
)
def test_clone_that_calls_falcon_mamba_mamba_is_refused_with_the_way_out(made, keys, tmp_path):
    tiny, _ = made("falcon_mamba", "every")
    source = tiny.edited(tmp_path / "clone", **keys)
    with pytest.raises(CheckpointError, match="Set model_type to falcon_mamba"):
        load(source)


@torch.no_grad()
def test_only_model_type_tells_falcon_mamba_from_mamba(made, tmp_path):
    """The tensors fit both, so running one as the other would be silent."""
    tiny, _ = made("falcon_mamba", "plain")

    def without_a_trace(config):
        names = ("mixer_rms_eps", "architectures")
        return {k: v for k, v in config.items() if k not in names} | {"model_type": "mamba"}

    source = tiny.edited(tmp_path / "clone")
    path = source / "config.json"
    path.write_text(json.dumps(without_a_trace(json.loads(path.read_text()))))
    assert (load(source)(tiny.ids) - tiny.logits).abs().max() > 0.1


def test_width_beside_a_stale_expand_wins(made):
    # falcon-mamba-7b says expand 16 beside intermediate_size, mamba-790m-hf a wrong d_model
    for layout in ("mamba", "falcon_mamba"):
        _, ours = made(layout, "stale")
        layer = ours.config.layers["M"]
        assert layer.widths(ours.config.d_model)[0] == 80 and ours.config.d_model == 48


@pytest.mark.parametrize("keys", [{"expand": 4}, {"num_heads": 4}, {"head_dim": 3}], ids=str)
def test_widths_of_mamba2_that_disagree_are_named(made, keys, tmp_path):
    tiny, _ = made("mamba2", "plain")
    with pytest.raises(
        CheckpointError, match=r"num_heads \(\d+\) times head_dim .* must be expand"
    ):
        open_source(tiny.edited(tmp_path / "changed", **keys))


@torch.no_grad()
def test_bounds_on_dt_hold_in_one_token_steps(made):
    """The reference forgets them there; ours must not, and they must matter."""
    tiny, ours = made("mamba2", "limit")
    free = ours.config.to_dict()
    free["layers"]["M"]["dt_limit"] = [0.0, float("inf")]
    unbound = HybridLM(HybridConfig.from_dict(free), init=False).eval()
    unbound.load_state_dict(ours.state_dict())
    assert (unbound(tiny.ids) - tiny.logits).abs().max() > 0.1
    state = ours.init_state(2, 21)
    steps = torch.cat([ours(i, state=state) for i in tiny.ids.split(1, 1)], 1)
    torch.testing.assert_close(steps, tiny.logits, atol=tiny.tolerance, rtol=0)


def test_codestrals_norm_before_gate_is_not_believed(made):
    tiny, ours = made("mamba2", "codestral")
    assert json.loads((tiny.directory / "config.json").read_text())["norm_before_gate"]
    assert ours.config.layers["M"].norm == "gate_first"


@pytest.mark.parametrize("layout", ["mamba", "mamba2", "falcon_mamba"])
def test_what_shapes_training_or_rounding_is_written_back(made, layout, tmp_path):
    _, ours = made(layout, "every")
    config = ours.config.with_options(source_layout=None)
    save(HybridLM(config), tmp_path, layout=layout)
    text = (tmp_path / "config.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"not strict JSON: {name}"))
    again = read_config(tmp_path)
    assert again.residual_fp32 is False
    layer = again.layers["M"]
    assert (layer.dt_min, layer.dt_max, layer.dt_init_floor) == (0.01, 0.2, 0.002)
    assert getattr(layer, "chunk_size", 5) == 5


def test_residual_in_fp32_is_the_models(made):
    assert made("mamba", "plain")[1].config.residual_fp32
    assert not made("mamba", "every")[1].config.residual_fp32


@pytest.mark.parametrize(
    ("layout", "config", "said"),
    [
        ("mamba", stack("mamba1", pattern="MFM"), "cannot express the pattern"),
        ("mamba", stack("mamba2", head_dim=4), "every layer is one mamba1"),
        ("mamba", stack("mamba1", x_norm="learned"), r"blocks\.0\.x_norm"),
        ("mamba", stack("mamba1", dt_limit=(0.1, 1.0)), r"blocks\.0\.dt_limit"),
        ("mamba", stack("mamba1", out_proj_bias=True), r"blocks\.0\.out_proj_bias"),
        ("mamba", stack("mamba1").with_options(layers_at={1: {"d_state": 4}}), "d_state"),
        ("mamba", stack("mamba1").with_options(norm="layer_norm"), "norm of this config"),
        ("mamba2", stack("mamba2", head_dim=4, norm="norm_first"), r"blocks\.0\.norm"),
        ("mamba2", stack("mamba2", head_dim=4, norm="none"), r"blocks\.0\.norm"),
        ("mamba2", stack("mamba2", head_dim=4, norm_eps=1e-3), r"blocks\.0\.norm_eps"),
        ("mamba2", stack("mamba2", head_dim=4, d_inner=24), r"d_inner \(24\).*multiple of d_model"),
        ("falcon_mamba", stack("mamba1"), r"blocks\.0\.x_norm"),
    ],
)  # fmt: skip
def test_config_that_the_class_cannot_say_is_refused(layout, config, said, tmp_path):
    with pytest.raises(CheckpointError, match=said):
        save(HybridLM(config, device="meta"), tmp_path, layout=layout)
    assert not list(tmp_path.iterdir())


def test_shared_weights_are_not_written_as_one_layers_own(tmp_path):
    layers, shared = {"M": {"shared": "one"}}, {"one": {"kind": "mamba1"}}
    config = HybridConfig.from_dict({**BASE, "layers": layers, "shared": shared})
    with pytest.raises(CheckpointError, match="cannot express shared"):
        save(HybridLM(config, device="meta"), tmp_path, layout="mamba")


def test_width_that_is_no_multiple_of_the_models_is_read_back(tmp_path):
    # the class wants a whole expand, and takes the width beside it
    save(HybridLM(stack("mamba1", d_inner=24)), tmp_path, layout="mamba")
    assert read_config(tmp_path).layers["M"].widths(16) == (24, 1)


@pytest.mark.parametrize("layout", ["mamba", "mamba2", "falcon_mamba"])
def test_tensor_that_the_config_does_not_want_is_named(made, layout, tmp_path):
    tiny, _ = made(layout, "plain")
    source = tiny.edited(tmp_path / "more")
    change_tensors(source, lambda t: t | {"backbone.layers.0.mixer.dt_norm": torch.ones(3)})
    with pytest.raises(HybridzooError, match="dt_norm is not in the config"):
        load(source)
