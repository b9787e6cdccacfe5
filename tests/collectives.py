"""Count what a rank sends: every collective that torch runs, with its size."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils._python_dispatch import TorchDispatchMode

NAMES = {"all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter"}
# they send nothing
LOCAL = ("wait_tensor", "_wrap_tensor_autograd")


class _Counter(TorchDispatchMode):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        room, _, name = func.name().partition("::")
        name = name.partition(".")[0]
        if room in ("_c10d_functional", "c10d") and name not in LOCAL:
            self.seen.append((NAMES.get(name, name), args[0].numel()))
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """Until the block ends, (name, elements that this rank gives) of each collective, in order.

    Counts below autograd, on this thread: a CPU backward and a checkpoint's second computation
    too.
    """
    seen: list[tuple[str, int]] = []
    with _Counter(seen):
        yield seen
