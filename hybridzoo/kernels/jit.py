"""Triton as every backend written in it imports it, and the reason where it cannot run.

`from hybridzoo.kernels.jit import available, jit, tl, triton`: without the package a backend's
module still imports, `triton` is None and `available` says so. Kernels launch on the current
device: wrap a launch in `torch.cuda.device_of(x)`.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from hybridzoo.kernels.dispatch import capability

# find_spec, so that a package that is there but broken raises its own error
if importlib.util.find_spec("triton") is None:
    triton: Any = None
else:
    import triton  # type: ignore[no-redef]


class _NoLanguage:
    """What kernels read of triton.language while Python defines them."""

    constexpr = staticmethod(lambda value: value)


def _no_jit(function: Callable[..., Any] | None = None, **_: object) -> Callable[..., Any]:
    """triton.jit without triton: the function itself, with or without options."""
    return function if function is not None else _no_jit


tl: Any = _NoLanguage if triton is None else importlib.import_module("triton.language")
jit: Any = _no_jit if triton is None else triton.jit


def available(device: torch.device) -> str | None:
    """Needs Triton and a CUDA device of capability 8.0."""
    if triton is None:
        return "triton is not installed"
    if device.type != "cuda":
        return f"it needs CUDA, the tensors are on {device.type}"
    if capability(device) < (8, 0):
        return "it needs compute capability 8.0"
    return None
