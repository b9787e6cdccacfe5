"""Launch the kernels of csrc: `load` gives a function that runs one on torch's current stream.

    kernel = load("selective_scan/fwd.cu", "selective_scan_fwd", {"D_STATE": 16}, x.device)
    kernel((n_tiles, b, 1), 128, shared_bytes, x, dt, None, x.stride(0), scale)

In C the arguments are pointers, `long long` and `float`. The code comes from `sources.py`; it is
launched through the driver that torch has loaded, so a packaged cubin needs no other package.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from hybridzoo.errors import BackendError
from hybridzoo.kernels import sources
from hybridzoo.kernels.dispatch import _constant, capability

# of cuda.h: CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
# CU_STREAM_CAPTURE_MODE_RELAXED
_STATIC_SHARED, _MAX_SHARED, _RELAXED = 1, 8, 2
# static and dynamic bytes that a block may have unasked, on any device
_DEFAULT_SHARED = 48 * 1024

# of struct: pointer, long long, float
_CODES: dict[type, str] = {Tensor: "P", type(None): "P", int: "q", float: "f"}

_kernels: dict[tuple[Any, ...], Kernel] = {}
_lock = threading.Lock()


class Status(NamedTuple):
    """How CUDA sources run on a device; `reason` is why they do not, or None."""

    reason: str | None
    packaged: list[str]
    compiler: str
    cache: str
    n_cached: int


class _Frame(NamedTuple):
    """Memory that a launch reads its arguments from, and which of them are tensors and None."""

    tensors: list[int]
    nulls: list[int]
    values: struct.Struct
    buffer: ctypes.Array[ctypes.c_char]
    pointers: ctypes.Array[ctypes.c_void_p]


class _Frames(threading.local):
    """A thread's own frames, by the types of the arguments."""

    def __init__(self) -> None:
        self.of_thread: dict[tuple[type, ...], _Frame] = {}


class Kernel:
    """One `extern "C" __global__` function on one device; any thread may call it.

    Args:
        code: a cubin.
        source: where it comes from, for errors.
        name: of the function.
        device: with an index.

    Raises:
        BackendError: the driver does not take the code, or it has no such function.
    """

    def __init__(self, code: bytes, source: str, name: str, device: torch.device) -> None:
        self._driver = _driver()
        self._source, self._name, self._device = source, name, device
        self._index = device.index
        self._frames = _Frames()
        self._function = ctypes.c_void_p()
        module, static = ctypes.c_void_p(), ctypes.c_int()
        module_at, static_at, function_at = map(ctypes.byref, (module, static, self._function))
        with torch.cuda.device(device), _while_captured(self._driver):
            _bind_context(self._driver, device.index)
            self._check("not loaded", self._driver.cuModuleLoadData(module_at, code))
            found = self._driver.cuModuleGetFunction(function_at, module, name.encode())
            self._check("not found in the code", found)
            asked = self._driver.cuFuncGetAttribute(static_at, _STATIC_SHARED, self._function)
            self._check("not described", asked)
        self._max_shared = _DEFAULT_SHARED - static.value

    def __call__(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int] | int,
        shared_bytes: int,
        *args: Tensor | int | float | None,
    ) -> None:
        """Launch on the device's current stream; an empty grid launches nothing.

        Args:
            grid: blocks along x, y, z.
            block: threads along x, y, z, or along x.
            shared_bytes: of dynamic shared memory.
            args: a tensor is its pointer, None a null pointer, an int a `long long`, a float a
                `float`.

        Raises:
            BackendError: the arguments are not the kernel's, or the driver refuses the launch.
        """
        if 0 in grid:
            return
        if shared_bytes > self._max_shared:
            self._raise_limit(shared_bytes)
        pointers = self._pack(args)
        if torch.cuda.current_device() == self._index:
            self._launch(grid, block, shared_bytes, pointers)
        else:
            with torch.cuda.device(self._index):
                self._launch(grid, block, shared_bytes, pointers)

    def _launch(self, grid: Any, block: Any, shared_bytes: int, pointers: Any) -> None:
        # the raw handle, without the Stream object around it that takes longer than the launch
        stream = torch._C._cuda_getCurrentRawStream(self._index)
        x, y, z = grid
        threads = (block, 1, 1) if isinstance(block, int) else block
        code = self._driver.cuLaunchKernel(
            self._function, x, y, z, *threads, shared_bytes, stream, pointers, None
        )
        if code:
            shape = f"grid {grid}, block {threads}, {shared_bytes} bytes of shared memory"
            self._check(f"not launched with {shape}", code)

    def _pack(self, args: tuple[Any, ...]) -> Any:
        """Write the arguments where the driver will read them; gives the pointers to them."""
        kinds = tuple(map(type, args))
        frame = self._frames.of_thread.get(kinds)
        if frame is None:
            frame = self._frames.of_thread[kinds] = self._make_frame(kinds)
        values = list(args)
        for i in frame.tensors:
            tensor = args[i]
            if tensor.get_device() != self._index:
                self._raise(f"argument {i} is on {tensor.device}")
            values[i] = tensor.data_ptr()
        for i in frame.nulls:
            values[i] = 0
        frame.values.pack_into(frame.buffer, 0, *values)
        return frame.pointers

    def _make_frame(self, kinds: tuple[type, ...]) -> _Frame:
        """Memory for arguments of these types, once a thread."""
        _bind_context(self._driver, self._index)
        codes = "".join(self._code(i, kind) for i, kind in enumerate(kinds))
        sizes = [struct.calcsize(code) for code in codes]
        self._check_signature(sizes)
        # Python's native alignment is C's
        ends = [struct.calcsize(codes[: i + 1]) for i in range(len(codes))]
        buffer = ctypes.create_string_buffer(max(ends, default=1))
        start = ctypes.addressof(buffer)
        places = [start + end - size for end, size in zip(ends, sizes, strict=True)]
        return _Frame(
            tensors=[i for i, kind in enumerate(kinds) if issubclass(kind, Tensor)],
            nulls=[i for i, kind in enumerate(kinds) if kind is type(None)],
            values=struct.Struct(codes),
            buffer=buffer,
            pointers=(ctypes.c_void_p * len(places))(*places),
        )

    def _code(self, i: int, kind: type) -> str:
        for known, code in _CODES.items():
            if issubclass(kind, known):
                return code
        self._raise(f"argument {i} is a {kind.__name__}, no tensor, int, float or None")

    def _check_signature(self, sizes: list[int]) -> None:
        """Compare with what the compiled function takes; drivers before CUDA 12.4 cannot say."""
        ask = getattr(self._driver, "cuFuncGetParamInfo", None)
        if ask is None:
            return
        theirs: list[int] = []
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        while not ask(
            self._function,
            ctypes.c_size_t(len(theirs)),
            ctypes.byref(offset),
            ctypes.byref(size),
        ):
            theirs.append(size.value)
        if theirs != sizes:
            self._raise(f"it takes arguments of {theirs} bytes and was given {sizes}")

    def _raise_limit(self, shared_bytes: int) -> None:
        """Raise the kernel's limit of dynamic shared memory; once a size, so usually once."""
        with _lock, torch.cuda.device(self._index):
            # another thread may have gone higher
            wanted = max(shared_bytes, self._max_shared)
            _bind_context(self._driver, self._index)
            code = self._driver.cuFuncSetAttribute(self._function, _MAX_SHARED, wanted)
            self._check(f"not given {shared_bytes} bytes of shared memory", code)
            self._max_shared = wanted

    def _check(self, what: str, code: int) -> None:
        if code:
            self._raise(f"{what} by the driver ({_words(self._driver, code)})")

    def _raise(self, what: str) -> NoReturn:
        op = self._source.split("/")[0]
        raise BackendError(
            f"{self._source}: {self._name} on {self._device}: {what}. "
            f"Ask for another backend, as in --kernels {op}=reference."
        )


