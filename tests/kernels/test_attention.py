"""attention: every backend, in every mode, against one softmax a query."""

import itertools

import pytest
import torch

from hybridzoo.errors import BackendError
from hybridzoo.kernels.attention import attention, flash_attn
from tests.kernels.compare import (
    Call,
    assert_same,
    check_backend,
    pack,
    randn,
    run_fwd_bwd,
)

# name: batch, queries, keys, options
MODES = {
    "plain": (2, 17, 17, {}),
    "one-row": (1, 1, 1, {}),
    "continued": (2, 3, 17, {}),
    "one-step": (2, 1, 17, {}),
    "more-queries": (2, 9, 5, {}),
    "window": (2, 17, 17, {"window_size": 4}),
    "window-of-one": (2, 5, 5, {"window_size": 1}),
    "window-continued": (2, 3, 17, {"window_size": 4}),
    "left-padded": (3, 9, 9, {"k_start": [0, 4, 8]}),
    "left-padded-window": (3, 9, 9, {"k_start": [0, 4, 8], "window_size": 3}),
    "cache": (2, 3, 12, {"q_positions": [[4, 5, 6], [9, 10, 11]]}),
    "cache-with-pads": (2, 3, 12, {"q_positions": [[-1, -1, 0], [-1, 3, 4]]}),
    "cache-window": (2, 3, 12, {"q_positions": [[-1, 1, 2], [9, 10, 11]], "window_size": 3}),
    "packed": (1, 17, 17, {"cu_seqlens": [0, 5, 0, 1, 11], "max_seqlen": 11}),
    "packed-window": (1, 17, 17, {"cu_seqlens": [6, 11], "max_seqlen": 11, "window_size": 3}),
}


def attention_inputs(mode, dtype=torch.float64, device="cpu", heads=(4, 2), head_dim=8):
    b, l, m, options = MODES[mode]
    options = dict(options)
    for name in ("k_start", "q_positions"):
        if name in options:
            options[name] = torch.tensor(options[name], dtype=torch.int32, device=device)
    if "cu_seqlens" in options:
        options["cu_seqlens"] = pack(options["cu_seqlens"], device)
    return Call(
        {
            "q": randn(b, l, heads[0], head_dim, seed=0, dtype=dtype, device=device),
            "k": randn(b, m, heads[1], head_dim, seed=1, dtype=dtype, device=device),
            "v": randn(b, m, heads[1], head_dim, seed=2, dtype=dtype, device=device),
            **options,
        }
    )


