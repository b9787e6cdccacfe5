"""Launches of csrc's kernels: what the driver is given, and on a GPU what it makes of it."""

import ctypes
import struct
import threading
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import pytest
import torch

from hybridzoo.errors import BackendError
from hybridzoo.kernels import loader, sources
from tests.kernels.csrc import DEFINES, SOURCE, make_root

# the parameters of axpy: three pointers, long long, float
SIZES = [8, 8, 8, 8, 4]
CUDA = torch.device("cuda", 0)


class OnTheHost(NamedTuple):
    """Stands for a CUDA device: its index is what CPU tensors have."""

    index: int = -1

    def __str__(self) -> str:
        return "cuda:0"


class Driver:
    """A driver that notes launches; `codes` are what its functions return, 0 unless set."""

    def __init__(self):
        self.launches, self.limits, self.codes = [], [], {}
        self.has_context = True
        self.bound = 0
        self.barrier = None

    def cuCtxGetCurrent(self, at):
        at._obj.value = 1 if self.has_context else None

    def cuDevicePrimaryCtxRetain(self, at, index):
        at._obj.value = 7

    def cuCtxSetCurrent(self, context):
        assert context.value == 7
        self.bound += 1

    def cuThreadExchangeStreamCaptureMode(self, at):
        pass

    def cuModuleLoadData(self, at, code):
        return self.codes.get("load", 0)

    def cuModuleGetFunction(self, at, module, name):
        return self.codes.get("function", 0)

    def cuFuncGetAttribute(self, at, attribute, function):
        at._obj.value = {1: 256}[attribute]
        return 0

    def cuFuncSetAttribute(self, function, attribute, value):
        self.limits.append((attribute, value))
        return self.codes.get("limit", 0)

    def cuFuncGetParamInfo(self, function, i, offset, size):
        if i.value >= len(SIZES):
            return 1
        size._obj.value = SIZES[i.value]
        return 0

    def cuLaunchKernel(self, function, *rest):
        *shape, stream, pointers, extra = rest
        if self.barrier:
            self.barrier.wait()
        kinds = [{4: "f", 8: "q"}[size] for size in SIZES]
        assert len(pointers) == len(SIZES) and extra is None
        values = [
            struct.unpack(kind, ctypes.string_at(at, size))[0]
            for kind, at, size in zip(kinds, pointers, SIZES, strict=True)
        ]
        self.launches.append((shape, stream, values))
        return self.codes.get("launch", 0)

    def cuGetErrorName(self, code, at):
        at._obj.value = b"CUDA_ERROR_INVALID_VALUE"

    def cuGetErrorString(self, code, at):
        at._obj.value = b"invalid argument"


def in_threads(functions):
    """Call each in a thread of its own, at once."""
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "_kernels", {})
    return make_root(tmp_path, monkeypatch)


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(loader, "_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda i: 77, raising=False)
    return driver


@pytest.fixture
def kernel(driver):
    return loader.Kernel(b"code", SOURCE, "axpy", OnTheHost())


# without a GPU


def test_arguments_reach_the_driver_as_c_has_them(kernel, driver):
    y, x = torch.zeros(4), torch.zeros(4)
    kernel((5, 6, 7), 128, 1024, y, x[2:], None, -(2**40), 0.5)
    kernel((1, 1, 1), (8, 4, 2), 0, y, x, y, 3, -1.0)
    first, second = driver.launches
    pointers = [y.data_ptr(), x.data_ptr() + 8, 0]
    assert first == ([5, 6, 7, 128, 1, 1, 1024], 77, [*pointers, -(2**40), 0.5])
    pointers = [y.data_ptr(), x.data_ptr(), y.data_ptr()]
    assert second == ([1, 1, 1, 8, 4, 2, 0], 77, [*pointers, 3, -1.0])


def test_empty_grid_launches_nothing(kernel, driver):
    kernel((4, 0, 1), 128, 0, torch.zeros(0), torch.zeros(0), None, 0, 1.0)
    assert not driver.launches


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((None, None, None, 1), r"takes arguments of \[8, 8, 8, 8, 4\] bytes and was given"),
        ((None, None, None, 1, 1), r"and was given \[8, 8, 8, 8, 8\]"),
        ((None, None, None, 1, 1.0, 1), r"and was given \[8, 8, 8, 8, 4, 8\]"),
        ((None, None, None, "1", 1.0), "argument 3 is a str, no tensor, int, float or None"),
        (([1], None), "argument 0 is a list"),
    ],
)
def test_arguments_that_are_not_the_kernels_are_refused(kernel, driver, arguments, words):
    with pytest.raises(BackendError, match=words):
        kernel((1, 1, 1), 32, 0, *arguments)
    assert not driver.launches


