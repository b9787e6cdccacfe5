"""HybridLM: the stack, its options, its states; the same function and training at every tp."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hybridzoo.comm import SINGLE
from hybridzoo.errors import CheckpointError, ConfigError
from hybridzoo.layers import Sequence
from hybridzoo.layers.init import seeded
from hybridzoo.model import HybridLM
from hybridzoo.sharding import Replicate
from tests import gloo
from tests.models import (
    OPTIONS,
    assert_modes_equal,
    joined,
    make_config,
    make_model,
    pieces,
    randint,
    run_modes,
    tiny,
)

# float64: far above its rounding, far below any mistake
TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}
# what published files need beyond the plain case: latent experts, a convolution and hidden units
# beside the heads, biases in every place, shifted norms
ALL_NEW = {"norm": "layer_norm", "layers": dict(OPTIONS["layers"])}
ALL_NEW["layers"]["E"] = tiny("moe", d_ff=8, d_latent=6, bias=True)
ALL_NEW["layers"]["A"] = tiny("attention", n_kv_heads=1, d_conv=3, parallel_d_ff=8)
PAIR = {"pattern": "NA", "shared": {}, "layers_at": {}}
PAIR["layers"] = {"N": tiny("mamba1"), "A": tiny("attention")}


def assert_close(got, expected, what=""):
    torch.testing.assert_close(got, expected, **TOLERANCE, msg=lambda m: f"{what}: {m}")


def loss_and_aux(model, ids, ctx):
    logits = model.logits(model.hidden(ids[:, :-1], None, ctx))
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()) + sum(ctx.aux)


def train(parallel, n_steps, change):
    """Joinable parameters after n_steps of AdamW from the seeded start."""
    model = HybridLM(make_config(**change), seed=5, parallel=parallel, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(11)
    for step in range(n_steps):
        optimizer.zero_grad()
        loss = loss_and_aux(model, randint(3, 10, seed=step), Sequence(aux=[]))
        loss.backward()
        optimizer.step()
    return pieces(model, torch.Tensor.detach), loss.item()


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "sequence"])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_compute_one_ranks_model(world, sequence_parallel):
    # 23 ids, which neither 2 nor 4 divides
    configs = [make_config(), make_config(**ALL_NEW, tie_embeddings=True)]
    ranks = gloo.run(world, run_modes, configs, sequence_parallel)
    assert_modes_equal(ranks, run_modes(SINGLE, configs), configs, **TOLERANCE)


@pytest.mark.parametrize(
    "change", [{}, {"dropout": 0.3}, ALL_NEW], ids=["plain", "dropout", "published"]
)
def test_training_on_ranks_equals_training_on_one(change):
    one, one_loss = train(SINGLE, 20, change)
    ranks = gloo.run(2, train, 20, change)
    config = make_config(**change)
    # joined() also refuses replicated parameters that differ in one bit between the ranks
    together, alone = joined(config, [r[0] for r in ranks]), joined(config, [one])
    for name, tensor in together.items():
        torch.testing.assert_close(
            tensor, alone[name], rtol=0, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert abs(one_loss - ranks[0][1]) < 1e-8


@pytest.mark.parametrize("change", [{}, ALL_NEW], ids=["plain", "published"])
def test_replicated_parameters_stay_equal_to_the_bit(change):
    first, second = (r[0] for r in gloo.run(2, train, 5, change))
    config = make_config(**change)
    whole = [n for n, p in config.params() if p.trained and isinstance(p.cut, Replicate)]
    replicated = [(n, next(iter(first[n]))) for n in whole]
    # of B, C and keys there is one content, which both ranks hold
    replicated += [
        (n, k) for n, held in first.items() for k in held if k.endswith("_shared") and "blocks" in n
    ]
    assert len(replicated) > 30
    for name, piece in replicated:
        assert torch.equal(first[name][piece], second[name][piece]), name


def dropped(parallel):
    model = make_model(make_config(dropout=0.5), parallel)
    torch.manual_seed(3)
    return model(randint(2, 9)).detach(), model.eval()(randint(2, 9)).detach()


def test_dropout_acts_in_training_only_and_alike_on_all_ranks():
    plain = make_model()(randint(2, 9))
    one, evaluated = dropped(SINGLE)
    assert_close(evaluated, plain)
    assert (one - plain).abs().max() > 1e-3
    for rank, _ in gloo.run(2, dropped):
        assert_close(rank, one)


def test_dropout_keeps_the_mean_and_drops_its_share():
    model = make_model(make_config(dropout=0.25))
    seen = []
    model.blocks[3].register_forward_hook(lambda *a: seen.append(a[-1][1]))
    model(randint(40, 30))
    zeros = (seen[0] == 0).double().mean()
    # 19,200 draws: 6 standard deviations of a share of 0.25
    assert abs(zeros - 0.25) < 6 * (0.25 * 0.75 / seen[0].numel()) ** 0.5


@pytest.mark.parametrize("tie", [True, False])
def test_state_dict_has_the_canonical_names(tie):
    config = make_config(tie_embeddings=tie)
    model = make_model(config)
    canonical = [name for name, _ in config.params()]
    assert {n for n, _ in model.named_parameters()} == set(canonical)
    assert len(canonical) == len(set(canonical))
    # a tied head is the embedding under a second name
    assert set(model.state_dict()) == {*canonical, "head.weight"}
    assert {k: tuple(p.shape) for k, p in model.named_parameters()} == {
        k: p.shape for k, p in config.params()
    }


def test_a_tied_head_is_the_embedding():
    tied, untied = make_model(make_config(tie_embeddings=True)), make_model()
    assert tied.head.weight is tied.embed.weight
    assert untied.head.weight is not untied.embed.weight
    assert not torch.equal(untied.head.weight, untied.embed.weight)
    ids = randint(2, 9)
    untied.head.weight.data.copy_(untied.embed.weight.data)
    assert_close(tied(ids), untied(ids))


def test_logits_multiplier_scales_the_logits():
    ids = randint(2, 9)
    half, plain = make_model(), make_model(make_config(logits_multiplier=1.0))
    assert_close(half(ids), plain(ids) / 2)


def test_embedding_multiplier_scales_the_embedding():
    ids = randint(2, 9)
    double, plain = make_model(), make_model(make_config(embedding_multiplier=1.0))
    assert (double(ids) - plain(ids)).abs().max() > 1e-3
    plain.embed.weight.data *= 2
    assert_close(double(ids), plain(ids))


def test_residual_multiplier_scales_every_sublayer():
    ids = randint(2, 9)
    scaled = make_model(make_config(**PAIR))
    outside = {k: v | {"output_multiplier": 1.3 * 0.7} for k, v in PAIR["layers"].items()}
    inside = make_model(make_config(**PAIR | {"layers": outside, "residual_multiplier": 1.0}))
    assert_close(scaled(ids), inside(ids))
    assert (
        scaled(ids) - make_model(make_config(**PAIR | {"residual_multiplier": 1.0}))(ids)
    ).abs().max() > 1e-3


def test_input_multiplier_scales_the_normed_input():
    ids = randint(2, 9)
    scaled = make_model(make_config(**PAIR))
    plain = {k: v | {"input_multiplier": 1.0} for k, v in PAIR["layers"].items()}
    by_norm = make_model(make_config(**PAIR | {"layers": plain}))
    assert (scaled(ids) - by_norm(ids)).abs().max() > 1e-3
    for block in by_norm.blocks:
        block.norm.weight.data *= 0.8
    assert_close(scaled(ids), by_norm(ids))


def test_layer_norm_norms_every_block_and_the_end():
    ids = randint(2, 9)
    model = make_model(make_config(**PAIR | {"norm": "layer_norm"}))
    names = {"blocks.0.norm.bias", "blocks.1.norm.bias", "norm.bias"}
    assert {n for n, _ in model.named_parameters() if n.endswith("norm.bias")} == names

    def norm(x, place):
        return F.layer_norm(x, (16,), place.weight, place.bias, 1e-3)

    h = model.embed(ids) * 2.0
    for block in model.blocks:
        h = h + 0.7 * 1.3 * block.layer(0.8 * norm(h, block.norm), None, Sequence())
    assert_close(model(ids), 0.5 * model.head(norm(h, model.norm)))


def test_the_place_of_the_norms_cast_reaches_every_norm():
    model = make_model(make_config(norm_weight_fp32=True))
    assert all(m.weight_fp32 for m in (*(b.norm for b in model.blocks), model.norm))
    # a mixer's own norms cast first in Nemotron-H too
    assert not model.blocks[1].layer.dt_norm.weight_fp32


@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_first_block_rounds_like_the_others(norm):
    """With nothing to add yet an fp32 stream is cast where it is everywhere else."""
    model = make_model(make_config(residual_fp32=True, norm=norm), dtype=torch.bfloat16)
    block, h = model.blocks[0], torch.randn(2, 5, model.config.d_model)
    with torch.no_grad():
        block.norm.weight.copy_(torch.linspace(0.3, 3, model.config.d_model))
        first, h_after = block.normed(h, None)
        later, _ = block.normed(h, torch.zeros(h.shape, dtype=torch.bfloat16))
    assert first.dtype == torch.bfloat16 and torch.equal(first, later)
    assert torch.equal(h_after, h)


def test_residual_fp32_adds_in_fp32():
    streams = []
    for wide in (True, False):
        model = make_model(make_config(residual_fp32=wide), dtype=torch.bfloat16)
        deltas, stream = [], []
        for block in model.blocks:
            block.register_forward_hook(lambda m, a, out, d=deltas: d.append(out[1]))
        model.norm.register_forward_hook(lambda m, a, out, s=stream: s.append(out[1]))
        ids = randint(2, 9)
        assert model(ids).dtype == torch.bfloat16
        expected = model.embed(ids) * 2.0
        expected = expected.float() if wide else expected
        for delta in deltas:
            assert delta.dtype == torch.bfloat16
            expected = expected + delta * 0.7
        assert stream[0].dtype == (torch.float32 if wide else torch.bfloat16)
        assert torch.equal(stream[0], expected)
        streams.append(stream[0])
    assert not torch.equal(streams[0].bfloat16(), streams[1])


def test_a_block_adds_before_its_norm_and_sums_its_branches():
    model = make_model()
    block, h, delta = (
        model.blocks[0],
        torch.randn(2, 5, 16).double(),
        torch.randn(2, 5, 16).double(),
    )
    out_h, out = block(h, delta, None, Sequence())
    stream = h + 0.7 * delta
    normed = stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + 1e-3) * block.norm.weight
    expected = sum(1.3 * layer(0.8 * normed, None, Sequence()) for layer in block.branch.values())
    assert_close(out_h, stream)
    assert_close(out, expected)


def test_states_continue_the_whole_model():
    model, ids = make_model(), randint(2, 12)
    state = model.init_state(2, 12)
    chunks = [model(part, state=state) for part in ids.split([5, 1, 4, 1, 1], 1)]
    assert_close(torch.cat(chunks, 1), model(ids))


def test_left_padding_changes_nothing():
    model, ids = make_model(), randint(2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :7] = 0
    assert_close(model(ids, mask)[0, 7:], model(ids[:1, 7:])[0])
    assert_close(model(ids, mask)[1], model(ids)[1])


def test_packed_sequences_are_separate():
    model, ids = make_model(), randint(1, 12)
    ends = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    packed = model(ids, cu_seqlens=ends, max_seqlen=6)
    assert_close(packed, torch.cat([model(part) for part in ids.split([5, 1, 6], 1)], 1))


def test_a_pack_with_padding_is_refused():
    model, ends = make_model(), torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(ConfigError, match=r"cu_seqlens: packed sequences need max_seqlen \(None\)"):
        model(randint(1, 3), cu_seqlens=ends)
    with pytest.raises(ConfigError, match="take no attention_mask"):
        model(randint(1, 3), torch.ones(1, 3), cu_seqlens=ends, max_seqlen=3)


def test_padding_on_the_right_changes_nothing_before_it():
    model, ids = make_model(), randint(3, 9)
    mask = torch.arange(9) < torch.tensor([9, 5, 1])[:, None]
    logits = model(ids, mask)
    for row, n in enumerate([9, 5, 1]):
        assert_close(logits[row, :n], model(ids[row : row + 1, :n])[0])


PACK = torch.tensor([0, 4, 9], dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "n_rows", "message"),
    [
        ({"attention_mask": torch.ones(2, 12)}, 2, r"attention_mask: shape \(2, 12\)"),
        ({"attention_mask": torch.ones(1, 9)}, None, r"attention_mask: shape \(1, 9\)"),
        ({"cu_seqlens": PACK, "max_seqlen": 5}, None, r"input_ids: shape \(2, 9\)"),
        ({"max_seqlen": 5}, None, "max_seqlen: given"),
        ({"slots": torch.tensor([0, 1])}, None, "slots: 2 of them with no state"),
        ({"slots": torch.tensor([0])}, 2, "slots: 1 of them with 2 sequences"),
        ({}, 3, "state: 3 rows for 2 sequences"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(arguments, n_rows, message):
    model = make_model(make_config(pattern="AF", layers_at={}))
    state = None if n_rows is None else model.init_state(n_rows, 9)
    with pytest.raises(ConfigError, match=message):
        model(randint(2, 9), state=state, **arguments)


def test_more_tokens_than_a_state_holds_are_refused():
    model = make_model()
    with pytest.raises(ConfigError, match=r"9 tokens do not fit a state of max_len \(8\)"):
        model(randint(2, 9), state=model.init_state(2, 8))


def test_shared_places_have_one_weight_and_a_state_each():
    model, ids = make_model(), randint(1, 7)
    first, second = (model.blocks[i].layers()[0] for i in (3, 6))
    assert first is second is model.shared["base"]
    assert not any(n.startswith("blocks.3.layer") for n, _ in model.named_parameters())
    state = model.init_state(1, 7)
    model(ids, state=state)
    one, other = (state[i][0].tensors["ssm_state"] for i in (3, 6))
    assert one.any()
    assert not torch.equal(one, other)


def test_overrides_hold_at_their_place_only():
    model = make_model()
    assert model.blocks[7].layer.config.window_size == 3
    assert model.blocks[7].layer.qkv_proj.weight.shape[0] == (8 + 2) * 6
    assert model.blocks[0].branch["A"].config.window_size == 7
    assert model.blocks[4].branch["A"].rotary_dim == 0
    assert model.blocks[0].branch["A"].rotary_dim == 4


def test_a_replaced_layer_is_used():
    class Nothing(nn.Module):
        def forward(self, x, state, ctx):
            return torch.zeros_like(x)

    model = make_model()
    before = model(randint(2, 9))
    model.blocks[2].layer = Nothing()
    model.blocks[0].branch["A"] = Nothing()
    h, delta = torch.randn(2, 5, 16).double(), None
    assert not model.blocks[2](h, delta, None, Sequence())[1].any()
    middle = model(randint(2, 9))
    model.shared["base"] = Nothing()
    assert not torch.equal(before, middle)
    assert not torch.equal(middle, model(randint(2, 9)))


class Embedded(nn.Module):
    def forward(self, x, state, ctx):
        return ctx.embed0


def test_layers_may_read_the_embeddings_again():
    config = make_config(pattern="FF", layers_at={}, residual_multiplier=1.0)
    model, ids = make_model(config), randint(2, 9)
    for block in model.blocks:
        block.layer = Embedded()
    multiplier = config.embedding_multiplier * (1 + 2 * config.layers["F"].output_multiplier)
    assert_close(model(ids), model.logits(model.norm(model.embed(ids) * multiplier)[0]))


def test_a_deep_copy_is_independent():
    model, ids = make_model(), randint(2, 9)
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert_close(twin(ids), make_model()(ids))


def logits_of_a_copy(parallel):
    model, ids = make_model(parallel=parallel), randint(2, 9)
    twin = copy.deepcopy(model)
    return model(ids).detach(), twin(ids).detach()


def test_a_deep_copy_talks_to_the_same_ranks():
    for original, copied in gloo.run(2, logits_of_a_copy):
        assert_close(copied, original)


def test_a_model_survives_a_pickle():
    model, ids = make_model(), randint(2, 9)
    assert_close(pickle.loads(pickle.dumps(model))(ids), model(ids))


@torch.no_grad()
def test_a_tied_head_stays_tied():
    config = make_config(tie_embeddings=True)
    weights = {k: v.clone() for k, v in make_model(config).state_dict().items()}
    moved = HybridLM(config, device="meta").to_empty(device="cpu")
    assigned = HybridLM(config)
    assigned.load_state_dict(weights, assign=True)
    del weights["head.weight"]
    absent = HybridLM(config, dtype=torch.float64)
    absent.load_state_dict(weights)
    for model in (moved, assigned, absent, copy.deepcopy(absent), absent.to(torch.float32)):
        assert model.head.weight is model.embed.weight
    assert_close(absent.embed.weight, weights["embed.weight"].float())


def test_two_weights_for_a_tied_head_are_refused():
    model = make_model(make_config(tie_embeddings=True))
    weights = model.state_dict() | {"head.weight": model.embed.weight + 1}
    with pytest.raises(CheckpointError, match=r"head\.weight: differs from embed\.weight"):
        model.load_state_dict(weights)


def test_meta_builds_without_memory():
    config = make_config(vocab_size=2_000_000, d_model=1 << 14, layers_at={}, pattern="MANFES")
    model = HybridLM(config, device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == config.n_params()


def devices_under(_, default):
    with torch.device(default):
        model = HybridLM(make_config(), device=None if default == "meta" else "cpu")
    return {p.device.type for p in model.parameters()}


@pytest.mark.parametrize("default", ["meta", "cpu"])
def test_the_default_device_is_honoured_and_never_draws_weights(default):
    # a process of the pool, for the NaN filling of torch.empty hides it from torch's default device
    assert gloo.run(1, devices_under, default) == [{default}]


def test_weights_are_drawn_on_the_cpu_whatever_the_default_device():
    # "meta" stands for any device whose generator is not the CPU's
    expected = {k: p.init(p.shape, seeded(0, k)) for k, p in make_config().params()}
    with torch.device("meta"):
        drawn = {k: p.init(p.shape, seeded(0, k)) for k, p in make_config().params()}
    assert all(torch.equal(drawn[k], t) for k, t in expected.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_and_device(dtype, device):
    model = HybridLM(make_config(), dtype=dtype, device=device)
    wide = {dn for dn, p in make_config().params() if p.fp32}
    for name, parameter in model.named_parameters():
        assert parameter.device.type == device.type
        expected = torch.promote_types(dtype, torch.float32) if name in wide else dtype
        assert parameter.dtype == expected, name
    state = model.init_state(2, 12)
    ids = randint(2, 12).to(device)
    assert model(ids, state=state).dtype == dtype


def test_initial_weights_come_from_the_seed_alone():
    torch.manual_seed(1)
    one = HybridLM(make_config(), seed=4).state_dict()
    torch.manual_seed(2)
    same, other = HybridLM(make_config(), seed=4).state_dict(), HybridLM(make_config()).state_dict()
    assert all(torch.equal(t, same[k]) for k, t in one.items())
    drawn = [
        k for k in one if k.endswith(("proj.weight", "embed.weight", "dt_bias", "router_weight"))
    ]
    assert len(drawn) > 15
    assert not any(torch.equal(one[k], other[k]) for k in drawn)


def test_meta_then_init_equals_built_in_place():
    late = HybridLM(make_config(), device="meta").to_empty(device="cpu")
    late.init_weights(9)
    built = HybridLM(make_config(), seed=9).state_dict()
    assert all(torch.equal(t, built[k]) for k, t in late.state_dict().items())


# a stage boundary between two places, within a shared pair, and right behind the first place
CUTS = [(3,), (4,), (1, 5)]


def stage_ranges(cuts, n=8):
    return [range(a, b) for a, b in zip((0, *cuts), (*cuts, n), strict=True)]


def through(stages, ids, ctx):
    """What the last of a pipeline's stages computes, each handing its stream to the next."""
    h = stages[0].embedded(ids)
    for stage in stages[:-1]:
        h = stage.flushed(*stage.stream(h, None, ctx))
    return stages[-1].logits(stages[-1].finish(*stages[-1].stream(h, None, ctx)))


