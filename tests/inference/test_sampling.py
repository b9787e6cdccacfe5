"""sampling: each filter against a definition in plain Python, and draws against probabilities."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hybridzoo.errors import ConfigError
from hybridzoo.inference.sampling import (
    apply_repetition_penalty,
    apply_temperature,
    check_sampling,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    sample,
)

INF = math.inf
SHAPES = [(1, 1), (3, 7), (2, 61)]


def make_logits(b, v, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # quarters make ties frequent; the last column of the first row is filtered out already
    logits = (torch.randn(b, v, generator=generator) * 8).round() / 4
    if v > 1:
        logits[0, -1] = -INF
    return logits


def best_first(row):
    """Ids of a list of logits, best first, of equals the lowest first."""
    return sorted(range(len(row)), key=lambda i: (-row[i], i))


def probabilities(row):
    peak = max(row)
    weights = [math.exp(x - peak) for x in row]
    return [w / sum(weights) for w in weights]


def only(row, kept):
    return [x if i in kept else -INF for i, x in enumerate(row)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("top_k", [1, 2, 5, 1000])
def test_top_k_keeps_the_first_of_the_sorted_list(shape, top_k):
    logits = make_logits(*shape)
    expected = [only(row, set(best_first(row)[:top_k])) for row in logits.tolist()]
    assert keep_top_k(logits, top_k).tolist() == expected


def test_top_k_keeps_exactly_k_of_equal_logits():
    assert keep_top_k(torch.zeros(1, 5), 2).tolist() == [[0.0, 0.0, -INF, -INF, -INF]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.71, 0.999, 1.0])
def test_top_p_keeps_the_smallest_set_with_the_mass(shape, top_p):
    logits = make_logits(*shape)
    expected = []
    for row in logits.tolist():
        p, kept, mass = probabilities(row), set(), 0.0
        for i in best_first(row):
            if mass >= top_p:
                break
            kept.add(i)
            mass += p[i]
        expected.append(only(row, kept))
    assert keep_top_p(logits, top_p).tolist() == expected


def test_top_p_stops_where_the_mass_is_reached_exactly():
    # four quarters, exact in binary
    logits = torch.zeros(1, 4)
    assert keep_top_p(logits, 0.5).isfinite().tolist() == [[True, True, False, False]]
    assert keep_top_p(logits, 0.51).isfinite().tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("min_p", [0.0, 0.1, 0.5, 1.0])
def test_min_p_keeps_shares_of_the_best(shape, min_p):
    logits = make_logits(*shape)
    expected = []
    for row in logits.tolist():
        p = probabilities(row)
        expected.append(only(row, {i for i, q in enumerate(p) if q >= min_p * max(p)}))
    assert keep_min_p(logits, min_p).tolist() == expected


@pytest.mark.parametrize("penalty", [1.3, 0.5])
def test_penalty_divides_positive_and_multiplies_negative_once(penalty):
    logits = make_logits(2, 7)
    previous = torch.tensor([[0, 0, 3, -1], [-1, -1, -1, 6]])
    expected = logits.clone()
    for row, seen in enumerate([{0, 3}, {6}]):
        for i in seen:
            x = logits[row, i]
            expected[row, i] = x / penalty if x > 0 else x * penalty
    got = apply_repetition_penalty(logits, previous, penalty)
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("temperature", [1e-36, 0.5, 1.0, 1e30])
def test_temperature_divides_and_never_overflows(temperature):
    logits = torch.tensor([[3e4, 3e4 - 1, -INF]])
    got = apply_temperature(logits, temperature).softmax(-1)
    ratio = math.exp(max(-1 / temperature, -700))
    expected = torch.tensor([[1.0, ratio, 0.0]]) / (1 + ratio)
    # fp32 softmax of two terms: a few ulp
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-30)


def test_temperature_0_is_argmax_and_the_lowest_of_equals():
    logits = torch.tensor([[1.0, 5.0, 5.0], [2.0, 2.0, 2.0]])
    state = torch.Generator().manual_seed(3)
    before = state.get_state()
    assert sample(logits, temperature=0, top_k=2, generator=state).tolist() == [1, 0]
    assert torch.equal(state.get_state(), before)


def test_greedy_sees_the_penalty():
    logits = torch.tensor([[4.0, 3.0]])
    got = sample(logits, temperature=0, repetition_penalty=2.0, previous=torch.tensor([[0, -1]]))
    assert got.tolist() == [1]


def chi_square(ids, p):
    counts = torch.bincount(ids, minlength=len(p)).double()
    expected = p.double() * len(ids)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    return float(((counts - expected)[kept] ** 2 / expected[kept]).sum()), int(kept.sum()) - 1


# the 0.999 quantile of chi-square is below dof + 3.1 sqrt(2 dof) + 7.3; the seed is fixed
def assert_drawn_from(ids, p):
    statistic, dof = chi_square(ids, p)
    assert statistic < dof + 3.1 * math.sqrt(2 * dof) + 7.3


def test_frequencies_are_the_softmax():
    logits = make_logits(1, 23, seed=5).clamp(min=-2)
    ids = draw(logits.expand(200_000, -1), torch.Generator().manual_seed(0))
    assert_drawn_from(ids, logits[0].softmax(-1))


def test_frequencies_follow_all_filters_in_their_order():
    logits = torch.tensor([[2.0, 1.8, 1.0, 0.5, 0.0, -1.0]])
    # penalty: 2 -> 1, then halved temperature: 2 3.6 2 1 0 -2; top_k 4: ids 1 0 2 3;
    # their shares .684 .138 .138 .051: top_p .9 keeps 1 0 2; min_p .1 keeps all three
    options = {"temperature": 0.5, "top_k": 4, "top_p": 0.9, "min_p": 0.1}
    p = torch.tensor([2.0, 3.6, 2.0, -INF, -INF, -INF]).softmax(-1)
    ids = sample(
        logits.expand(100_000, -1),
        repetition_penalty=2.0,
        previous=torch.tensor([[0]]).expand(100_000, -1),
        generator=torch.Generator().manual_seed(1),
        **options,
    )
    assert_drawn_from(ids, p)


def test_one_seed_gives_one_sequence_and_another_another():
    logits = make_logits(4, 61)
    runs = []
    for seed in (7, 7, 8):
        generator = torch.Generator().manual_seed(seed)
        runs.append([sample(logits, generator=generator).tolist() for _ in range(5)])
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][0] != runs[0][1]


def test_a_row_does_not_depend_on_the_other_rows():
    logits, others = make_logits(3, 61), make_logits(3, 61, seed=9)
    others[1] = logits[1]
    draws = [
        sample(x, top_p=0.9, generator=torch.Generator().manual_seed(2)) for x in (logits, others)
    ]
    assert draws[0][1] == draws[1][1]
    assert draws[0].dtype == torch.int64 and draws[0].shape == (3,)


def test_equal_rows_are_drawn_apart():
    ids = sample(torch.zeros(64, 50), generator=torch.Generator().manual_seed(0))
    assert len(set(ids.tolist())) > 20


def test_half_precision_logits_are_computed_in_fp32():
    logits = make_logits(2, 61).bfloat16()
    ids = [
        sample(x, top_p=0.8, temperature=0.7, generator=torch.Generator().manual_seed(4))
        for x in (logits, logits.float())
    ]
    assert torch.equal(*ids)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_sampling_never_reads_a_value_on_the_host(temperature):
    # a fake tensor has no values: .item(), a mask index or an `if` on a tensor would raise
    with FakeTensorMode():
        logits = torch.empty(3, 61)
        ids = sample(
            logits,
            temperature=temperature,
            top_k=5,
            top_p=0.9,
            min_p=0.05,
            repetition_penalty=1.2,
            previous=torch.empty(3, 4, dtype=torch.int64),
        )
    assert ids.shape == (3,)


@pytest.mark.gpu
def test_cuda_draws_from_the_same_distribution():
    logits = make_logits(1, 23, seed=5).clamp(min=-2)
    ids = draw(logits.cuda().expand(200_000, -1), torch.Generator("cuda").manual_seed(0))
    assert_drawn_from(ids.cpu(), logits[0].softmax(-1))


@pytest.mark.gpu
def test_cuda_filters_equal_the_cpu_ones_and_a_seed_repeats():
    logits = make_logits(2, 61)
    for keep, value in ((keep_top_k, 5), (keep_top_p, 0.7), (keep_min_p, 0.1)):
        assert keep(logits.cuda(), value).tolist() == keep(logits, value).tolist()
    runs = [
        sample(logits.cuda(), generator=torch.Generator("cuda").manual_seed(7)) for _ in range(2)
    ]
    assert torch.equal(*runs)


@pytest.mark.parametrize(
    "option, value",
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", INF),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
    ],
)
def test_options_out_of_range_are_refused_by_name(option, value):
    with pytest.raises(ConfigError, match=rf"^sampling: {option} cannot be {value}; it is .*\.$"):
        check_sampling(**{option: value})
    with pytest.raises(ConfigError, match=option):
        sample(torch.zeros(1, 3), **{option: value})


def test_the_edges_of_the_ranges_are_legal():
    check_sampling(temperature=0, top_k=1, top_p=1.0, min_p=0.0, repetition_penalty=0.1)
    check_sampling(min_p=1.0)


def test_penalty_without_previous_is_refused():
    with pytest.raises(
        ConfigError, match=r"repetition_penalty \(1.2\) has no ids to read; .*`previous`"
    ):
        sample(torch.zeros(1, 3), repetition_penalty=1.2)