def test_driver_that_cannot_describe_a_kernel_is_enough(kernel, driver, monkeypatch):
    monkeypatch.delattr(Driver, "cuFuncGetParamInfo")
    kernel((1, 1, 1), 32, 0, None, None, None, 1, 1.0)
    assert len(driver.launches) == 1


def test_tensor_on_another_device_is_refused(driver):
    kernel = loader.Kernel(b"code", SOURCE, "axpy", CUDA)
    with pytest.raises(BackendError, match="axpy on cuda:0: argument 1 is on cpu"):
        kernel((1, 1, 1), 32, 0, None, torch.zeros(2), None, 1, 1.0)
    assert not driver.launches


def test_shared_memory_beyond_the_default_is_asked_for_once_a_size(kernel, driver):
    arguments = (None, None, None, 1, 1.0)
    # axpy's static array has 256 of the 48 KiB that need no asking
    for shared in (0, 48 * 1024 - 256, 48 * 1024, 48 * 1024, 90_000, 60_000, 90_000):
        kernel((1, 1, 1), 32, shared, *arguments)
    assert driver.limits == [(8, 48 * 1024), (8, 90_000)]
    driver.codes["limit"] = 1
    with pytest.raises(BackendError, match=r"not given 999999 bytes .*invalid argument\)"):
        kernel((1, 1, 1), 32, 999_999, *arguments)
    driver.codes["limit"] = 0
    kernel((1, 1, 1), 32, 999_999, *arguments)
    assert driver.limits[-1] == (8, 999_999)


def test_refused_launch_has_the_drivers_words_and_the_way_out(kernel, driver):
    driver.codes["launch"] = 1
    with pytest.raises(BackendError) as caught:
        kernel((1, 2, 3), 2048, 64, None, None, None, 1, 1.0)
    assert str(caught.value) == (
        "axpy/fwd.cu: axpy on cuda:0: not launched with grid (1, 2, 3), block (2048, 1, 1), 64 "
        "bytes of shared memory by the driver (CUDA_ERROR_INVALID_VALUE: invalid argument). "
        "Ask for another backend, as in --kernels axpy=reference."
    )


@pytest.mark.parametrize(("what", "words"), [("load", "not loaded"), ("function", "not found")])
def test_code_that_the_driver_does_not_take(driver, what, words):
    driver.codes[what] = 1
    with pytest.raises(BackendError, match=f"axpy on cuda:0: {words}.* by the driver"):
        loader.Kernel(b"code", SOURCE, "axpy", OnTheHost())


def test_threads_do_not_write_over_each_other(kernel, driver):
    driver.barrier = threading.Barrier(4, timeout=30)
    in_threads([partial(kernel, (1, 1, 1), 32, 0, *[None] * 3, n, float(n)) for n in range(4)])
    found = sorted(values[3:] for _, _, values in driver.launches)
    assert found == [[n, float(n)] for n in range(4)]


def test_thread_without_a_context_is_given_torchs(kernel, driver):
    arguments = (None, None, None, 1, 1.0)
    kernel((1, 1, 1), 32, 0, *arguments)
    assert driver.bound == 0
    driver.has_context = False
    in_threads([partial(kernel, (1, 1, 1), 32, 0, *arguments)])
    assert driver.bound == 1
    assert len(driver.launches) == 2