STAGED = {
    "plain": {},
    "tied": {"tie_embeddings": True},
    "layer_norm": {"norm": "layer_norm", "residual_fp32": True},
    "weight_fp32": {"norm_weight_fp32": True, "residual_multiplier": 1.0},
}


@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
@pytest.mark.parametrize("change", STAGED)
def test_stages_compute_the_whole_model_to_the_bit(change, precision):
    config, dtype = (
        make_config(**STAGED[change]),
        torch.bfloat16 if precision == "bf16" else torch.float32,
    )
    mask = torch.ones(2, 9)
    mask[0, :3] = 0
    whole = make_model(config, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        ids, ctx = randint(2, 9), Sequence.build(9, attention_mask=mask)
        expected = whole.logits(whole.hidden(ids, None, ctx))
        for cuts in CUTS:
            stages = [make_model(config, dtype=dtype, stage=r) for r in stage_ranges(cuts)]
            assert torch.equal(through(stages, ids, ctx), expected), cuts


def test_stages_have_the_whole_models_gradients():
    config = make_config(tie_embeddings=True)
    whole = make_model(config)
    ids, ctx = randint(2, 9), Sequence(aux=[])
    (whole.logits(whole.hidden(ids, None, ctx)).square().sum() + sum(ctx.aux)).backward()
    stages, ctx = [make_model(config, stage=r) for r in stage_ranges((4,))], Sequence(aux=[])
    (through(stages, ids, ctx).square().sum() + sum(ctx.aux)).backward()
    for name, parameter in whole.named_parameters():
        held = [dict(s.named_parameters()) for s in stages]
        # a shared layer's and a tied embedding's are the sum of its holders'
        grads = [h[name].grad for h in held if name in h and h[name].requires_grad]
        if parameter.requires_grad:
            assert_close(sum(grads), parameter.grad, name)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_stages_hold_the_canonical_names_between_them(tie):
    config = make_config(tie_embeddings=tie)
    whole, seen = HybridLM(config, seed=4).state_dict(), []
    for stage in (HybridLM(config, seed=4, stage=r) for r in stage_ranges((4,))):
        held = stage.state_dict()
        for name, tensor in held.items():
            assert torch.equal(tensor, whole[name]), name
        declared = {name for name, _, _ in stage.local_names()}
        assert declared == {n for n, _ in stage.named_parameters()}
        seen.append(set(held))
    first, last = seen
    assert first | last == set(whole)
    both = {n for n in whole if n.startswith("shared.base.")}
    assert first & last == (both | {"embed.weight"} if tie else both)
    assert ("head.weight" in last, "norm.weight" in last) == (True, True)
    assert not {"head.weight", "norm.weight"} & first


def test_a_stage_alone_gives_no_logits_and_no_text():
    ids = randint(1, 3)
    for stage in (make_model(stage=r) for r in stage_ranges((4,))):
        start, stop = stage.stage.start, stage.stage.stop - 1
        rule = rf"stage: places {start} to {stop} of 8 give no logits; all stages together do\. "
        for act in (lambda m: m(ids), lambda m: m.init_state(1, 3), lambda m: m.generate(ids)):
            with pytest.raises(ConfigError, match=rule):
                act(stage)


@pytest.mark.parametrize("stage", [range(3, 3), range(-1, 3), range(2, 9), range(0, 8, 2)], ids=str)
def test_a_stage_is_places_in_a_row(stage):
    with pytest.raises(ConfigError, match=r"it is one or more places in a row, of 0 to 7"):
        HybridLM(make_config(), stage=stage, device="meta")


def refusals(parallel):
    """What a sequence-parallel model says of odd lengths, states and generation."""
    model = make_model(parallel=replace(parallel, sequence_parallel=True))
    said = []
    for act in (
        lambda: model(randint(2, 9)),
        lambda: model.init_state(1, 4),
        lambda: model.generate(randint(2, 4)),
    ):
        with pytest.raises(ConfigError) as error:
            act()
        said.append(str(error.value))
    return said


def test_sequence_parallelism_refuses_odd_lengths_and_states():
    length, state, text = gloo.run(2, refusals)[0]
    assert length.startswith("sequence_parallel: 9 tokens cannot be shared by tp=2 ranks; ")
    assert state == text
    assert state.startswith("sequence_parallel: no state can be continued with it; ")


def full_logits(parallel):
    """Logits of a model whose vocabulary the ranks share, and the gradient of a probe on them."""
    model = make_model(make_config(vocab_size=330, pattern="F", layers_at={}), parallel)
    hidden = torch.linspace(-1, 1, 2 * 3 * 16, dtype=torch.float64).view(2, 3, 16)
    hidden.requires_grad_()
    logits = model.logits(parallel.tp.copy_in(hidden))
    (logits * torch.linspace(0, 1, 330).double()).sum().backward()
    local = model.local_logits(hidden).detach()
    return logits.detach(), hidden.grad, local, model.vocab_range


def test_every_rank_has_all_logits_and_computes_its_own():
    logits, grad, *_ = full_logits(SINGLE)
    # multiples of 16; the last rank has what is left
    starts = [range(0, 80), range(80, 160), range(160, 240), range(240, 330)]
    for rank, (got, got_grad, local, ids) in enumerate(gloo.run(4, full_logits)):
        assert ids == starts[rank]
        assert_close(got, logits)
        assert_close(got_grad, grad)
        assert_close(local, logits[..., ids.start : ids.stop])


def dropped_apart(parallel):
    model = make_model(make_config(dropout=0.5), replace(parallel, sequence_parallel=True))
    torch.manual_seed(parallel.tp.rank)
    return model.blocks[3](torch.ones(1, 6, 16).double(), None, None, Sequence())[1].detach()


def test_under_sequence_parallelism_each_rank_drops_for_its_own_tokens():
    first, second = gloo.run(2, dropped_apart)
    assert first.shape == second.shape == (1, 6, 16)
    assert not torch.equal(first == 0, second == 0)


def compile_stack(_, pattern, dynamic, change):
    # the process of the pool compiled other stacks before, and counts their graphs
    torch.compiler.reset()
    # 5 tokens: tracing unrolls the scans
    config = make_config(pattern=pattern, layers_at={}, **change)
    model, ids = make_model(config), randint(2, 5)
    mask = torch.ones(2, 5)
    mask[0, :3] = 0
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=dynamic)
    assert_close(compiled(ids, mask), model(ids, mask))
    compiled(ids).square().sum().backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(ids).square().sum().backward()
    for name, grad in got.items():
        assert_close(grad, model.get_parameter(name).grad, name)
    with torch.no_grad():
        state, expected = model.init_state(2, 5), model.init_state(2, 5)
        for part in ids.split([3, 1, 1], 1):
            assert_close(compiled(part, state=state), model(part, state=expected))
    return len(got)


@pytest.mark.parametrize(
    ("pattern", "dynamic", "change"),
    [
        ("[MA]E", False, {}),
        pytest.param("AE", False, ALL_NEW, marks=pytest.mark.slow),
        pytest.param("[MA]NFSE", None, {}, marks=pytest.mark.slow),
    ],
    ids=["short", "published", "long"],
)
def test_a_whole_stack_compiles_to_one_graph(pattern, dynamic, change, monkeypatch):
    # a process of the pool: the compiler cannot trace the NaN filling of torch.empty
    monkeypatch.setattr(gloo, "TIMEOUT_S", 300)
    (n_gradients,) = gloo.run(1, compile_stack, pattern, dynamic, change)
    assert n_gradients > 10
