"""Where the stack is cut into pipeline stages."""

import itertools
import random

import pytest

from hybridzoo.config import HybridConfig
from hybridzoo.errors import ConfigError
from hybridzoo.parallel.stages import _balanced, balance_line, stages
from tests.models import make_config

MLP = {"kind": "mlp", "d_ff": 32, "gated": False}
ATTENTION = {"kind": "attention", "n_heads": 2, "n_kv_heads": 2, "head_dim": 8}


def stack(pattern, **change):
    layers = {"F": MLP, "A": ATTENTION}
    options = {"d_model": 16, "vocab_size": 8, "pattern": pattern, "layers": layers}
    return HybridConfig.from_dict(options | change)


def test_pattern_cuts_are_the_stages():
    assert stages(stack("2F | 3F A | F"), 3, "pattern") == [range(2), range(2, 6), range(6, 7)]


def test_one_stage_holds_all_whatever_the_cuts():
    assert stages(stack("2F | F"), 1, "pattern") == stages(stack("3F"), 1, "auto") == [range(3)]


@pytest.mark.parametrize("pattern", ["6F", "2F | 2F | 2F"])
def test_other_counts_of_segments_are_refused_with_the_way_out(pattern):
    with pytest.raises(ConfigError) as caught:
        stages(stack(pattern), 2, "pattern")
    n = pattern.count("|") + 1
    assert f"{n} segments for pp=2" in str(caught.value)
    assert "balance: auto" in str(caught.value)


def test_more_stages_than_places_are_refused():
    with pytest.raises(ConfigError, match="pp: 4 stages for 3 places"):
        stages(stack("3F"), 4, "auto")


def test_the_head_counts_for_the_last_stage():
    # an mlp costs 2 * 2 * 16 * 32 a token, the head of 128 words as much as two of them
    assert stages(stack("6F", vocab_size=128), 2, "auto") == [range(4), range(4, 6)]


def test_longer_sequences_weigh_attention():
    config = stack("AA 8F")
    short, long = (stages(config, 2, "auto", seq_len=l)[0].stop for l in (0, 4096))
    assert short > long == 1


def test_auto_finds_the_least_largest_stage():
    draw = random.Random(0)
    for _ in range(50):
        n = draw.randint(1, 9)
        costs = [draw.choice([1, 2, 3, 7, 20]) for _ in range(n)]
        for pp in range(1, n + 1):
            largest = min(
                max(map(sum, split(costs, cuts)))
                for cuts in itertools.combinations(range(1, n), pp - 1)
            )
            cuts = _balanced(costs, pp)
            assert len(cuts) == pp - 1
            assert max(map(sum, split(costs, cuts))) == largest
            assert all(split(costs, cuts))


def test_of_equal_cuts_the_even_one_is_taken():
    assert _balanced([1, 1, 1, 1, 1, 1, 9], 3) == (3, 6)


def test_the_line_says_shares_and_a_pattern_that_pins_the_cut():
    config = make_config()
    parts = stages(config, 3, "auto", seq_len=64)
    line = balance_line(config, parts, seq_len=64)
    assert line.startswith(f"stage 0: places 0-{parts[0].stop - 1}, ")
    pinned = make_config(pattern=line.split("pattern: ")[1])
    assert pinned.places == config.places
    assert stages(pinned, 3, "pattern") == parts
    shares = [int(word) for word, unit in itertools.pairwise(line.split()) if unit.startswith("%")]
    # each is rounded
    assert abs(sum(shares) - 100) <= 1


def split(costs, cuts):
    return [costs[a:b] for a, b in itertools.pairwise((0, *cuts, len(costs)))]