def test_kernel_is_made_once_a_source_name_macros_and_device(root, driver, monkeypatch):
    monkeypatch.setattr(loader, "capability", lambda device: (9, 0))
    made = []
    monkeypatch.setattr(sources, "cubin", lambda *a: made.append(a) or b"code")
    first = loader.load(SOURCE, "axpy", DEFINES, CUDA)
    backwards = dict(reversed(DEFINES.items()))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert loader.load(SOURCE, "axpy", backwards, CUDA) is first
    assert loader.load(SOURCE, "axpy", DEFINES, torch.device("cuda")) is first
    assert made == [(SOURCE, DEFINES, "sm_90")]
    others = [
        loader.load("other.cu", "axpy", DEFINES, CUDA),
        loader.load(SOURCE, "other", DEFINES, CUDA),
        loader.load(SOURCE, "axpy", {**DEFINES, "STRIDE": 2}, CUDA),
        loader.load(SOURCE, "axpy", DEFINES, torch.device("cuda", 1)),
    ]
    assert len({first, *others}) == 5


def test_threads_that_load_at_once_compile_once(root, driver, monkeypatch):
    monkeypatch.setattr(loader, "capability", lambda device: (9, 0))
    made, found = [], []

    def compile_slowly(*arguments):
        made.append(arguments)
        threading.Event().wait(0.1)
        return b"code"

    monkeypatch.setattr(sources, "cubin", compile_slowly)
    in_threads([lambda: found.append(loader.load(SOURCE, "axpy", DEFINES, CUDA))] * 4)
    assert len(made) == 1
    assert len(found) == 4 and len(set(found)) == 1


@pytest.fixture
def device_of(monkeypatch):
    """A CUDA device of some capability, where NVRTC is or is not."""
    missing = sources.Compiler("", "cuda-bindings is not installed")

    def make(capability, has_compiler):
        loader._why_no_code.cache_clear()
        monkeypatch.setattr(loader, "capability", lambda device: capability)
        compiler = sources.Compiler("13.0", None) if has_compiler else missing
        monkeypatch.setattr(sources, "find_compiler", lambda: compiler)
        return CUDA

    yield make
    loader._why_no_code.cache_clear()


def test_reason_of_a_device_that_cannot_run_sources(root, device_of):
    assert loader.available(torch.device("cpu")) == "it needs CUDA, the tensors are on cpu"
    assert loader.available(device_of((7, 5), True)) == "it needs compute capability 8.0"
    assert loader.available(device_of((9, 0), True)) is None
    assert loader.available(device_of((9, 0), False)) == "cuda-bindings is not installed"
    (root / "cubin").mkdir()
    (root / "cubin" / f"{sources.key(SOURCE, DEFINES, 'sm_90')}.cubin").touch()
    assert loader.available(device_of((9, 0), False)) is None
    assert loader.available(device_of((8, 0), False)) == "cuda-bindings is not installed"


def test_reason_is_a_constant_of_a_traced_graph(root, device_of):
    device_of((9, 0), True)

    def why(x):
        return x + (0 if loader.available(CUDA) is None else 1)

    assert torch.compile(why, fullgraph=True, backend="eager")(torch.zeros(1)).item() == 0


# on a GPU

gpu = pytest.mark.gpu


@pytest.fixture
def cuda(root):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return torch.device("cuda", torch.cuda.current_device())


