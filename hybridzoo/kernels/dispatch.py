"""Pick one backend of an op for these inputs, or the one asked for, and be able to say why."""

import difflib
import importlib
import os
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar, cast

import torch

from hybridzoo.errors import BackendError

F = TypeVar("F", bound=Callable[..., Any])

ENV_NAME = "HYBRIDZOO_KERNELS"

_OPS: dict[str, "Op"] = {}
# op name -> backend name that was asked for; of the process, not of a thread
_asked: dict[str, str] = {}


class Backend(Protocol):
    """What a backend's module holds."""

    def available(self, device: torch.device) -> str | None:
        """Why this backend cannot run on `device` at all (not installed, needs CUDA), or None."""

    def why_not(self, *args: Any, **kwargs: Any) -> str | None:
        """Why this backend cannot run on these inputs, or None; calls `available` first.

        Reads dtypes, device, capability, static widths and which optional arguments are None:
        never a batch, a length or a value, which would make compiled graphs specialise.
        """

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The op itself."""


class Row(NamedTuple):
    """One line of an explanation: `reason` is None where the backend could run."""

    op: str
    backend: str
    reason: str | None
    chosen: bool


class Op:
    """An op's backends in order of preference; calling it runs the first that can.

    Args:
        name: the op's name, also the key of `use` and of HYBRIDZOO_KERNELS.
        backends: backend name -> path of its module, best first.
    """

    def __init__(self, name: str, backends: dict[str, str]) -> None:
        self.name = name
        self.backends = tuple(backends)
        self._paths = dict(backends)
        self._modules: dict[str, Backend] = {}
        _OPS[name] = self

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the backend that `pick` names."""
        backend = self.load(self.pick(x, *args, **kwargs))
        # an op rounds where its contract says; autocast would round the products inside it as well
        with no_autocast(x.device):
            return backend.run(x, *args, **kwargs)

    def contract(self, function: F) -> F:
        """Decorator of the op's one public function: `function.op` is this op."""
        function.op = self  # type: ignore[attr-defined]
        return function

    def load(self, backend: str) -> Backend:
        """The module of one backend; one that is missing from our own tree raises ImportError."""
        if backend not in self._paths:
            _raise_unknown(f"{self.name}: backend", backend, self.backends)
        _import_backends(self.name)
        return self._modules[backend]

    def pick(self, *args: Any, **kwargs: Any) -> str:
        """Name of the backend that runs on these inputs.

        Raises:
            BackendError: none can, or the one that was asked for cannot.
        """
        asked = _asked.get(self.name)
        if asked is not None:
            reason = self.load(asked).why_not(*args, **kwargs)
            if reason is None:
                return asked
            _raise_cannot(self.explain(*args, **kwargs), asked, reason)
        for backend in self.backends:
            if self.load(backend).why_not(*args, **kwargs) is None:
                return backend
        _raise_cannot(self.explain(*args, **kwargs), None, "")

    def explain(self, *args: Any, **kwargs: Any) -> list[Row]:
        """One row a backend for these inputs."""
        return self._rows([self.load(b).why_not(*args, **kwargs) for b in self.backends])

    def explain_device(self, device: torch.device) -> list[Row]:
        """One row a backend for any inputs on `device`."""
        return self._rows([self.load(b).available(device) for b in self.backends])

    def _rows(self, reasons: list[str | None]) -> list[Row]:
        able = [b for b, reason in zip(self.backends, reasons, strict=True) if reason is None]
        asked = _asked.get(self.name)
        chosen = able[0] if able and asked is None else asked if asked in able else None
        return [
            Row(self.name, b, reason, b == chosen)
            for b, reason in zip(self.backends, reasons, strict=True)
        ]


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which torch.autocast, if the caller is under it, leaves products as they are."""
    if autocast_dtype(device) is None:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def needs_gradient(*inputs: torch.Tensor | None) -> bool:
    """Whether autograd records a call with these inputs."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What torch.autocast casts products to here, or None where the caller is not under it."""
    # torch refuses the question for devices such as "meta"
    if _has_autocast(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


@contextmanager
def use(**backends: str) -> Iterator[None]:
    """Ask for backends by name, as in ssd="triton", until the `with` block ends.

    The choice is of the process: threads share it, and it outranks `set_backends` and the
    environment while the block runs.

    Raises:
        BackendError: an op or backend of that name does not exist.
    """
    before = dict(_asked)
    set_backends(backends)
    try:
        yield
    finally:
        _asked.clear()
        _asked.update(before)


def set_backends(backends: dict[str, str]) -> None:
    """Ask for backends by name from now on (the CLI's `--kernels`).

    Raises:
        BackendError: an op or backend of that name does not exist; then nothing is set.
    """
    for name, backend in backends.items():
        find_op(name).load(backend)
    _asked.update(backends)


def parse_backends(text: str, where: str = "--kernels") -> dict[str, str]:
    """Read `ssd=triton,attention=sdpa`; names are checked when they are set.

    Raises:
        BackendError: a part is not `op=backend`.
    """
    found = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, backend = part.partition("=")
        if not (name and equals and backend):
            raise BackendError(f"{where}: {part!r} is not op=backend; write ssd=reference.")
        found[name.strip()] = backend.strip()
    return found


def list_ops() -> list[str]:
    """Names of every op: the folders of this package, and any `Op` made outside it."""
    here = importlib.import_module("hybridzoo.kernels").__path__
    return sorted({m.name for m in pkgutil.iter_modules(here) if m.ispkg} | set(_OPS))


def find_op(name: str) -> Op:
    """The op called `name`, imported if need be.

    Raises:
        BackendError: there is none; the message names the nearest.
    """
    if name not in list_ops():
        _raise_unknown("kernels: op", name, list_ops())
    if name not in _OPS:
        importlib.import_module(f"hybridzoo.kernels.{name}")
    return _OPS[name]


def explain(device: torch.device | str) -> list[Row]:
    """One row a backend of every op: what would run on `device`, and why the others would not."""
    where = torch.device(device)
    return [row for name in list_ops() for row in find_op(name).explain_device(where)]


def _constant(function: F) -> F:
    """Let a graph being traced take the function's result as a constant.

    torch.compiler.assume_constant_result sets this very mark, but imports the compiler to do so,
    which costs every command more than a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# a graph being traced cannot import: it takes the result of these two as constants, and only then
# reads the modules, so the first call of an op may well be a compiled one
@_constant
def _import_backends(name: str) -> bool:
    op = _OPS[name]
    if not op._modules:
        op._modules = {b: cast(Backend, importlib.import_module(p)) for b, p in op._paths.items()}
    return True


@_constant
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device, usable in `why_not` under torch.compile."""
    return torch.cuda.get_device_capability(device)


@_constant
def _has_autocast(device_type: str) -> bool:
    # torch 2.11 cannot trace the question, and the answer never changes
    return torch.amp.is_autocast_available(device_type)


def _raise_unknown(what: str, name: str, legal: Iterable[str]) -> NoReturn:
    names = list(legal)
    near = difflib.get_close_matches(name, names, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise BackendError(f"{what} {name!r} does not exist; there are: {', '.join(names)}.{hint}")


def _raise_cannot(rows: list[Row], asked: str | None, reason: str) -> NoReturn:
    op = rows[0].op
    able = [row.backend for row in rows if row.reason is None]
    if asked is not None and able:
        raise BackendError(
            f"{op}: backend {asked!r} was asked for but {reason}. "
            f"Drop the request; {able[0]!r} supports it."
        )
    reasons = "; ".join(f"{row.backend!r}: {row.reason}" for row in rows)
    raise BackendError(f"{op}: no backend supports these inputs; {reasons}.")


def _read_environment() -> dict[str, str]:
    asked = parse_backends(os.environ.get(ENV_NAME, ""), ENV_NAME)
    legal = list_ops()
    # an op's backends are checked when it first runs: its module may be the one importing this
    for name in asked:
        if name not in legal:
            _raise_unknown(f"{ENV_NAME}: op", name, legal)
    return asked


_asked.update(_read_environment())
