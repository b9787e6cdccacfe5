"""Cache: rows that are copied, selected and counted go on as if they had been computed anew."""

import pytest
import torch
from torch.testing import assert_close

from hybridzoo import HybridConfig, HybridLM
from hybridzoo.errors import ConfigError
from hybridzoo.inference.cache import Cache

PATTERN = "MA E N[MA]"
# float64 throughout: a row's place in the batch may change the order of a sum, no more
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(scope="module")
def model():
    config = HybridConfig(
        d_model=16,
        vocab_size=41,
        pattern=PATTERN,
        layers={
            "M": {"kind": "mamba1", "d_state": 4},
            "N": {"kind": "mamba2", "d_state": 4, "head_dim": 8},
            "A": {"kind": "attention", "n_heads": 2, "rope_fraction": 1.0},
            "E": {"kind": "moe", "d_ff": 16, "n_experts": 3, "top_k": 2},
        },
        tie_embeddings=False,
    )
    return HybridLM(config, dtype=torch.float64).eval()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def ids_of(b, l, seed):
    return torch.randint(41, (b, l), generator=torch.Generator().manual_seed(seed))


def after(model, prompt, max_len=32):
    cache = Cache.alloc(model, len(prompt), max_len)
    model(prompt, state=cache.states)
    return cache


def tensors(cache):
    return [t for block in cache.states for state in block for t in state.tensors.values()]


def test_forked_rows_go_on_by_themselves(model):
    prompt, more = ids_of(2, 7, seed=1), ids_of(6, 5, seed=2)
    cache = after(model, prompt)
    forked = cache.fork(3)
    assert forked.batch == 6
    got = model(more, state=forked.states)
    whole = torch.cat([prompt.repeat_interleave(3, 0), more], 1)
    assert_close(got, model(whole)[:, 7:], **TOLERANCE)


def test_what_a_fork_does_does_not_reach_its_source(model):
    prompt, more = ids_of(2, 7, seed=1), ids_of(2, 5, seed=3)
    cache = after(model, prompt)
    model(ids_of(2, 6, seed=4), state=cache.fork(1).states)
    got = model(more, state=cache.states)
    assert_close(got, model(torch.cat([prompt, more], 1))[:, 7:], **TOLERANCE)


@pytest.mark.parametrize("index", [[2, 0, 0], [1, 2, 0], [2, 2, 2]], ids=str)
def test_reordered_rows_go_on_as_recomputed(model, index):
    prompt, more = ids_of(3, 7, seed=5), ids_of(3, 4, seed=6)
    cache = after(model, prompt)
    cache.reorder(index)
    got = model(more, state=cache.states)
    assert_close(got, model(torch.cat([prompt[index], more], 1))[:, 7:], **TOLERANCE)


def test_reorder_writes_into_the_same_tensors(model):
    cache = after(model, ids_of(3, 7, seed=5))
    before = tensors(cache)
    kept = [t.clone() for t in before]
    cache.reorder(torch.tensor([1, 1, 0]))
    assert all(new is old for new, old in zip(tensors(cache), before, strict=True))
    for new, old in zip(tensors(cache), kept, strict=True):
        assert_close(new, old[[1, 1, 0]], rtol=0, atol=0)


def test_rows_are_copies_in_the_order_asked_for(model):
    prompt, more = ids_of(3, 7, seed=5), ids_of(2, 4, seed=6)
    cache = after(model, prompt)
    picked = cache.rows([2, 0])
    assert picked.batch == 2
    model(ids_of(3, 2, seed=7), state=cache.states)
    got = model(more, state=picked.states)
    assert_close(got, model(torch.cat([prompt[[2, 0]], more], 1))[:, 7:], **TOLERANCE)


def test_bytes_are_those_of_the_config(model):
    # attention keeps one place more a row than max_len, for what padding writes
    n_attention = sum(b.config.kind == "attention" for p in model.config.places for b in p)
    one_place = 2 * 16 * 8 * 3 * n_attention
    expected = model.config.state_bytes(32, batch=3, dtype=torch.float64) + one_place
    assert Cache.alloc(model, 3, 32).bytes() == expected


def test_cache_refuses_what_cannot_be(model):
    with pytest.raises(ConfigError, match=r"batch \(0\) or max_len \(4\) is below 1"):
        Cache.alloc(model, 0, 4)
    cache = Cache.alloc(model, 3, 4)
    with pytest.raises(ConfigError, match=r"shape \(2,\); it names one row for each of 3"):
        cache.reorder([0, 1])
    with pytest.raises(ConfigError, match="fork makes 0 copies"):
        cache.fork(0)
