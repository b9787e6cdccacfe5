"""The launch of csrc/selective_scan/fwd.cu."""

import functools
from math import inf
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from hybridzoo.errors import BackendError
from hybridzoo.kernels import loader

SOURCE = "selective_scan/fwd.cu"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LANES = 32
# of a grid along y
MAX_SEGMENTS = 65535

T = TypeVar("T")


class Arguments(NamedTuple, Generic[T]):
    """Those of the op (`ops.py`), in its order: tensors, or what is known of them."""

    x: T
    dt: T
    A: T
    B: T
    C: T
    D: T | None
    z: T | None
    dt_bias: T | None
    initial_state: T | None
    cu_seqlens: T | None
    dt_softplus: bool
    dt_min: float
    dt_max: float


TENSORS = Arguments._fields[:10]


class Mapping(NamedTuple):
    """How the work is spread; see fwd.cu. Changes speed and rounding, not the function.

    Attributes:
        states: a thread walks so many of one channel.
        channels: a thread walks so many.
        warps: of a block.
        tokens: of a tile.
        n_segments: of a row, side by side; fewer where it is short.
        min_blocks: blocks that one multiprocessor shall hold, which bounds a thread's registers.
        team: warps that read and write together, in longer rows: 1, or some that divide `warps`.
    """

    states: int
    channels: int
    warps: int
    tokens: int
    n_segments: int = 1
    min_blocks: int = 1
    team: int = 1

    def lanes(self, n: int) -> int:
        """Threads that share a channel of n states: a power of two."""
        return 1 << max(0, -(-n // self.states) - 1).bit_length()

    def width(self, n: int) -> int:
        """Channels of a warp."""
        return LANES // self.lanes(n) * self.channels

    def vector(self, n: int) -> int:
        """Neighbouring channels that a thread reads at once."""
        return self.width(n) * self.tokens // LANES

    def maps(self, n: int) -> int:
        """Neighbouring states of B and of C that a thread reads at once."""
        padded = self.lanes(n) * self.states
        return max(1, self.tokens * padded // (LANES * self.warps))


# a block a multiprocessor: of four warps a scheduler; of two, a thread with four states, or two
WAVE = Mapping(8, 1, 16, 16)
TEAM_OF_4, TEAM_OF_2 = Mapping(4, 1, 8, 32, team=8), Mapping(2, 1, 8, 32, team=8)


def choose(shape: tuple[int, ...], n: int, device: torch.device, groups: int = 1) -> Mapping:
    """The mapping for x of this shape, n states and groups of B, as measured on one H200.

    Eight states a thread take the fewest instructions, but leave few warps where a batch has few
    channels: two warps a scheduler take half the states, or a quarter. With fewer channels still a
    row is cut into segments, which costs most of the walk twice.
    """
    gpu = torch.cuda.get_device_properties(device)
    n_sms, room = gpu.multi_processor_count, gpu.shared_memory_per_block_optin
    return _choose(*shape, n, groups, n_sms, room)


@functools.lru_cache(1024)
def _choose(b: int, l: int, i: int, n: int, groups: int, n_sms: int, room: int) -> Mapping:
    if n > 32:
        return Mapping(8, 2, 4, 8, min_blocks=2)
    # a whole channel a thread wants some registers more
    many = Mapping(8, 1, 4, 16, min_blocks=4 if n > 8 else 3)
    # what a tile of 32 tokens, or another launch, costs a short row does not bring back
    if l < 256:
        return many
    # one wave of blocks as large as a multiprocessor: all of them end together
    waves = ((WAVE, 0.95), (TEAM_OF_4, 0.5), (TEAM_OF_2, 0.5))
    # with one lane a channel the first has too few registers
    for mapping, least in waves if n > 8 else waves[1:]:
        blocks = _n_blocks(mapping, b, i, n, groups)
        if least * n_sms < blocks <= n_sms and _shared_bytes(mapping, n, False) <= room:
            return mapping
    # channels, so that every scheduler has two warps
    wanted = 2 * 4 * n_sms * many.width(n)
    if b * i > wanted / 4:
        return many
    n_segments = min(l // 128, MAX_SEGMENTS)
    if b * i * n_segments >= wanted:
        return many._replace(n_segments=min(wanted // (b * i), n_segments))
    few = Mapping(4, 1, 4, 32, n_segments, team=4)
    return few if _shared_bytes(few, n, False) <= room else few._replace(tokens=16)


def _n_blocks(mapping: Mapping, b: int, i: int, n: int, groups: int) -> int:
    """Of a segment; none has channels of two groups."""
    return b * groups * -(-(i // max(groups, 1)) // (mapping.width(n) * mapping.warps))


class Layout(NamedTuple):
    """What of a tensor decides how a kernel reads it; its address counts modulo 16."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    address: int


class Plan(NamedTuple):
    """A launch but for its tensors; kept, as it takes the host long, for others laid out alike.

    Attributes:
        n_segments: of a row of the batch.
        numbers: the kernels' arguments behind the tensors.
        kernels: each with its grid and its bytes of shared memory, in order.
    """

    n_segments: int
    numbers: tuple[int | float, ...]
    kernels: tuple[tuple[loader.Kernel, tuple[int, int, int], int], ...]


def launch(
    given: Arguments[Tensor], mapping: Mapping, checkpoint_every: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernel with a mapping.

    Args:
        given: the op's arguments.
        mapping: how the work is spread.
        checkpoint_every: also give the state before every so many tokens of a row, a power of two
            and a multiple of the mapping's tokens, or 16 of its 32; 0 gives none.

    Returns:
        y; final_state; checkpoints, (b, ceil(l / checkpoint_every), i, n) fp32.

    Raises:
        BackendError: a tensor has not the contract's shape.
    """
    given = laid_out(given)
    tensors, options = given[: len(TENSORS)], given[len(TENSORS) :]
    plan = _plan(given.x.device, mapping, checkpoint_every, options, *map(layout_of, tensors))
    x, A = given.x, given.A
    b, (i, n) = x.shape[0], A.shape
    y, final_state, checkpoints = outputs(x, A, given.cu_seqlens, checkpoint_every)
    ends = dt_sums = None
    if plan.n_segments > 1:
        ends = A.new_empty(b, plan.n_segments - 1, i, n)
        dt_sums = A.new_empty(b, plan.n_segments - 1, i)
    arguments = (*tensors, y, final_state, checkpoints, ends, dt_sums, *plan.numbers)
    for kernel, grid, shared in plan.kernels:
        kernel(grid, LANES * mapping.warps, shared, *arguments)
    return y, final_state, checkpoints


def outputs(
    x: Tensor, A: Tensor, cu_seqlens: Tensor | None, checkpoint_every: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What `launch` fills."""
    b, l, _ = x.shape
    rows = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    n_checkpoints = (l + checkpoint_every - 1) // checkpoint_every if checkpoint_every else 0
    shapes = (rows, *A.shape), (b, n_checkpoints, *A.shape)
    return x.new_empty(x.shape), *(x.new_empty(s, dtype=torch.float32) for s in shapes)


def layout_of(t: Tensor | None) -> Layout | None:
    """That of a tensor which is there."""
    return None if t is None else Layout(t.shape, t.stride(), t.dtype, t.data_ptr() % 16)


@functools.lru_cache(1024)
def _plan(
    device: torch.device,
    mapping: Mapping,
    checkpoint_every: int,
    options: tuple[bool, float, float],
    *layouts: Layout | None,
) -> Plan:
    """How to launch on tensors of these layouts."""
    given: Arguments[Layout] = Arguments(*layouts, *options)
    check_shapes(given)
    (b, l, i), n = given.x.shape, given.A.shape[1]
    rows = b if given.cu_seqlens is None else given.cu_seqlens.shape[0] - 1
    # whole tiles a segment, and in training whole distances of checkpoints
    unit = max(mapping.tokens, checkpoint_every)
    segment = -(-max(l, 1) // (mapping.n_segments * unit)) * unit
    n_segments = -(-max(l, 1) // segment)
    numbers = (
        l, i, i // given.B.shape[2], n, rows, segment, n_segments, checkpoint_every,
        float(given.dt_min), float(given.dt_max), *strides(given),
    )  # fmt: skip
    both, has_checkpoints = _defines(given, mapping), int(checkpoint_every > 0)
    blocks = _n_blocks(mapping, b, i, n, given.B.shape[2])
    kernels = []
    for name, is_ends, grid_y in (("ends", 1, n_segments - 1), ("fwd", 0, n_segments)):
        # a pack of no sequences has nothing to walk
        if grid_y and rows:
            checkpoints = 0 if is_ends else has_checkpoints
            macros = {**both, "CHECKPOINTS": checkpoints, "ENDS": is_ends}
            kernel = loader.load(SOURCE, f"selective_scan_{name}", macros, device)
            kernels.append((kernel, (blocks, grid_y, 1), _shared_bytes(mapping, n, bool(is_ends))))
    return Plan(n_segments, numbers, tuple(kernels))


def check_shapes(given: Arguments[Layout]) -> None:
    """Refuse what the kernel would read beyond."""
    (b, l, i), n, g = given.x.shape, given.A.shape[1], given.B.shape[2]
    rows = b if given.cu_seqlens is None else given.cu_seqlens.shape[0] - 1
    wanted = {
        "dt": (b, l, i), "A": (i, n), "B": (b, l, g, n), "C": (b, l, g, n), "D": (i,),
        "z": (b, l, i), "dt_bias": (i,), "initial_state": (rows, i, n),
    }  # fmt: skip
    for name, shape in wanted.items():
        t = getattr(given, name)
        if t is not None and tuple(t.shape) != shape:
            raise BackendError(
                f"selective_scan: {name} is {tuple(t.shape)}; beside x {(b, l, i)} it is {shape}. "
                "Expand or cut it."
            )
    if g == 0 or i % g:
        raise BackendError(
            f"selective_scan: B has {g} groups for {i} channels; it must divide them. Change B."
        )


def laid_out(given: Arguments[Tensor]) -> Arguments[Tensor]:
    """Neighbours of the last dimension side by side; what is of channels whole and fp32."""
    change = {}
    for name in ("x", "dt", "B", "C", "z"):
        t = getattr(given, name)
        if t is not None and t.stride(-1) != 1:
            change[name] = t.contiguous()
    for name in ("A", "D", "dt_bias", "initial_state"):
        t = getattr(given, name)
        if t is not None and not (t.dtype == torch.float32 and t.is_contiguous()):
            change[name] = t.to(torch.float32).contiguous()
    if given.cu_seqlens is not None:
        change["cu_seqlens"] = given.cu_seqlens.to(torch.int32).contiguous()
    return given._replace(**change) if change else given


def strides(given: Arguments[Layout]) -> list[int]:
    """Of x, dt, z, B and C but for their last dimension, as both kernels take them."""
    x, dt, _, B, C, _, z, *_ = given
    rows = [s for t in (x, dt, x if z is None else z) for s in t.stride[:2]]
    return rows + [s for t in (B, C) for s in t.stride[:3]]


def defines(given: Arguments[Layout], vector: int, maps: int, *others: Layout) -> dict[str, int]:
    """The macros that both kernels take.

    Args:
        given: the op's arguments.
        vector: neighbouring channels that a thread reads at once.
        maps: the same of states, of B and of C.
        others: read as x is.
    """
    x, dt, A, B, C, _, z, *_ = given
    is_aligned = x.shape[2] // B.shape[2] % vector == 0 and A.shape[1] % maps == 0
    size = x.dtype.itemsize
    wide, narrow = min(16, vector * size), min(16, maps * size)
    for t, unit in ((B, narrow), (C, narrow), *((t, wide) for t in (x, dt, z, *others))):
        if is_aligned and t is not None:
            # every row begins at a multiple of it
            *strides, _ = t.stride
            is_aligned = t.address % unit == 0 and not any(s * size % unit for s in strides)
    return {
        "DTYPE": DTYPES[x.dtype],
        "ALIGNED": int(is_aligned),
        "SOFTPLUS": int(given.dt_softplus),
        # as in dt.py, the widest limits do not limit: without softplus a step may be negative
        "LIMITS": int((given.dt_min, given.dt_max) != (0.0, inf)),
        "GATED": int(z is not None),
        "PACKED": int(given.cu_seqlens is not None),
    }


def _defines(given: Arguments[Layout], mapping: Mapping) -> dict[str, int]:
    """The macros of fwd.cu."""
    n, is_packed = given.A.shape[1], given.cu_seqlens is not None
    return {
        **defines(given, mapping.vector(n), mapping.maps(n)),
        "SPT": mapping.states,
        "CPT": mapping.channels,
        "LANES": mapping.lanes(n),
        "WARPS": mapping.warps,
        "TEAM": mapping.team,
        "TOKENS": mapping.tokens,
        # a pack's way through a tile that sequences share needs registers of its own
        "MIN_BLOCKS": max(1, mapping.min_blocks * 3 // 4) if is_packed else mapping.min_blocks,
    }


def _shared_bytes(mapping: Mapping, n: int, is_ends: bool) -> int:
    """Size of `Shared` in tile.cuh, or somewhat more: of B and C in fp32."""
    width, rows = mapping.width(n), mapping.tokens
    # tiles of steps and of sums; three of B and of C
    ring = 3 if mapping.team > 1 else 2
    floats = ring * mapping.warps * rows * (2 * width + 4)
    maps = 3 * rows * mapping.lanes(n) * mapping.states
    floats += maps + mapping.warps * width
    if not is_ends:
        floats += maps + mapping.warps * width
        floats += ring * mapping.warps * mapping.tokens * (LANES + 4) * mapping.channels
    # and the barriers
    return 4 * floats + 16
