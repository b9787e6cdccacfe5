"""The contract of every kind: one forward for training, prefill, chunks, packs and steps."""

import copy
import importlib
from dataclasses import replace

import pytest
import torch
from torch import nn

from hybridzoo.layers import Sequence, State, kind_config
from hybridzoo.layers.base import LayerConfig
from tests.layers.cases import (
    CASES,
    D_MODEL,
    MIXERS,
    PLAIN,
    assert_states_equal,
    full_weights,
    make_layer,
    randn,
    rows,
)

# float64 throughout: 1e-10 is far above its rounding and far below any mistake
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
LENGTH = 19
SPLITS = [(19,), (7, 12), (12, 7), (8, 1, 1, 5, 4), (1,) * 19]

every_case = pytest.mark.parametrize("name", CASES)
every_mixer = pytest.mark.parametrize("name", MIXERS)


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, **TOLERANCE)


def in_chunks(layer, x, state, split):
    return torch.cat([layer(chunk, state, PLAIN) for chunk in x.split(split, 1)], 1)


@every_case
def test_a_token_changes_nothing_before_it(name):
    layer, x = make_layer(name), randn(2, LENGTH, D_MODEL)
    changed = x.clone()
    changed[:, 5] += 1
    difference = (layer(changed, None, PLAIN) - layer(x, None, PLAIN)).abs().amax((0, 2))
    assert difference[:5].max() < 1e-12
    assert difference[5] > 1e-6
    if name in MIXERS:
        # which carry it on
        assert (difference[6:9] > 1e-6).all()
    else:
        # one token at a time; but experts multiply other rows together then, and a product may
        # round by how many they are
        assert difference[6:].max() <= (1e-12 if name.startswith("moe") else 0)


@every_mixer
@pytest.mark.parametrize(
    "split", SPLITS, ids=lambda s: "-".join(map(str, s)) if len(s) < 9 else "steps"
)
def test_any_split_through_one_state_equals_one_pass(name, split):
    layer, w = make_layer(name), randn(2, LENGTH, D_MODEL, seed=1)

    def run(split):
        layer.zero_grad()
        x, state = randn(2, LENGTH, D_MODEL).requires_grad_(), layer.init_state(2, LENGTH)
        y = layer(x, None, PLAIN) if split is None else in_chunks(layer, x, state, split)
        loss = (y * w).sum()
        loss.backward()
        return y, state, {"x": x.grad} | {n: p.grad for n, p in layer.named_parameters()}

    y, _, grads = run(None)
    one_pass = run((LENGTH,))[1]
    y_split, state, grads_split = run(split)
    assert_close(y_split, y)
    assert_states_equal(state, one_pass, **TOLERANCE)
    for parameter, grad in grads.items():
        assert_close(grads_split[parameter], grad)


@every_mixer
def test_a_final_state_carries_gradients_to_the_chunks_before(name):
    layer, w = make_layer(name), randn(2, 6, D_MODEL, seed=1)

    def first_chunk_gradient(split):
        x, state = randn(2, LENGTH, D_MODEL).requires_grad_(), layer.init_state(2, LENGTH)
        y = in_chunks(layer, x, state, split)
        ((y[:, -6:] * w).sum() + sum(t.square().sum() for t in state.tensors.values())).backward()
        return x.grad

    whole = first_chunk_gradient((LENGTH,))
    assert whole[:, 10].abs().max() > 1e-9
    assert_close(first_chunk_gradient((11, 2, 6)), whole)


@every_mixer
@pytest.mark.parametrize("split", [(19,), (8, 1, 1, 5, 4)], ids=["whole", "chunks"])
@torch.no_grad()
def test_without_gradients_states_are_updated_in_place(name, split):
    layer, x = make_layer(name), randn(2, LENGTH, D_MODEL)
    state = layer.init_state(2, LENGTH)
    places = {k: t.data_ptr() for k, t in state.tensors.items()}
    assert_close(in_chunks(layer, x, state, split), layer(x, None, PLAIN))
    assert {k: t.data_ptr() for k, t in state.tensors.items()} == places
    with torch.enable_grad():
        expected = layer.init_state(2, LENGTH)
        in_chunks(layer, x, expected, split)
    assert_states_equal(state, expected, **TOLERANCE)


@every_mixer
def test_with_gradients_states_are_rebound(name):
    layer, x = make_layer(name), randn(2, LENGTH, D_MODEL)
    state = layer.init_state(2, LENGTH)
    before = dict(state.tensors)
    layer(x, state, PLAIN)
    for key, tensor in before.items():
        assert not tensor.any()
        assert state.tensors[key] is not tensor


