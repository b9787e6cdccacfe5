"""SIGTERM and SIGINT as values that a loop reads between its steps."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from hybridzoo.parallel.agree import exchange
from hybridzoo.parallel.launched import lose

# a launcher may pass on the signal that the terminal sent too
_ECHO_S = 2.0
_LOOK_S = 0.5


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT until the block ends; the second of a kind acts as usual.

    Among ranks, one that comes because a rank of this host died ends this rank: its step, which
    waits for that rank, would never end.
    """
    caught: list[int] = []
    # Python lets only the main thread handle signals
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before: dict[int, Any] = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)
    }
    seen: dict[int, float] = {}

    def catch(number: int, frame: Any) -> None:
        caught.append(number)
        seen.setdefault(number, time.monotonic())
        if not dist.is_initialized():
            signal.signal(number, before[number])
        elif caught.count(number) > 1 and time.monotonic() > seen[number] + _ECHO_S:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, catch)
    try:
        with _watched():
            yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _watched() -> Iterator[None]:
    """From the first signal on, look whether the other ranks of this host are alive."""
    if not dist.is_initialized():
        yield
        return
    here = socket.gethostname()
    found = exchange((here, os.getpid()))
    peers = [pid for host, pid in found if host == here and _is_alive(pid)]
    told, telling = os.pipe()
    os.set_blocking(telling, False)
    # python's handlers wait until the main thread is back from the GPU: this one does not
    before = signal.set_wakeup_fd(telling, warn_on_full_buffer=False)
    watch = threading.Thread(target=_watch, args=(told, peers), daemon=True)
    watch.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(telling)
        watch.join()
        os.close(told)


def _watch(told: int, peers: list[int]) -> None:
    # blocks until a signal comes, or the run is over and the pipe closed
    while os.read(told, 64):
        while not select.select([told], [], [], _LOOK_S)[0]:
            if not all(map(_is_alive, peers)):
                # gloo tells the main thread too, which knows more
                time.sleep(_ECHO_S)
                lose()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