def run_axpy(kernel, y, x, bias=None, a=2.0, shared_bytes=None):
    n = y.numel()
    kernel(((n + 127) // 128, 1, 1), 128, shared_bytes or 4 * 128, y, x, bias, n, a)


@gpu
def test_kernel_computes(cuda):
    x, bias = torch.randn(2, 1000, device=cuda)
    y = torch.ones(1000, device=cuda)
    kernel = loader.load(SOURCE, "axpy", DEFINES, cuda)
    run_axpy(kernel, y, x)
    torch.testing.assert_close(y, 1 + 2 * x)
    run_axpy(kernel, y, x, bias, a=-2.0)
    torch.testing.assert_close(y, 1 + bias)


@gpu
def test_more_than_48_kilobytes_of_shared_memory(cuda):
    x, y = torch.randn(1000, device=cuda), torch.zeros(1000, device=cuda)
    # thread 127's element ends at the last of these bytes
    shared_bytes = (127 * 180 + 1) * 4
    assert shared_bytes > 90_000
    kernel = loader.load(SOURCE, "axpy", {**DEFINES, "STRIDE": 180}, cuda)
    run_axpy(kernel, y, x, shared_bytes=shared_bytes)
    torch.testing.assert_close(y, 2 * x)
    # above the default only together with axpy's static array
    other = loader.load(SOURCE, "axpy", DEFINES, cuda)
    run_axpy(other, y, x, shared_bytes=48 * 1024)
    torch.testing.assert_close(y, 4 * x)
    with pytest.raises(BackendError, match="bytes of shared memory"):
        run_axpy(kernel, y, x, shared_bytes=2**20)


@gpu
def test_graph_that_loads_and_launches_while_captured(cuda):
    x, y = torch.randn(1000, device=cuda), torch.zeros(1000, device=cuda)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel = loader.load(SOURCE, "axpy", {**DEFINES, "STRIDE": 180}, cuda)
        run_axpy(kernel, y, x, shared_bytes=(127 * 180 + 1) * 4)
        run_axpy(kernel, y, x, shared_bytes=(127 * 180 + 1) * 4)
    assert not y.any()
    for n in (1, 2):
        graph.replay()
        torch.testing.assert_close(y, 4.0 * n * x)


@gpu
def test_launch_is_on_torchs_stream(cuda):
    x, y = torch.ones(1000, device=cuda), torch.zeros(1000, device=cuda)
    kernel = loader.load(SOURCE, "axpy", DEFINES, cuda)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        y.fill_(1)
        run_axpy(kernel, y, x)
    stream.synchronize()
    assert (y == 3).all()


@gpu
def test_launch_from_a_thread_that_is_new_to_cuda(cuda):
    x, y = torch.ones(1000, device=cuda), torch.zeros(1000, device=cuda)
    kernel = loader.load(SOURCE, "axpy", DEFINES, cuda)
    in_threads([partial(run_axpy, kernel, y, x)])
    assert (y == 2).all()


@gpu
def test_refused_launch_and_wrong_arguments_leave_the_device_well(cuda):
    x, y = torch.ones(1000, device=cuda), torch.zeros(1000, device=cuda)
    kernel = loader.load(SOURCE, "axpy", DEFINES, cuda)
    with pytest.raises(BackendError, match=r"block \(2048, 1, 1\).*CUDA_ERROR_INVALID_VALUE"):
        kernel((1, 1, 1), 2048, 0, y, x, None, 1000, 2.0)
    with pytest.raises(BackendError, match=r"takes arguments of \[8, 8, 8, 8, 4\] bytes"):
        kernel((1, 1, 1), 128, 0, y, x, None, 1000, 2)
    with pytest.raises(BackendError, match="argument 1 is on cpu"):
        kernel((1, 1, 1), 128, 0, y, x.cpu(), None, 1000, 2.0)
    with pytest.raises(BackendError, match="not_there on cuda:0: not found in the code"):
        loader.load(SOURCE, "not_there", DEFINES, cuda)
    run_axpy(kernel, y, x)
    assert (y == 2).all()


@gpu
@pytest.mark.multi_gpu
def test_kernel_runs_on_a_device_that_is_not_the_current_one(root):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x, y = (torch.ones(1000, device="cuda:1") for _ in range(2))
    run_axpy(loader.load(SOURCE, "axpy", DEFINES, x.device), y, x)
    assert torch.cuda.current_device() == 0
    assert (y == 3).all()
