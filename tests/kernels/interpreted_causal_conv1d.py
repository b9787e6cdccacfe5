"""causal_conv1d's Triton backend in the interpreter."""

import itertools
from functools import partial

import pytest
import torch

from hybridzoo.kernels.causal_conv1d import causal_conv1d, reference, triton, triton_bwd
from tests.kernels.compare import check_backend, run_fwd_bwd
from tests.kernels.interpreted import allow_cpu, check_gradient_graphs, check_graphs
from tests.kernels.oracles import naive_conv
from tests.kernels.test_causal_conv1d import LENGTHS, conv_inputs, pack

# b l i w: a row less than a chunk, one more, fewer rows than taps, none; 300: blocks; 75: three
# pieces of a backward
SHAPES = [(2, 7, 5, 4), (2, 9, 6, 3), (1, 2, 300, 4), (2, 0, 5, 2), (1, 21, 3, 2), (1, 75, 3, 4)]


allow_cpu(triton)


SLOW = ("gradients of packs", "repeats", "opcheck")


def check(shape, dtype, n_seqs=None, **changed):
    call = conv_inputs(shape, dtype, n_seqs=n_seqs).having(**changed)
    check_backend(causal_conv1d, naive_conv, "triton", call, dtype)


def check_views():
    """x and the state are columns of something wider; the pack starts where it is not aligned."""
    x, state = torch.randn(2, 11, 17), torch.randn(2, 3, 17)
    weight = torch.randn(6, 4)
    for cut in (slice(3, 9), slice(3, 15, 2)):
        views = {"x": x[..., cut], "initial_state": state[..., cut]}
        got = triton.run(weight=weight, **views)
        want = triton.run(weight=weight, **{k: t.contiguous() for k, t in views.items()})
        assert all(map(torch.equal, got, want))


def check_pieces():
    """A prompt cut anywhere is the prompt at once, to the bit."""
    arguments = conv_inputs((2, 23, 5, 4), torch.float32).arguments
    whole, last = triton.run(**arguments)
    x, state, y = arguments.pop("x"), arguments.pop("initial_state"), []
    for part in x.split([1, 2, 9, 11], 1):
        part, state = triton.run(part, initial_state=state, **arguments)
        y.append(part)
    assert torch.equal(torch.cat(y, 1), whole)
    assert torch.equal(state, last)


def check_pack_is_separate():
    """To the bit, whatever the neighbours hold."""
    call = conv_inputs((1, sum(LENGTHS), 5, 4), torch.float32, n_seqs=len(LENGTHS))
    x, state = call.arguments["x"], call.arguments["initial_state"]
    # the first token of the third sequence that has any
    x[0, 6] = torch.nan
    y, final = triton.run(**call.having(cu_seqlens=pack(LENGTHS)).arguments)
    for k, part in enumerate(x.split(LENGTHS, 1)):
        alone = call.having(x=part, initial_state=state[k : k + 1])
        want_y, want_final = triton.run(**alone.arguments)
        start = sum(LENGTHS[:k])
        torch.testing.assert_close(
            y[:, start : start + LENGTHS[k]], want_y, rtol=0, atol=0, equal_nan=True
        )
        torch.testing.assert_close(final[k : k + 1], want_final, rtol=0, atol=0, equal_nan=True)


def check_op():
    """Schema and fake of both ops, with and without their options; a formula they have not."""
    options = itertools.product([True, False], [None, pack([4, 0, 7])])
    for has_all, cu_seqlens in options:
        call = conv_inputs((1, 11, 5, 4), torch.float32, n_seqs=3 if cu_seqlens is not None else 1)
        x, weight, bias, _, state = call.arguments.values()
        bias, state = (bias, state) if has_all else (None, None)
        given = (x, weight, bias, state, cu_seqlens, has_all)
        torch.library.opcheck(torch.ops.hybridzoo.causal_conv1d_triton, given)
        dfinal = torch.ones(3 if cu_seqlens is not None else 1, 3, 5) if has_all else None
        torch.library.opcheck(
            torch.ops.hybridzoo.causal_conv1d_triton_backward, (x.flip(1), dfinal, *given)
        )


def check_gradient_views():
    """x, dy and the cotangent of the state are columns of something wider, or of stride 0."""
    wide, state, weight = torch.randn(4, 11, 17), torch.randn(2, 3, 17), torch.randn(6, 4)
    for cut in (slice(3, 9), slice(3, 15, 2)):
        given = (wide[:2, :, cut], state[..., cut], wide[2:, :, cut])
        given = (*given[::-1], weight, None, state[..., cut], None, True)
        copies = (None if t is None else t.contiguous() for t in given[:-1])
        got = triton_bwd.causal_conv1d_backward(*given)
        assert all(map(torch.equal, got, triton_bwd.causal_conv1d_backward(*copies, True)))
    x = wide[:2, :, :6].requires_grad_()
    (got,) = torch.autograd.grad(triton.run(x, weight)[0].sum(), x)
    (want,) = torch.autograd.grad(reference.run(x, weight)[0].sum(), x)
    torch.testing.assert_close(got, want)


def check_gradient_place():
    """dx goes into columns of something wider, and nowhere else."""
    call = conv_inputs((2, 11, 5, 4), torch.float32)
    x, weight, bias, _, state = call.arguments.values()
    given = (x.flip(1), state.flip(0), x, weight, bias, state, None, True)
    want, wide = triton_bwd.causal_conv1d_backward(*given), torch.zeros(2, 11, 16)
    got = triton_bwd.launch_backward(*given, dx=wide[..., 3:8])
    assert all(map(torch.equal, got, want)) and torch.equal(wide[..., 3:8], want[0])
    assert not wide[..., :3].any() and not wide[..., 8:].any()
    with pytest.raises(AssertionError, match="rows of dx lie apart"):
        triton_bwd.launch_backward(*given, dx=torch.zeros(2, 12, 5)[:, :11])


