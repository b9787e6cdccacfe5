"""The launch of csrc/selective_scan/bwd.cu."""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from hybridzoo.errors import BackendError
from hybridzoo.kernels import loader
from hybridzoo.kernels.selective_scan.fwd import (
    DTYPES,
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

SOURCE, SUMS = "selective_scan/bwd.cu", "selective_scan/sums.cu"
# of a block that adds up parts
SUM_THREADS = 128
# states of a channel that a thread walks
STATES = 4
# tokens of which a thread adds up the gradients of A, D and dt_bias before they are written: of 16
# states 1/16 of what x takes in bf16. Longer sums in fp32 lose more (simulated; of D's, 1e-7 so)
SUM_TOKENS = 512
# of the time that a segment takes: what finding its carry costs besides, by count of instructions
CARRIES_COST = 0.25
# and the tokens that a segment's beginning takes as long as, by measurement on one H200
SEGMENT_COST = 43


class Mapping(NamedTuple):
    """How the work is spread; see bwd.cu. Changes speed and rounding, not the function.

    Attributes:
        warps: of a block.
        tokens: of a tile, and between two checkpoints of the forward: 32 at most.
        sub: tokens whose states a thread holds at once; divides `tokens`.
        n_segments: of a row, side by side; fewer where it is short.
        min_blocks: blocks that one multiprocessor shall hold, which bounds a thread's registers.
        channels: that a thread walks.
    """

    warps: int
    tokens: int
    sub: int
    n_segments: int = 1
    min_blocks: int = 1
    channels: int = 2

    def vector(self, n: int) -> int:
        """Neighbouring channels that a thread reads at once."""
        return self.width(n) * self.sub // LANES

    def width(self, n: int) -> int:
        """Channels of a warp."""
        return LANES // _lanes(n) * self.channels

    def maps(self, n: int) -> int:
        """Neighbouring states of B and of C that a thread reads at once."""
        return max(1, self.tokens * _lanes(n) * STATES // (LANES * self.warps))


def _carries(n: int, is_packed: bool) -> Mapping:
    """Of selective_scan_carries, which wants a third of the registers and of the room."""
    return Mapping(4, 16, min(8, 2 * _lanes(n)), min_blocks=4 if is_packed else 6)


def _lanes(n: int) -> int:
    """Threads that share a channel of n states: a power of two.

    Two at least, or a warp would have more channels than a thread has room for what it reads.
    """
    return 1 << max(1, (-(-n // STATES) - 1).bit_length())


def distance(n: int, *, is_lean: bool = False) -> int:
    """Tokens between two checkpoints of the forward, n states a channel: a tile here.

    Of 16 states lean ones take what x does in bf16, and the others, in less time, twice that.
    """
    return 32 if 16 < n <= 32 or (is_lean and n <= 16) else 16


def choose(
    shape: tuple[int, ...],
    n: int,
    device: torch.device,
    groups: int = 1,
    *,
    is_packed: bool = False,
    is_lean: bool = False,
) -> Mapping:
    """The mapping for x of this shape, n states and groups of B, with checkpoints lean or not."""
    gpu = torch.cuda.get_device_properties(device)
    n_sms, room = gpu.multi_processor_count, gpu.shared_memory_per_block_optin
    return _choose(*shape, n, groups, is_packed, is_lean, n_sms, room)


# Of up to 16 states, whose blocks share a multiprocessor; and what one, two and so on there take,
# as measured on one H200, where two of WIDE take 1: a warp a scheduler leaves most slots empty
WIDE, LEAN = Mapping(4, 16, 4, min_blocks=2, channels=4), Mapping(4, 32, 8, min_blocks=2)
NARROW, FEW = Mapping(4, 16, 4, min_blocks=3), Mapping(4, 16, 4, min_blocks=2)
OF_TWO, OF_THREE = (0.75, 1.0), (0.43, 0.64, 0.8)


@functools.lru_cache(1024)
def _choose(
    b: int,
    l: int,
    i: int,
    n: int,
    groups: int,
    is_packed: bool,
    is_lean: bool,
    n_sms: int,
    room: int,
) -> Mapping:
    tokens = distance(n, is_lean=is_lean)
    candidates = _candidates(tokens, n, is_packed, room)

    def cost(mapping: Mapping, costs: tuple[float, ...]) -> float:
        full, rest = divmod(_n_blocks(mapping, b, i, n, groups) * mapping.n_segments, n_sms)
        full += rest > 0
        waves, rest = divmod(full, len(costs))
        time = (waves * costs[-1] + (costs[rest - 1] if rest else 0)) / mapping.n_segments
        carried = 1 + CARRIES_COST * (mapping.n_segments > 1)
        return time * carried * (1 + SEGMENT_COST * mapping.n_segments / max(l, 1))

    most = max(1, min(l // (2 * tokens), MAX_SEGMENTS, 4 * n_sms))
    options = [(m._replace(n_segments=k), c) for m, c in candidates for k in range(1, most + 1)]
    return min(options, key=lambda option: cost(*option))[0]


def _candidates(
    tokens: int, n: int, is_packed: bool, room: int
) -> list[tuple[Mapping, tuple[float, ...]]]:
    """Mappings that fit into this room, without segments, with what one, two and so on take."""
    known: list[tuple[Mapping, tuple[float, ...]]] = []
    if n <= 16 and not is_packed:
        if tokens == 16:
            known = [(WIDE, OF_TWO), (NARROW, OF_THREE)] if n > 8 else [(FEW, OF_TWO)]
        elif n > 8:
            known = [(LEAN, OF_TWO)]
    if fitting := [(m, costs) for m, costs in known if _shared_bytes(m, n) <= room]:
        return fitting
    # a lane reads four channels at most, of one token
    sub = min(8, 2 * _lanes(n))
    if is_packed and Mapping(1, tokens, sub).width(n) * sub > LANES:
        # the way into a sequence and out of it wants registers
        sub //= 2
    # of the same work, the widest blocks that fit
    sizes = [Mapping(warps, tokens, sub) for warps in (8, 4, 2, 1)]
    if n > 32 and not is_packed:
        sizes = [m._replace(sub=4, channels=4) for m in sizes]
    return [(next(m for m in sizes if _shared_bytes(m, n) <= room), (1.0,))]


def _n_blocks(mapping: Mapping, b: int, i: int, n: int, groups: int) -> int:
    """Of a segment; none has channels of two groups."""
    return b * groups * _blocks_of_group(mapping, i // max(groups, 1), n)


def _blocks_of_group(mapping: Mapping, channels: int, n: int) -> int:
    return -(-channels // (mapping.width(n) * mapping.warps))


class Plan(NamedTuple):
    """A launch but for its tensors; kept, as it takes the host long, for others laid out alike.

    Attributes:
        n_segments: of a row of the batch.
        n_sums: parts of the gradients of A, D and dt_bias, of all rows.
        n_parts: blocks that share a group, each with its part of dB and dC.
        numbers: the kernels' arguments behind the tensors.
        kernels: each with its grid, threads and bytes of shared memory, in order.
        sums: the kernel that adds up the parts, and its blocks.
    """

    n_segments: int
    n_sums: int
    n_parts: int
    numbers: tuple[int | float, ...]
    kernels: tuple[tuple[loader.Kernel, tuple[int, int, int], int, int], ...]
    sums: tuple[loader.Kernel, int]


def launch(
    given: Arguments[Tensor],
    dy: Tensor,
    dfinal_state: Tensor | None,
    checkpoints: Tensor,
    mapping: Mapping,
    *,
    dz: Tensor | None = None,
    y: Tensor | None = None,
) -> list[Tensor]:
    """Run the kernel with a mapping.

    Args:
        given: the op's arguments.
        dy: gradient of y, (b, l, i), y.dtype.
        dfinal_state: gradient of final_state, like it, fp32; None is zero.
        checkpoints: of the forward, a state before every `mapping.tokens`.
        mapping: how the work is spread.
        dz: where z's gradient goes, like z with neighbours side by side; None makes a tensor.
        y: is filled with the forward's again, (b, l, i), contiguous, where there is z; None is not
            asked for.

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
    x, (i, n) = given.x, given.A.shape
    if x.numel() == 0:
        return _without_tokens(given, dfinal_state, dtypes)
    wanted = (x.shape[0], -(-x.shape[1] // mapping.tokens), i, n)
    assert checkpoints.shape == wanted, "of another mapping"
    assert (dy.shape, dy.dtype) == (x.shape, x.dtype), "it is y's gradient"
    if dz is None:
        dz = x.new_empty(0 if given.z is None else x.shape)
    plan = _plan(x.device, mapping, options, layout_of(dy), layout_of(dz), *map(layout_of, tensors))
    dx, ddt = x.new_empty(x.shape), x.new_empty(x.shape)
    parts, carries, dinitial = *_workspace(plan, given), _handed_through(given, dfinal_state)
    arguments = (
        *tensors, dy, dfinal_state, checkpoints, dx, ddt, dz, y, *parts, dinitial, *carries,
        *plan.numbers,
    )  # fmt: skip
    for kernel, grid, threads, shared in plan.kernels:
        kernel(grid, threads, shared, *arguments)
    dB, dC, dA, dD, ddt_bias = _added_up(plan, given, parts)
    found = (dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial)
    return [x.new_empty(0) if d is None else t.to(d) for t, d in zip(found, dtypes, strict=True)]


def _workspace(
    plan: Plan, given: Arguments[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """Parts of dB, dC, dA, dD and ddt_bias; what segments hand on, and their sums of steps."""
    A, (i, n), b = given.A, given.A.shape, given.x.shape[0]
    dB, dC = (A.new_empty(plan.n_parts, *given.B.shape) for _ in range(2))
    dD, ddt_bias = (A.new_empty(plan.n_sums, i) for _ in range(2))
    parts = (dB, dC, A.new_empty(plan.n_sums, i, n), dD, ddt_bias)
    if plan.n_segments == 1:
        return parts, (None, None)
    between = (b, plan.n_segments - 1, i)
    return parts, (A.new_empty(*between, n), A.new_empty(between))


def _added_up(plan: Plan, given: Arguments[Tensor], parts: tuple[Tensor, ...]) -> list[Tensor]:
    """The sums of the parts, of B and C in their dtype."""
    maps, others = parts[:2], parts[2:]
    sums = [given.B.new_empty(t.shape[1:]) for t in maps]
    sums += [t.new_empty(t.shape[1:]) for t in others]
    kernel, blocks = plan.sums
    sizes = given.B.numel(), plan.n_parts, given.A.numel(), given.A.shape[0], plan.n_sums
    kernel((blocks, 1, 1), SUM_THREADS, 0, *sums, *parts, *sizes)
    return sums


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
    dz: Layout,
    *layouts: Layout | None,
) -> Plan:
    """How to launch on tensors of these layouts."""
    given: Arguments[Layout] = Arguments(*layouts, *options)
    check_shapes(given)
    read = (dy,) if given.z is None else (dy, dz)
    _check_distances(mapping, given, dy, dz)
    (b, l, i), n, groups = given.x.shape, given.A.shape[1], given.B.shape[2]
    rows = b if given.cu_seqlens is None else given.cu_seqlens.shape[0] - 1
    segment = -(-l // (mapping.n_segments * mapping.tokens)) * mapping.tokens
    n_segments = -(-l // segment)
    numbers = (
        l, i, i // groups, n, rows, segment, n_segments, float(given.dt_min), float(given.dt_max),
        *strides(given), *dy.stride[:2], *read[-1].stride[:2],
    )  # fmt: skip
    kernels = []
    if n_segments > 1:
        carries = _carries(n, given.cu_seqlens is not None)
        kernel = _load("carries", carries, given, device, *read)
        grid = (_n_blocks(carries, b, i, n, groups), n_segments - 1, 1)
        shared = _shared_bytes(carries, n, is_carries=True)
        kernels.append((kernel, grid, LANES * carries.warps, shared))
    grid = (_n_blocks(mapping, b, i, n, groups), n_segments, 1)
    kernel = _load("bwd", mapping, given, device, *read)
    kernels.append((kernel, grid, LANES * mapping.warps, _shared_bytes(mapping, n)))
    return Plan(
        n_segments,
        b * n_segments * -(-segment // SUM_TOKENS),
        _blocks_of_group(mapping, i // groups, n),
        numbers,
        tuple(kernels),
        _load_sums(given, device),
    )


def _check_distances(mapping: Mapping, given: Arguments[Layout], dy: Layout, dz: Layout) -> None:
    """Refuse what a thread cannot reach: it finds its elements of a tile by 32 bits."""
    layouts = {name: getattr(given, name) for name in ("x", "dt", "B", "C", "z")} | {"dy": dy}
    if given.z is not None:
        layouts["dz"] = dz
    for name, t in layouts.items():
        # of one token there is no next one
        if t is not None and t.shape[1] > 1 and t.stride[1] * mapping.tokens >= 2**31:
            raise BackendError(
                f"selective_scan: {name}'s tokens lie ({t.stride[1]}) elements apart, its limit is "
                f"({2**31 // mapping.tokens}). Call .contiguous()."
            )


def _load(
    name: str, mapping: Mapping, given: Arguments[Layout], device: torch.device, *others: Layout
) -> loader.Kernel:
    """selective_scan_<name>, where `others` lie as x does."""
    n = given.A.shape[1]
    macros = {
        **defines(given, mapping.vector(n), mapping.maps(n), *others),
        "SPT": STATES,
        "CPT": mapping.channels,
        "LANES": _lanes(n),
        "WARPS": mapping.warps,
        "TOKENS": mapping.tokens,
        "SUB": mapping.sub,
        "MIN_BLOCKS": mapping.min_blocks,
        "SUM_TOKENS": SUM_TOKENS,
        "CARRIES": int(name == "carries"),
    }
    return loader.load(SOURCE, f"selective_scan_{name}", macros, device)


def _load_sums(given: Arguments[Layout], device: torch.device) -> tuple[loader.Kernel, int]:
    """The kernel that adds up the parts, and its blocks: a thread has four columns."""
    i, n = given.A.shape
    columns = (math.prod(given.B.shape), math.prod(given.C.shape), i * n, i, i)
    macros = {"DTYPE": DTYPES[given.x.dtype], "ALIGNED": int(not any(c % 4 for c in columns))}
    kernel = loader.load(SUMS, "selective_scan_sums", macros, device)
    return kernel, -(-sum(-(-c // 4) for c in columns) // SUM_THREADS)


def _shared_bytes(mapping: Mapping, n: int, *, is_carries: bool = False) -> int:
    """Size of `Shared` in adjoint.cuh, or somewhat more."""
    lanes, width, vector = _lanes(n), mapping.width(n), mapping.vector(n)
    padded, threads = lanes * STATES, LANES * mapping.warps
    # of two tokens, with what keeps lanes out of each other's banks
    room = min(8, 16 // lanes * mapping.channels) // vector if vector > 1 else 0
    pair = vector * (2 * (width // vector) + room)
    elements, sums = (4 * mapping.warps * t // 2 * pair for t in (mapping.tokens, mapping.sub))
    reads_pairs = mapping.channels == 4 and mapping.sub % 4 == 0 and not is_carries
    steps = elements // 2 if reads_pairs else 4 * mapping.warps
    maps = 2 * mapping.tokens * (min(STATES, LANES // lanes) * padded + padded * (padded < LANES))
    if is_carries:
        return 4 * (elements + steps + maps + mapping.warps * width)
    own = threads * STATES * mapping.channels
    before = max(1, mapping.tokens // mapping.sub - 1) * own
    dmaps = 2 * mapping.warps * mapping.tokens * padded
    over_time = 3 * threads * vector
    return 4 * (
        elements + sums + steps + over_time + maps + before + dmaps + 2 * mapping.warps * width
    )
