"""Run one function on n CPU processes joined by gloo.

The processes are started once a world size and kept, until they have made too many groups. A
failing rank's traceback is raised at once, though the others may be stuck in a collective; a silent
rank is named after TIMEOUT_S. Either way the processes are then killed.
"""

import atexit
import faulthandler
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import get_pg_count

from hybridzoo.comm import Axis, Parallel

TIMEOUT_S = 180
# each keeps threads that wake a hundred times a second: after some tests nothing else would run
MAX_GROUPS = 40

_pools: dict[int, "_Pool"] = {}


def run(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Results of function(parallel, *args) on every rank, in order.

    It is a module's function, all is pickled.
    """
    if world not in _pools:
        _pools[world] = _Pool(world)
    pool = _pools[world]
    try:
        results = pool.call(function, args)
    except BaseException:
        _pools.pop(world).kill()
        raise
    if pool.n_groups > MAX_GROUPS:
        _pools.pop(world).kill()
    return results


class _Pool:
    def __init__(self, world: int) -> None:
        # a server that has torch loaded forks the ranks: quick, and free of this process's threads
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed"])
        self.folder = tempfile.TemporaryDirectory()
        self.pipes: list[Connection] = []
        self.ranks = []
        self.n_groups = 0
        for rank in range(world):
            ours, theirs = context.Pipe()
            where = (theirs, rank, world, f"file://{self.folder.name}/store")
            process = context.Process(target=_serve, args=where, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.ranks.append(process)

    def call(self, function: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        # bytes, not objects: torch would send tensors as shared memory
        message = pickle.dumps((function, args))
        for pipe in self.pipes:
            pipe.send_bytes(message)
        results: dict[int, Any] = {}
        deadline = time.monotonic() + TIMEOUT_S
        while len(results) < len(self.pipes):
            silent = [r for r in range(len(self.pipes)) if r not in results]
            ready = wait([self.pipes[r] for r in silent], max(deadline - time.monotonic(), 0))
            if not ready:
                raise AssertionError(f"no answer from ranks {silent} within {TIMEOUT_S} s")
            for rank in silent:
                if self.pipes[rank] in ready:
                    results[rank] = self.receive(rank)
        return [results[rank] for rank in range(len(self.pipes))]

    def receive(self, rank: int) -> Any:
        try:
            has_failed, result, self.n_groups = pickle.loads(self.pipes[rank].recv_bytes())
        except EOFError:
            self.ranks[rank].join(1)
            raise AssertionError(f"rank {rank} died: {self.ranks[rank].exitcode}") from None
        if has_failed:
            raise AssertionError(f"rank {rank} failed:\n{result}")
        return result

    def kill(self) -> None:
        for process in self.ranks:
            process.kill()
        for process in self.ranks:
            process.join()
        self.folder.cleanup()


def _serve(pipe: Connection, rank: int, world: int, store: str) -> None:
    # a rank that dies in C says where it was
    faulthandler.enable()
    torch.set_num_threads(1)
    # MKL reads it at its first product: its bits then depend on the numbers alone, not on where in
    # memory they lie
    os.environ["MKL_CBWR"] = "AVX2"
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    parallel = Parallel(tp=Axis(rank, world, dist.group.WORLD))
    # the pipe ends when the tests do
    with suppress(EOFError):
        while True:
            function, args = pickle.loads(pipe.recv_bytes())
            try:
                answer = (False, function(parallel, *args))
            except BaseException:
                answer = (True, traceback.format_exc())
            pipe.send_bytes(pickle.dumps((*answer, get_pg_count())))


@atexit.register
def _kill_all() -> None:
    for pool in _pools.values():
        pool.kill()
