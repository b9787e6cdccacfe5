"""causal_conv1d's Triton backend in the interpreter."""

import itertools
from functools import partial

import torch

from hybridzoo.kernels.causal_conv1d import causal_conv1d, triton
from tests.kernels.compare import check_backend
from tests.kernels.interpreted import allow_cpu, check_graphs
from tests.kernels.oracles import naive_conv
from tests.kernels.test_causal_conv1d import LENGTHS, conv_inputs, pack

# b l i w: a row less than a chunk, one more, fewer rows than taps, none; 300: two blocks
SHAPES = [(2, 7, 5, 4), (2, 9, 6, 3), (1, 2, 300, 4), (2, 0, 5, 2), (1, 21, 3, 2)]


allow_cpu(triton)


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
    """The op's schema, fake and autograd formula, with and without its options."""
    options = itertools.product([True, False], [None, pack([4, 0, 7])])
    for has_all, cu_seqlens in options:
        call = conv_inputs((1, 11, 5, 4), torch.float32, n_seqs=3 if cu_seqlens is not None else 1)
        x, weight, bias, _, state = call.to(None).arguments.values()
        bias, state = (bias, state) if has_all else (None, None)
        torch.library.opcheck(
            torch.ops.hybridzoo.causal_conv1d_triton, (x, weight, bias, state, cu_seqlens, has_all)
        )


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
    yield "opcheck", check_op
    yield "refusals", check_refusals
    for n_seqs, cu_seqlens in ((None, None), (3, pack([4, 0, 7]))):
        call = conv_inputs((1, 11, 5, 4), torch.float32, n_seqs=n_seqs)
        yield "graphs", partial(check_graphs, causal_conv1d, call.having(cu_seqlens=cu_seqlens))