def packed(lengths):
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return Sequence.build(sum(lengths), cu_seqlens=ends, max_seqlen=max(lengths))


LENGTHS = [5, 0, 1, 9, 4]


@every_case
def test_packed_sequences_equal_separate_ones(name):
    layer, x = make_layer(name), randn(1, sum(LENGTHS), D_MODEL)
    separate = [layer(part, None, PLAIN) for part in x.split(LENGTHS, 1) if part.shape[1]]
    assert_close(layer(x, None, packed(LENGTHS)), torch.cat(separate, 1))


@every_mixer
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_packed_sequences_equal_separate_ones_through_warm_states(name, grad):
    layer = make_layer(name)
    past, x = randn(5, 7, D_MODEL), randn(1, sum(LENGTHS), D_MODEL, seed=1)
    with torch.set_grad_enabled(grad):
        pool = layer.init_state(5, 16)
        layer(past, pool, PLAIN)
        ones = [rows(pool, i) for i in range(5)]
        separate = [
            layer(p, s, PLAIN) for p, s in zip(x.split(LENGTHS, 1), ones, strict=True) if p.shape[1]
        ]
        assert_close(layer(x, pool, packed(LENGTHS)), torch.cat(separate, 1))
    for i, one in enumerate(ones):
        assert_states_equal(rows(pool, i), one, **TOLERANCE)


@every_mixer
def test_a_pack_of_one_token_is_no_step(name):
    """Its states have a row a sequence, of which two have no token; gradients rule a step out."""
    layer = make_layer(name)
    past, x, ctx = randn(3, 7, D_MODEL), randn(1, 1, D_MODEL, seed=1), packed([0, 1, 0])
    pool = layer.init_state(3, 16)
    layer(past, pool, PLAIN)
    pool = pool.map(torch.Tensor.detach)
    expected = pool.map(torch.clone)
    y = layer(x, expected, ctx)
    with torch.no_grad():
        assert_close(layer(x, pool, ctx), y)
    assert_states_equal(pool, expected, **TOLERANCE)


@every_mixer
def test_a_pack_has_the_gradients_of_separate_sequences(name):
    layer, w = make_layer(name), randn(1, sum(LENGTHS), D_MODEL, seed=1)

    def gradients(is_packed):
        layer.zero_grad()
        x, pool = randn(1, sum(LENGTHS), D_MODEL).requires_grad_(), layer.init_state(5, 16)
        pool = pool.map(lambda t: t if t.dtype == torch.int32 else t + 0.1)
        if is_packed:
            y = layer(x, pool, packed(LENGTHS))
        else:
            parts = zip(x.split(LENGTHS, 1), [rows(pool, i) for i in range(5)], strict=True)
            y = torch.cat([layer(p, s, PLAIN) for p, s in parts if p.shape[1]], 1)
        (y * w).sum().backward()
        return {"x": x.grad} | {n: p.grad for n, p in layer.named_parameters()}

    separate = gradients(False)
    for parameter, grad in gradients(True).items():
        assert_close(grad, separate[parameter])


def left_padded(lengths, length):
    """Rows of tokens behind padding that would be noticed, and their mask."""
    tokens = [randn(1, n, D_MODEL, seed=n) for n in lengths]
    mask = torch.arange(length) >= length - torch.tensor(lengths)[:, None]
    x = 1e3 * randn(len(lengths), length, D_MODEL, seed=99)
    for row, part in enumerate(tokens):
        x[row, length - part.shape[1] :] = part[0]
    return x, mask, tokens


@every_case
def test_left_padded_rows_equal_unpadded_ones(name):
    layer = make_layer(name)
    x, mask, tokens = left_padded([11, 4, 1, 11], 11)
    y = layer(x, None, Sequence.build(11, attention_mask=mask))
    for row, part in enumerate(tokens):
        assert_close(y[row, -part.shape[1] :], layer(part, None, PLAIN)[0])


@every_mixer
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("split", [(11,), (4, 7), (1, 1, 5, 4)], ids=str)
def test_left_padded_rows_equal_unpadded_ones_through_a_state(name, split, grad):
    # the first chunk of rows 1 and 2 is all padding
    layer = make_layer(name)
    x, mask, tokens = left_padded([11, 4, 1, 9], 11)
    with torch.set_grad_enabled(grad):
        state, after = layer.init_state(4, 13), randn(4, 2, D_MODEL)
        chunks = zip(x.split(split, 1), mask.split(split, 1), strict=True)
        y = [layer(c, state, Sequence.build(c.shape[1], attention_mask=m)) for c, m in chunks]
        y = torch.cat([*y, *(layer(step, state, PLAIN) for step in after.split(1, 1))], 1)
        for row, part in enumerate(tokens):
            one = layer.init_state(1, 13)
            expected = layer(torch.cat([part, after[row : row + 1]], 1), one, PLAIN)
            assert_close(y[row, -expected.shape[1] :], expected[0])
            assert_states_equal(rows(state, row), one, **TOLERANCE)


