"""The launch of csrc/selective_scan/bwd.cu."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from hybridzoo.kernels import loader
from hybridzoo.kernels.selective_scan.fwd import (
    LANES,
    MAX_SEGMENTS,
    TENSORS,
    Arguments,
    Layout,
    check_shapes,
    defines,
    laid_out,
    layout_of,
    strides,
)

SOURCE = "selective_scan/bwd.cu"
# states and channels that a thread walks
STATES, CHANNELS = 4, 2
# of the time that a segment takes: what finding its carry costs besides, by count of instructions
CARRIES_COST = 0.25


class Mapping(NamedTuple):
    """How the work is spread; see bwd.cu. Changes speed and rounding, not the function.

    Attributes:
        warps: of a block.
        tokens: of a tile, and between two checkpoints of the forward: 32 at most.
        sub: tokens whose states a thread holds at once; divides `tokens`.
        n_segments: of a row, side by side; fewer where it is short.
    """

    warps: int
    tokens: int
    sub: int
    n_segments: int = 1

    def vector(self, n: int) -> int:
        """Neighbouring channels that a thread reads at once."""
        return _width(n) * self.sub // LANES

    def maps(self, n: int) -> int:
        """Neighbouring states of B and of C that a thread reads at once."""
        return max(1, self.tokens * _lanes(n) * STATES // (LANES * self.warps))


def _lanes(n: int) -> int:
    """Threads that share a channel of n states: a power of two.

    Two at least, or a warp would have more channels than a thread has room for what it reads.
    """
    return 1 << max(1, (-(-n // STATES) - 1).bit_length())


def _width(n: int) -> int:
    """Channels of a warp."""
    return LANES // _lanes(n) * CHANNELS


def distance(n: int) -> int:
    """Tokens between two checkpoints of the forward, n states a channel: a tile here."""
    return 32 if n <= 32 else 16


def choose(
    shape: tuple[int, ...],
    n: int,
    device: torch.device,
    groups: int = 1,
    *,
    is_packed: bool = False,
) -> Mapping:
    """The mapping for x of this shape, n states and groups of B."""
    gpu = torch.cuda.get_device_properties(device)
    n_sms, room = gpu.multi_processor_count, gpu.shared_memory_per_block_optin
    return _choose(*shape, n, groups, is_packed, n_sms, room)


@functools.lru_cache(1024)
def _choose(
    b: int, l: int, i: int, n: int, groups: int, is_packed: bool, n_sms: int, room: int
) -> Mapping:
    # a lane reads four channels at most, of one token
    sub = min(8, 2 * _lanes(n))
    if is_packed and _width(n) * sub > LANES:
        # the way into a sequence and out of it wants registers
        sub //= 2
    sizes = [Mapping(warps, distance(n), sub) for warps in (8, 4, 2, 1)]
    mapping = next(m for m in sizes if _shared_bytes(m, n) <= room)
    blocks = _n_blocks(mapping, b, i, n, groups)

    def cost(n_segments: int) -> float:
        waves = -(-blocks * n_segments // n_sms)
        return waves / n_segments * (1 + CARRIES_COST * (n_segments > 1))

    # of those within a fiftieth of the best, the fewest
    counts = range(1, max(1, min(l // (4 * mapping.tokens), MAX_SEGMENTS, 4 * n_sms)) + 1)
    least = min(map(cost, counts))
    return mapping._replace(n_segments=next(s for s in counts if cost(s) <= 1.02 * least))


def _n_blocks(mapping: Mapping, b: int, i: int, n: int, groups: int) -> int:
    """Of a segment; none has channels of two groups."""
    return b * groups * _blocks_of_group(mapping, i // max(groups, 1), n)


def _blocks_of_group(mapping: Mapping, channels: int, n: int) -> int:
    return -(-channels // (_width(n) * mapping.warps))


class Plan(NamedTuple):
    """A launch but for its tensors; kept, as it takes the host long, for others laid out alike.

    Attributes:
        n_segments: of a row of the batch.
        n_parts: blocks that share a group, each with its part of dB and dC.
        numbers: the kernels' arguments behind the tensors.
        kernels: each with its grid and its bytes of shared memory, in order.
    """

    n_segments: int
    n_parts: int
    numbers: tuple[int | float, ...]
    kernels: tuple[tuple[loader.Kernel, tuple[int, int, int], int], ...]


def launch(
    given: Arguments[Tensor],
    dy: Tensor,
    dfinal_state: Tensor | None,
    checkpoints: Tensor,
    mapping: Mapping,
) -> list[Tensor]:
    """Run the kernel with a mapping.

    Args:
        given: the op's arguments.
        dy: gradient of y, (b, l, i), y.dtype.
        dfinal_state: gradient of final_state, like it, fp32; None is zero.
        checkpoints: of the forward, a state before every `mapping.tokens`.
        mapping: how the work is spread.

    Returns:
        Gradients of the first nine arguments, each like it; an absent one's is empty.

    Raises:
        BackendError: a tensor has not the contract's shape.
    """
    dtypes = [None if t is None else t.dtype for t in given[:9]]
    given = laid_out(given)
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    dfinal_state = None if dfinal_state is None else dfinal_state.contiguous()
    tensors, options = given[: len(TENSORS)], given[len(TENSORS) :]
    x, A, B = given.x, given.A, given.B
    (b, l, i), n = x.shape, A.shape[1]
    if l == 0:
        return _without_tokens(given, dfinal_state, dtypes)
    assert checkpoints.shape == (b, -(-l // mapping.tokens), i, n), "of another mapping"
    plan = _plan(x.device, mapping, options, layout_of(dy), *map(layout_of, tensors))
    s = plan.n_segments
    dx, ddt = x.new_empty(x.shape), x.new_empty(x.shape)
    dz = x.new_empty(0 if given.z is None else x.shape)
    dB, dC = (A.new_empty(plan.n_parts, *B.shape) for _ in range(2))
    dA = A.new_empty(b * s, i, n)
    dD, ddt_bias = (A.new_empty(b * s, i) for _ in range(2))
    dinitial = _handed_through(given, dfinal_state)
    carries = dt_sums = None
    if s > 1:
        carries, dt_sums = A.new_empty(b, s - 1, i, n), A.new_empty(b, s - 1, i)
    arguments = (
        *tensors, dy, dfinal_state, checkpoints, dx, ddt, dz, dB, dC, dA, dD, ddt_bias, dinitial,
        carries, dt_sums, *plan.numbers,
    )  # fmt: skip
    for kernel, grid, shared in plan.kernels:
        kernel(grid, LANES * mapping.warps, shared, *arguments)
    *sums, ddt_bias = (t[0] if len(t) == 1 else t.sum(0) for t in (dA, dB, dC, dD, ddt_bias))
    found = (dx, ddt, *sums, dz, ddt_bias, dinitial)
    return [x.new_empty(0) if d is None else t.to(d) for t, d in zip(found, dtypes, strict=True)]


def _handed_through(given: Arguments[Tensor], dfinal_state: Tensor | None) -> Tensor | None:
    """The initial state's gradient where there is no token between it and the final state."""
    if given.initial_state is None:
        return None
    if given.cu_seqlens is None and given.x.shape[1]:
        # every row has a token, so the kernel writes it
        return torch.empty_like(given.initial_state)
    return torch.zeros_like(given.initial_state) if dfinal_state is None else dfinal_state.clone()


