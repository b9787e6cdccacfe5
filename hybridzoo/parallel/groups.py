"""Process groups from what torchrun, deepspeed or SLURM started."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hybridzoo.comm import SINGLE, Axis, Parallel
from hybridzoo.errors import ConfigError
from hybridzoo.launcher import NAMES, is_launched, number
from hybridzoo.parallel.agree import check_alike, exchange


def init(
    *,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    sequence_parallel: bool = False,
    timeout_s: int = 600,
    device: torch.device | str | None = None,
) -> Parallel:
    """Join the ranks that a launcher started, and find this one's place among them.

    Ranks count along (pp, dp, tp), tp fastest, so that the ranks that talk most are neighbours; dp
    is what tp and pp leave. The first call starts torch.distributed (NCCL on a GPU, that of
    LOCAL_RANK; gloo on the CPU) and is made by every rank with the same values. Where it runs
    already, only the groups are made.

    Args:
        tp: ranks that hold slices of each layer.
        pp: ranks that hold different places of the stack.
        ep: data-parallel ranks that hold different experts; ep ranks in a row.
        sequence_parallel: between blocks each tp rank keeps its share of the tokens alone; means
            nothing at tp 1.
        timeout_s: after so many seconds without an answer from another rank, a rank gives up.
        device: "cpu" or "cuda"; None is a GPU if there is one.

    Returns:
        SINGLE in a process that no launcher started; else axes that all have groups.

    Raises:
        ConfigError: the ranks cannot be laid out so; the legal sizes are listed.
    """
    _check_counts(tp=tp, pp=pp, ep=ep, timeout_s=timeout_s)
    if not dist.is_initialized():
        if not is_launched():
            _check_single(tp, pp, ep)
            return SINGLE
        world = number("WORLD_SIZE")
        check_layout(world, tp, pp, ep)
        _join(world, timedelta(seconds=timeout_s), device)
    world = dist.get_world_size()
    check_layout(world, tp, pp, ep)
    sizes = {"tp": tp, "pp": pp, "ep": ep, "sequence_parallel": sequence_parallel}
    check_alike({f"parallel.{name}": size for name, size in sizes.items()})
    limit = timedelta(seconds=timeout_s)
    ranks = torch.arange(world).view(pp, -1, tp)
    dp = ranks.shape[1]
    # every rank takes part in making every group, in one order
    return Parallel(
        tp=_axis(ranks.reshape(-1, tp).tolist(), limit),
        ep=_axis(ranks.transpose(1, 2).reshape(-1, ep).tolist(), limit),
        pp=_axis(ranks.reshape(pp, -1).T.tolist(), limit),
        dp=_axis(ranks.transpose(1, 2).reshape(-1, dp).tolist(), limit),
        sequence_parallel=sequence_parallel and tp > 1,
    )


def finish() -> None:
    """Leave torch.distributed once every rank is here; nothing in a process of its own."""
    if dist.is_initialized():
        # the first to leave may take the store along that the others still talk to
        exchange(None)
        dist.destroy_process_group()


def _join(world: int, limit: timedelta, device: torch.device | str | None) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ConfigError(
                f"parallel: {name} is not set; the ranks need the host and a free port of rank 0. "
                "Export both, as in scripts/launch/slurm.sh, or start with torchrun."
            )
    for name in NAMES:
        # torch.distributed and DeepSpeed read them
        os.environ[name] = str(number(name))
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    options: dict[str, Any] = {}
    if kind == "cuda":
        # else NCCL guesses it from the rank
        options["device_id"] = _own_gpu()
    backend = "nccl" if kind == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend, rank=number("RANK"), world_size=world, timeout=limit, **options
        )
    except dist.DistNetworkError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConfigError(
            f"parallel: the ranks cannot meet at {where} ({last_line(error)}); rank 0 listens "
            "there. Give the launcher a free port: --master_port 29501."
        ) from error
    except dist.DistBackendError as error:
        # where another rank ended, NCCL has no words of its own, or calls it remote
        if "Last error" not in str(error) or "ncclRemoteError" in str(error):
            raise
        raise ConfigError(
            f"parallel: NCCL cannot start ({last_line(error)}); it needs a GPU for each rank, room "
            "in /dev/shm and a network between hosts. Set NCCL_DEBUG=INFO to see what it lacks."
        ) from error


def _own_gpu() -> torch.device:
    local, n_gpus = number("LOCAL_RANK"), torch.cuda.device_count()
    if local >= n_gpus:
        raise ConfigError(
            f"parallel: rank {number('RANK')} is process {local + 1} of its host and sees too few "
            f"GPUs ({n_gpus}); each rank needs its own. Start fewer ranks; with SLURM ask for "
            "--gpus-per-node, as --gpus-per-task shows a task only its own."
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def last_line(error: BaseException) -> str:
    """What an error of torch.distributed says last: NCCL's or gloo's own words, if it has any."""
    # C++ frames may follow
    text = str(error).partition("Exception raised from ")[0]
    lines = [line.strip().rstrip(".") for line in text.splitlines()]
    # NCCL's words follow this heading, or nothing does
    said = [line for line in lines if line and not line.startswith("Last error:")]
    return said[-1] if said else type(error).__name__


def _axis(groups: Sequence[list[int]], limit: timedelta) -> Axis:
    me, mine = dist.get_rank(), Axis()
    for members in groups:
        group = dist.new_group(members, timeout=limit)
        if me in members:
            mine = Axis(members.index(me), len(members), group)
    return mine


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(
                f"parallel: {name} cannot be {count}; it is a count >= 1. Correct it."
            )


def _check_single(tp: int, pp: int, ep: int) -> None:
    n = tp * pp * ep
    if n == 1:
        return
    asked = ", ".join(f"{k} {v}" for k, v in (("tp", tp), ("pp", pp), ("ep", ep)) if v > 1)
    program = Path(sys.argv[0])
    script = str(program) if program.suffix == ".py" else f"--no-python {program.name}"
    command = f"torchrun --nproc-per-node {n} {script} {shlex.join(sys.argv[1:])}".rstrip()
    raise ConfigError(
        f"parallel: {asked} needs {n} processes, and this is one; a launcher starts them. "
        f"Type: {command}"
    )


def check_layout(world: int, tp: int, pp: int, ep: int) -> None:
    """Refuse sizes that `world` ranks cannot have.

    Raises:
        ConfigError: the legal ones are listed.
    """
    if world % (tp * pp):
        raise ConfigError(
            f"parallel: {world} ranks cannot be laid out as tp {tp} x pp {pp}; the product divides "
            f"their number. Use a product of {_divisors(world)}, or start {tp * pp} ranks."
        )
    dp = world // (tp * pp)
    if dp % ep:
        raise ConfigError(
            f"parallel: ep {ep} cannot divide {dp} data-parallel ranks ({world} / tp {tp} / pp "
            f"{pp}); each group of experts has as many. Use ep {_divisors(dp)}."
        )


def _divisors(n: int) -> str:
    return ", ".join(str(k) for k in range(1, n + 1) if n % k == 0)