@every_mixer
def test_padding_gets_no_gradient(name):
    layer = make_layer(name)
    x, mask, _ = left_padded([11, 4, 1, 11], 11)
    x.requires_grad_()
    y = layer(x, None, Sequence.build(11, attention_mask=mask))
    y[mask].square().sum().backward()
    assert not x.grad[~mask].any()
    assert x.grad[mask].any(-1).all()


@every_mixer
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("length", [1, 3])
def test_slots_of_a_pool_equal_plain_rows(name, grad, length):
    layer = make_layer(name)
    past, x = randn(6, 7, D_MODEL), randn(4, length, D_MODEL, seed=1)
    slots = torch.tensor([4, -1, 0, -3])
    with torch.set_grad_enabled(grad):
        pool = layer.init_state(6, 16)
        layer(past, pool, PLAIN)
        before, plain = pool.map(torch.clone), rows(pool, 4, 0)
        y = layer(x, pool, Sequence.build(length, slots=slots))
        assert_close(y[[0, 2]], layer(x[[0, 2]], plain, PLAIN))
    assert_states_equal(rows(pool, 4, 0), plain, **TOLERANCE)
    for key, tensor in pool.tensors.items():
        assert torch.equal(tensor[[1, 2, 3, 5]], before.tensors[key][[1, 2, 3, 5]])


@every_mixer
@torch.no_grad()
def test_slots_that_are_all_negative_change_nothing(name):
    layer = make_layer(name)
    pool = layer.init_state(3, 16)
    layer(randn(3, 7, D_MODEL), pool, PLAIN)
    before = pool.map(torch.clone)
    layer(randn(2, 1, D_MODEL), pool, Sequence.build(1, slots=torch.tensor([-1, -2])))
    for key, tensor in pool.tensors.items():
        assert torch.equal(tensor, before.tensors[key])


@every_mixer
@torch.no_grad()
def test_a_dropped_row_never_overflows(name):
    # row 0, which a negative slot reads, is full
    layer = make_layer(name)
    pool = layer.init_state(2, 7)
    layer(randn(1, 7, D_MODEL), pool, Sequence.build(7, slots=torch.tensor([0])))
    before = pool.map(torch.clone)
    slots = torch.tensor([-1, 1], dtype=torch.int32)
    y = layer(randn(2, 5, D_MODEL), pool, Sequence.build(5, slots=slots))
    assert_close(y[1:], layer(randn(2, 5, D_MODEL)[1:], None, PLAIN))
    assert_states_equal(rows(pool, 0), rows(before, 0), rtol=0, atol=0)


@every_mixer
def test_gradients_flow_once_through_slots(name):
    layer = make_layer(name)

    def gradient(slots, n_rows):
        x, pool = randn(2, 5, D_MODEL).requires_grad_(), layer.init_state(n_rows, 16)
        layer(x, pool, Sequence.build(5, slots=slots))
        sum(t.square().sum() for t in pool.tensors.values()).backward()
        return x.grad

    expected = gradient(None, 2)
    assert_close(gradient(torch.tensor([3, 1]), 4), expected)
    only_first = gradient(torch.tensor([3, -2]), 4)
    assert_close(only_first[0], expected[0])
    assert not only_first[1].any()


@every_mixer
def test_a_pack_reads_and_writes_its_slots(name):
    layer, slots = make_layer(name), torch.tensor([5, 1, 6, 0, 2])
    past, x = randn(7, 3, D_MODEL), randn(1, sum(LENGTHS), D_MODEL, seed=1)
    pool = layer.init_state(7, 16)
    layer(past, pool, PLAIN)
    plain, ctx = rows(pool, *slots.tolist()), packed(LENGTHS)
    expected = layer(x, plain, ctx)
    with_slots = Sequence.build(x.shape[1], cu_seqlens=ctx.cu_seqlens, max_seqlen=9, slots=slots)
    assert_close(layer(x, pool, with_slots), expected)
    assert_states_equal(rows(pool, *slots.tolist()), plain, **TOLERANCE)