def naive(
    q, k, v, scale=None, window_size=None, q_positions=None, k_start=None, cu_seqlens=None,
    max_seqlen=None,
):  # fmt: skip
    """One query of one head at a time, over the keys that it sees."""
    o = []
    for b, t, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        place = t + k.shape[1] - q.shape[1] if q_positions is None else q_positions[b, t].item()
        first = 0 if k_start is None else k_start[b].item()
        if cu_seqlens is not None:
            first = max(start for start in cu_seqlens.tolist() if start <= t)
        if window_size is not None:
            first = max(first, place - window_size + 1)
        keys = slice(max(first, 0), max(place + 1, first, 0))
        key_head = h // (q.shape[2] // k.shape[2])
        scores = k[b, keys, key_head] @ q[b, t, h] * (scale or q.shape[3] ** -0.5)
        # no key: an empty sum, 0
        o.append(scores.softmax(0) @ v[b, keys, key_head])
    return torch.stack(o).view(q.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", attention.op.backends)
def test_backend_is_the_softmax(backend, mode, dtype, device):
    call = attention_inputs(mode, dtype, device)
    check_backend(attention, naive, backend, call, dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_backend_is_exact_in_float64(backend, mode):
    call = attention_inputs(mode)
    assert_same(run_fwd_bwd(attention, call, backend), run_fwd_bwd(naive, call))


@pytest.mark.parametrize("mode", ["plain", "cache", "packed"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_heads_share_keys_in_order(backend, heads, mode):
    call = attention_inputs(mode, heads=heads)
    assert_same(run_fwd_bwd(attention, call, backend), run_fwd_bwd(naive, call))


@pytest.mark.parametrize("mode", ["plain", "window"])
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_scale_is_honoured(backend, mode):
    call = attention_inputs(mode).having(scale=0.7)
    assert_same(run_fwd_bwd(attention, call, backend), run_fwd_bwd(naive, call))


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_blind_queries_give_zero_and_take_no_gradient(backend):
    call = attention_inputs("cache-with-pads")
    found = run_fwd_bwd(attention, call, backend)
    is_pad = call.arguments["q_positions"] < 0
    assert not found["out0"][is_pad].any()
    assert not found["dq"][is_pad].any()
    assert all(t.isfinite().all() for t in found.values())


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_packed_is_separate(backend):
    call = attention_inputs("packed")
    whole = run_fwd_bwd(attention, call, backend)["out0"]
    q, k, v = call.leaves().values()
    ends = call.arguments["cu_seqlens"].tolist()
    parts = [attention(q[:, s:e], k[:, s:e], v[:, s:e]) for s, e in itertools.pairwise(ends)]
    torch.testing.assert_close(whole, torch.cat(parts, 1), rtol=1e-11, atol=1e-11)


def test_pack_with_cache_positions_is_refused():
    call = attention_inputs("packed").having(k_start=torch.zeros(1, dtype=torch.int32))
    with pytest.raises(BackendError, match="cu_seqlens comes with q_positions or k_start"):
        attention(**call.arguments)


def test_window_of_nothing_is_refused():
    with pytest.raises(BackendError, match="window_size is 0; it must be at least 1"):
        attention(**attention_inputs("plain").having(window_size=0).arguments)


REFUSALS = {
    "cache": "q_positions",
    "left-padded": "k_start",
    "packed": "without max_seqlen",
    "plain": None,
    "window": None,
}


@pytest.mark.parametrize("mode", REFUSALS)
def test_flash_attn_refuses_what_it_lacks(mode, monkeypatch):
    monkeypatch.setattr(flash_attn, "available", lambda device: None)
    call = attention_inputs(mode, torch.bfloat16).having(max_seqlen=None)
    reason = flash_attn.why_not(**call.arguments)
    assert reason is None if REFUSALS[mode] is None else REFUSALS[mode] in reason


def test_flash_attn_refuses_dtypes_and_widths(monkeypatch):
    monkeypatch.setattr(flash_attn, "available", lambda device: None)
    call = attention_inputs("plain", torch.float32)
    assert "not torch.float32" in flash_attn.why_not(**call.arguments)
    for head_dim in (12, 264):
        call = attention_inputs("plain", torch.float16, head_dim=head_dim)
        assert f"head_dim ({head_dim})" in flash_attn.why_not(**call.arguments)


@pytest.mark.parametrize("version", ["2.2.5", "1.0.9"])
def test_old_flash_attn_is_a_reason(version, monkeypatch):
    monkeypatch.setattr(flash_attn, "VERSION", version)
    assert flash_attn.available(torch.device("cuda")) == f"flash-attn {version} is older than 2.3"


@pytest.mark.parametrize(
    "mode", ["plain", "continued", "window", "window-continued", "packed", "packed-window"]
)
def test_flash_attn_is_called_as_its_documentation_says(mode, monkeypatch):
    """Their two functions, written from their documentation, stand in for the package."""

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1)):
        assert causal
        t = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
        j = torch.arange(k.shape[1])
        seen = j <= t
        if window_size != (-1, -1):
            left, right = window_size
            seen = (j >= t - left) & (j <= t + right)
        n_rep = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(n_rep, 2).transpose(1, 2) for x in (k, v))
        scale = softmax_scale or q.shape[-1] ** -0.5
        scores = (q.transpose(1, 2) @ k.mT * scale).masked_fill(~seen, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2)

    def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, **options):
        assert (max_q, max_k) == (11, 11)
        ends = zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True)
        assert torch.equal(cu_q, cu_k)
        parts = [
            flash_attn_func(q[None, s:e], k[None, s:e], v[None, s:e], **options)[0] for s, e in ends
        ]
        return torch.cat(parts)

    monkeypatch.setattr(flash_attn, "flash_attn_func", flash_attn_func, raising=False)
    monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", flash_attn_varlen_func, raising=False)
    call = attention_inputs(mode)
    want = naive(**call.arguments)
    torch.testing.assert_close(flash_attn.run(**call.arguments), want, rtol=1e-11, atol=1e-11)