def _without_tokens(
    given: Arguments[Tensor], dfinal_state: Tensor | None, dtypes: list[torch.dtype | None]
) -> list[Tensor]:
    """All zeros but the initial state's."""
    *zeros, _ = (given.x.new_zeros(0) if t is None else torch.zeros_like(t) for t in given[:9])
    found = (*zeros, _handed_through(given, dfinal_state))
    return [
        given.x.new_empty(0) if d is None else t.to(d) for t, d in zip(found, dtypes, strict=True)
    ]


@functools.lru_cache(1024)
def _plan(
    device: torch.device,
    mapping: Mapping,
    options: tuple[bool, float, float],
    dy: Layout,
    *layouts: Layout | None,
) -> Plan:
    """How to launch on tensors of these layouts."""
    given: Arguments[Layout] = Arguments(*layouts, *options)
    check_shapes(given)
    (b, l, i), n, groups = given.x.shape, given.A.shape[1], given.B.shape[2]
    rows = b if given.cu_seqlens is None else given.cu_seqlens.shape[0] - 1
    segment = -(-max(l, 1) // (mapping.n_segments * mapping.tokens)) * mapping.tokens
    n_segments = -(-max(l, 1) // segment)
    numbers = (
        l, i, i // groups, n, rows, segment, n_segments, float(given.dt_min), float(given.dt_max),
        *strides(given), *dy.stride[:2],
    )  # fmt: skip
    macros = {
        **defines(given, mapping.vector(n), mapping.maps(n), dy),
        "SPT": STATES,
        "CPT": CHANNELS,
        "LANES": _lanes(n),
        "WARPS": mapping.warps,
        "TOKENS": mapping.tokens,
        "SUB": mapping.sub,
    }
    blocks, shared = _n_blocks(mapping, b, i, n, groups), _shared_bytes(mapping, n)
    kernels = []
    for name, is_carries, grid_y in (("carries", 1, n_segments - 1), ("bwd", 0, n_segments)):
        # a batch of no rows has nothing to walk
        if grid_y and blocks:
            kernel = loader.load(
                SOURCE, f"selective_scan_{name}", {**macros, "CARRIES": is_carries}, device
            )
            kernels.append((kernel, (blocks, grid_y, 1), shared))
    n_parts = _blocks_of_group(mapping, i // groups, n)
    return Plan(n_segments, n_parts, numbers, tuple(kernels))


def _shared_bytes(mapping: Mapping, n: int) -> int:
    """Size of `Shared` in adjoint.cuh, or somewhat more; selective_scan_carries needs less."""
    lanes, width, vector = _lanes(n), _width(n), mapping.vector(n)
    padded, threads = lanes * STATES, LANES * mapping.warps
    # of two tokens, with what keeps lanes out of each other's banks
    room = min(8, 16 // lanes * CHANNELS) // vector if vector > 1 else 0
    pair = vector * (2 * (width // vector) + room)
    elements, sums = (4 * mapping.warps * t // 2 * pair for t in (mapping.tokens, mapping.sub))
    maps = 2 * mapping.tokens * min(STATES, LANES // lanes) * padded
    own = threads * STATES * CHANNELS
    before, dmaps = mapping.tokens // mapping.sub * own, 2 * mapping.warps * mapping.tokens * padded
    over_time, channels = 2 * own + 4 * vector * threads, 2 * mapping.warps * width
    return 4 * (elements + sums + maps + before + dmaps + over_time + channels)