@every_case
def test_every_parameter_has_a_gradient(name):
    layer, aux = make_layer(name), []
    y = layer(randn(2, LENGTH, D_MODEL), None, Sequence(aux=aux))
    (y.square().sum() + sum(aux)).backward()
    for parameter, declared in layer.table.items():
        tensor = layer.get_parameter(parameter)
        assert tensor.requires_grad == declared.trained
        assert (tensor.grad is not None and bool(tensor.grad.any())) == declared.trained, parameter


@every_case
def test_the_table_is_what_the_module_holds(name):
    layer = CASES[name].build(D_MODEL, dtype=torch.bfloat16)
    held = {k: (tuple(p.shape), p.dtype) for k, p in layer.named_parameters()}
    declared = {
        k: (p.shape, torch.float32 if p.fp32 else torch.bfloat16)
        for k, p in CASES[name].params(D_MODEL).items()
    }
    assert held == declared
    assert not list(layer.buffers())


@every_case
def test_all_but_biases_norms_and_scans_tables_decay(name):
    for key, p in CASES[name].params(D_MODEL).items():
        assert p.decay != key.endswith(("bias", "norm.weight", "A_log", "D")), key


@every_case
def test_step_sizes_and_decays_stay_fp32_in_a_half_model(name):
    layer = CASES[name].build(D_MODEL, dtype=torch.bfloat16)
    wide = {k for k, p in layer.named_parameters() if p.dtype == torch.float32}
    assert wide == {"dt_bias", "A_log", "D", "correction_bias"} & set(layer.table)
    for spec_name, tensor in layer.init_state(2, 8).tensors.items():
        fp32 = {"ssm_state": torch.float32, "position": torch.int32}
        assert tensor.dtype == fp32.get(spec_name, torch.bfloat16)
    x = randn(2, 5, D_MODEL).to(torch.bfloat16)
    layer.init_weights(0, "", 2)
    assert layer(x, layer.init_state(2, 8), PLAIN).dtype == torch.bfloat16


@every_case
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_join_undoes_shard_to_the_bit(name, tp):
    for parameter, declared in CASES[name].params(D_MODEL).items():
        full = randn(*declared.shape)
        units = {p.units for p in getattr(declared.cut, "parts", ())}
        if all(p.is_legal(tp) for p in getattr(declared.cut, "parts", ())):
            shards = [declared.cut.shard(parameter, full, tp, rank) for rank in range(tp)]
            shapes = declared.cut.local_shapes(parameter, full.shape, tp, 0)
            assert all({k: tuple(t.shape) for k, t in s.items()} == shapes for s in shards)
            assert torch.equal(declared.cut.join(parameter, shards), full)
        else:
            assert tp == 4 and any(u % 4 for u in units)


class Doubled(nn.Module):
    def __init__(self, wrapped):
        super().__init__()
        self.wrapped = wrapped

    def forward(self, x):
        return 2 * self.wrapped(x)


class LowRank(nn.Module):
    """y + B A x, as an adapter adds it."""

    def __init__(self, wrapped):
        super().__init__()
        self.wrapped = wrapped
        self.A = nn.Parameter(randn(2, wrapped.in_features))
        self.B = nn.Parameter(randn(wrapped.out_features, 2))

    def forward(self, x):
        return self.wrapped(x) + x @ self.A.T @ self.B.T


def linears(layer):
    return [k for k, m in layer.named_children() if isinstance(m, nn.Linear)]


@every_case
def test_a_wrapped_projection_is_honoured(name):
    x, names = randn(2, 7, D_MODEL), linears(make_layer(name))
    assert names or name.startswith("moe")
    for child in names:
        doubled, expected = make_layer(name), make_layer(name)
        setattr(doubled, child, Doubled(getattr(doubled, child)))
        for parameter in getattr(expected, child).parameters():
            parameter.data *= 2
        assert_close(doubled(x, None, PLAIN), expected(x, None, PLAIN))

        adapted, expected = make_layer(name), make_layer(name)
        adapter = LowRank(getattr(adapted, child))
        setattr(adapted, child, adapter)
        getattr(expected, child).weight.data += adapter.B.data @ adapter.A.data
        assert_close(adapted(x, None, PLAIN), expected(x, None, PLAIN))


@every_mixer
def test_a_wrapped_projection_leaves_the_states_as_they_are(name):
    wrapped, plain = make_layer(name).to(torch.bfloat16), make_layer(name).to(torch.bfloat16)
    for child in linears(wrapped):
        setattr(wrapped, child, Doubled(getattr(wrapped, child)))
    got, expected = wrapped.init_state(2, 5).tensors, plain.init_state(2, 5).tensors
    assert {k: (t.shape, t.dtype) for k, t in got.items()} == {
        k: (t.shape, t.dtype) for k, t in expected.items()
    }


