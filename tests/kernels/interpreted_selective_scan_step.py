"""selective_scan_step's Triton backend in the interpreter."""

from functools import partial

import torch

from hybridzoo.kernels.selective_scan_step import selective_scan_step, triton
from tests.kernels.interpreted import allow_cpu, check_graphs
from tests.kernels.test_selective_scan_step import (
    SHAPES,
    SLOTS,
    check,
    check_raw_op,
    step_inputs,
    variants,
)


def narrow_blocks():
    """Several sequences a program, several blocks a group."""
    triton.TILE, triton.MIN_PROGRAMS = 32, 1
    check(step_inputs((7, 18, 3, 5), torch.float32), torch.float32, run=triton.run)


def graphs():
    allow_cpu(triton)
    check_graphs(selective_scan_step, step_inputs((5, 6, 1, 4), torch.float32, slots=SLOTS))


def cases():
    def checked(call, dtype=torch.float32):
        return partial(check, call, dtype, run=triton.run)

    for shape in SHAPES:
        yield f"{shape}", checked(step_inputs(shape, torch.float32))
    for dtype in (torch.bfloat16, torch.float16):
        yield f"{dtype}", checked(step_inputs(SHAPES[1], dtype), dtype)
    for name, call in variants(step_inputs((5, 18, 3, 5), torch.float32, slots=SLOTS)):
        yield name, checked(call)
    yield "all dropped", checked(step_inputs((2, 6, 1, 4), torch.float32, slots=[-1, -2]))
    yield "no sequence", checked(step_inputs((0, 6, 1, 4), torch.float32))
    yield "narrow blocks", narrow_blocks
    yield "graphs", graphs
    for slots in (None, SLOTS):
        call = step_inputs((5, 6, 1, 4), torch.float32, slots=slots)
        opcheck = partial(check_raw_op, triton.selective_scan_step_triton)
        yield f"opcheck {slots}", partial(opcheck, call)