def check_gradient_pieces():
    """Cut in three, with the gradient through the states, is one pass; sums in another order."""
    call = conv_inputs((2, 75, 5, 4), torch.float32)

    def in_pieces(x, initial_state, **arguments):
        parts, state = [], initial_state
        for part in x.split([31, 2, 42], 1):
            y, state = triton.run(part, initial_state=state, **arguments)
            parts.append(y)
        return torch.cat(parts, 1), state

    got, want = run_fwd_bwd(in_pieces, call), run_fwd_bwd(triton.run, call)
    for name, truth in want.items():
        # up to 150 terms of size one, in fp32
        torch.testing.assert_close(got[name], truth, rtol=1e-5, atol=1e-5, msg=name)


def check_gradient_packs():
    """Sequences of a pack, longer than a piece or many, are what they are alone."""
    for lengths, hole in (([40, 0, 75, 33, 0, 2, 130], torch.nan), ([1, 3] * 70, 0.0)):
        call = conv_inputs((1, sum(lengths), 5, 4), torch.float32, n_seqs=len(lengths))
        x, state = call.arguments["x"], call.arguments["initial_state"]
        cu_seqlens, dy = pack(lengths), x.flip(1)
        dy[0, 40] = hole
        given = (call.arguments["weight"], call.arguments["bias"])
        got = triton_bwd.causal_conv1d_backward(
            dy, state.flip(0), x, *given, state, cu_seqlens, True
        )
        places = zip(x.split(lengths, 1), dy.split(lengths, 1), state.split(1), strict=True)
        dfinals = state.flip(0).split(1)
        alone = [
            triton_bwd.causal_conv1d_backward(dy, dfinal, x, *given, state, None, True)
            for (x, dy, state), dfinal in zip(places, dfinals, strict=True)
        ]
        same = partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)
        same(got[0], torch.cat([grads[0] for grads in alone], 1))
        same(got[3], torch.cat([grads[3] for grads in alone]))
        # more programs than are added up at once; sums of 280 terms of size one in another order
        for k in (1, 2):
            total = sum(grads[k] for grads in alone)
            torch.testing.assert_close(got[k], total, rtol=1e-5, atol=1e-4, equal_nan=True)


def check_long_walks():
    """As long as where there are many programs: a walker loads more than once."""
    most, triton_bwd.PIECES = triton_bwd.PIECES, 1
    for lengths in (None, [530, 0, 40]):
        rows = {} if lengths is None else {"n_seqs": 3, "cu_seqlens": pack(lengths)}
        check((1, 570, 3, 4), torch.float32, **rows)
    triton_bwd.PIECES = most


def check_second_derivatives():
    """They raise, whether or not the gradient that comes in has one of its own."""
    call = conv_inputs((1, 11, 5, 4), torch.float32).to(None)
    x, weight = call.arguments["x"], call.arguments["weight"]
    for needs in (False, True):
        y, _ = triton.run(**call.arguments)
        (dx,) = torch.autograd.grad(y, x, y.detach().requires_grad_(needs), create_graph=True)
        with pytest.raises(RuntimeError, match=r"causal_conv1d_triton_backward.* no autograd"):
            # a loss that is differentiable otherwise as well
            torch.autograd.grad(dx.sum() + weight.square().sum(), weight)


def check_repeats():
    call = conv_inputs((2, 75, 300, 4), torch.bfloat16)
    first = run_fwd_bwd(triton.run, call)
    for _ in range(2):
        assert all(torch.equal(first[k], t) for k, t in run_fwd_bwd(triton.run, call).items())


def check_refusals():
    """What it leaves to the reference."""
    call = conv_inputs((2, 5, 3, 4))
    pick = causal_conv1d.op.pick
    assert pick(**call.to(torch.float32).arguments) == "triton"
    assert pick(**call.arguments) == "reference"
    assert pick(**conv_inputs((2, 5, 3, 5), torch.float32).arguments) == "reference"


def cases():
    for shape, dtype in itertools.product(SHAPES, [torch.float32, torch.bfloat16]):
        yield f"{shape} {dtype}", partial(check, shape, dtype)
    yield "no bias, no silu", partial(check, SHAPES[0], torch.float32, bias=None, activation=None)
    yield "cold", partial(check, SHAPES[0], torch.float32, initial_state=None)
    for w in (2, 3, 4):
        shape, n_seqs = (1, sum(LENGTHS), 5, w), len(LENGTHS)
        changed = {"cu_seqlens": pack(LENGTHS)}
        yield f"pack {w}", partial(check, shape, torch.float32, n_seqs, **changed)
    changed["initial_state"] = None
    yield "cold pack", partial(check, shape, torch.float32, **changed)
    yield "views", check_views
    yield "pieces", check_pieces
    yield "pack is separate", check_pack_is_separate
    yield "gradients of views", check_gradient_views
    yield "gradients in their place", check_gradient_place
    yield "gradients in pieces", check_gradient_pieces
    yield "gradients of packs", check_gradient_packs
    yield "long walks", check_long_walks
    yield "second derivatives", check_second_derivatives
    yield "repeats", check_repeats
    yield "opcheck", check_op
    yield "refusals", check_refusals
    for n_seqs, cu_seqlens in ((None, None), (3, pack([4, 0, 7]))):
        call = conv_inputs((1, 11, 5, 4), torch.float32, n_seqs=n_seqs)
        call = call.having(cu_seqlens=cu_seqlens)
        yield "graphs", partial(check_graphs, causal_conv1d, call)
        yield "gradients in graphs", partial(check_gradient_graphs, causal_conv1d, call)