@pytest.mark.parametrize("name", ["mamba1", "mamba2"])
def test_decays_are_fp32_in_a_model_made_narrow(name, monkeypatch):
    seen = {}
    op = "selective_scan" if name == "mamba1" else "ssd"
    module = importlib.import_module(f"hybridzoo.layers.{name}")
    run = getattr(module, op)
    monkeypatch.setattr(
        module, op, lambda x, dt, A, *a, **k: seen.update(A=A) or run(x, dt, A, *a, **k)
    )
    layer = make_layer(name).to(torch.bfloat16)
    layer(randn(1, 3, D_MODEL).bfloat16(), None, PLAIN)
    # of the rounded logarithm, but not rounded again
    assert torch.equal(seen["A"], -layer.A_log.float().exp())


@every_case
def test_parameters_replaced_by_function_are_honoured(name):
    layer, x = make_layer(name), randn(2, 7, D_MODEL)
    others = {k: w * 1.5 for k, w in full_weights(CASES[name]).items()}
    expected = make_layer(name)
    expected.load_state_dict(others)
    got = torch.func.functional_call(layer, others, (x, None, PLAIN))
    assert_close(got, expected(x, None, PLAIN))


@every_case
def test_config_round_trips(name):
    config = CASES[name]
    written = config.to_dict()
    assert written.pop("kind") == name.partition("-")[0]
    assert kind_config("test", config.kind).from_dict("test", written) == config
    assert LayerConfig.__annotations__.keys() - {"kind"} <= set(config.__dataclass_fields__)


@every_mixer
def test_a_layer_survives_a_deep_copy(name):
    layer, x = make_layer(name), randn(2, 7, D_MODEL)
    assert torch.equal(copy.deepcopy(layer)(x, None, PLAIN), layer(x, None, PLAIN))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_rows_of_different_lengths_share_one_captured_step(name):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here: a CUDA graph cannot be captured")
    # bf16 and widths of 8, which grouped_mm takes without asking the host for the groups' sizes
    config = CASES[name]
    if config.kind == "moe":
        groups = {"n_experts": 4, "top_k": 2, "n_expert_groups": 1, "top_k_groups": 1}
        config = replace(config, d_ff=16, d_latent=config.d_latent and 24, **groups)
    layer = config.build(D_MODEL, device="cuda", dtype=torch.bfloat16)
    layer.init_weights(0, "", 1)
    past = randn(2, 9, D_MODEL).to("cuda", torch.bfloat16)
    steps = randn(2, 5, D_MODEL, seed=1).to("cuda", torch.bfloat16)
    mask = torch.arange(9, device="cuda") >= torch.tensor([[0], [5]], device="cuda")
    with torch.no_grad():
        state = layer.init_state(2, 16)
        layer(past, state, Sequence.build(9, attention_mask=mask))
        eager = state.map(torch.clone)
        x, saved = steps[:, :1].clone(), state.map(torch.clone)
        stream = torch.cuda.Stream()
        # else the warm-up moves the state on before `saved` has it
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            layer(x, state, PLAIN)  # warm up: libraries allocate their workspaces
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x, state, PLAIN)
        for key, tensor in state.tensors.items():
            tensor.copy_(saved.tensors[key])
        for step in steps.split(1, 1):
            x.copy_(step)
            graph.replay()
            # the same kernels in the same order: equal to the bit; a copy of x, for a linear map of
            # a strided x adds its bias in another kernel
            assert torch.equal(y, layer(x.clone(), eager, PLAIN))
    assert_states_equal(state, eager, rtol=0, atol=0)


def test_states_are_named_tensors_of_fixed_shape():
    state = State({"a": torch.zeros(3, 2)})
    with torch.no_grad():
        state.set("a", torch.ones(1, 2), Sequence(slots=torch.tensor([1])))
    assert state.get("a", PLAIN).tolist() == [[0, 0], [1, 1], [0, 0]]
    assert state.get("a", Sequence(slots=torch.tensor([1, 1]))).tolist() == [[1, 1], [1, 1]]


def test_experts_follow_autocast():
    layer, x = make_layer("moe"), randn(2, 7, D_MODEL)
    layer, x = layer.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, None, PLAIN)
    assert y.dtype == torch.bfloat16
    # bf16 keeps 8 bits; the products of a few dozen terms lose one or two more
    torch.testing.assert_close(y.float(), layer(x, None, PLAIN), rtol=3e-2, atol=3e-2)