def load(source: str, name: str, defines: sources.Defines, device: torch.device) -> Kernel:
    """A kernel, ready to launch; made once in the process, in seconds if it must be compiled.

    Args:
        source: a path below csrc, as selective_scan/fwd.cu.
        name: of an `extern "C" __global__` function in it.
        defines: macros and their values.
        device: a CUDA device; without an index it is the current one.

    Raises:
        BackendError: it cannot be compiled, or the driver does not take it.
    """
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    key = (source, name, frozenset(defines.items()), device)
    kernel = _kernels.get(key)
    if kernel is None:
        with _lock:
            kernel = _kernels.get(key)
            if kernel is None:
                code = sources.cubin(source, defines, _arch(device))
                kernel = _kernels[key] = Kernel(code, source, name, device)
    return kernel


# a graph being traced takes the answer as a constant: it cannot look for packages and files
@_constant
def available(device: torch.device) -> str | None:
    """Needs a CUDA device of capability 8.0, and a compiler or a cubin that came packaged."""
    if device.type != "cuda":
        return f"it needs CUDA, the tensors are on {device.type}"
    if capability(device) < (8, 0):
        return "it needs compute capability 8.0"
    return _why_no_code(_arch(device))


def status(device: torch.device) -> Status:
    """What `hybridzoo doctor` says about the sources of csrc."""
    folder, compiler = sources.cache_folder(), sources.find_compiler()
    n_cached = len(list(folder.glob("*.cubin")))
    packaged = sources.packaged_archs()
    return Status(available(device), packaged, compiler.version, str(folder), n_cached)


def _arch(device: torch.device) -> str:
    major, minor = capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def _why_no_code(arch: str) -> str | None:
    return None if sources.is_packaged(arch) else sources.find_compiler().reason


@functools.cache
def _driver() -> Any:
    driver = ctypes.CDLL("libcuda.so.1")
    unsigned, pointer = ctypes.c_uint, ctypes.c_void_p
    driver.cuLaunchKernel.argtypes = [pointer, *[unsigned] * 7, pointer, pointer, pointer]
    return driver


def _words(driver: Any, code: int) -> str:
    words = [ctypes.c_char_p(), ctypes.c_char_p()]
    driver.cuGetErrorName(code, ctypes.byref(words[0]))
    driver.cuGetErrorString(code, ctypes.byref(words[1]))
    return ": ".join((word.value or b"unknown").decode() for word in words)


def _bind_context(driver: Any, index: int) -> None:
    """Give a thread that has called nothing of CUDA yet the context that torch uses."""
    context = ctypes.c_void_p()
    driver.cuCtxGetCurrent(ctypes.byref(context))
    if context.value is None:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), index)
        driver.cuCtxSetCurrent(context)


@contextmanager
def _while_captured(driver: Any) -> Iterator[None]:
    """Let this thread load code while a CUDA graph is captured; that work is not the graph's."""
    mode = ctypes.c_int(_RELAXED)
    driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
