"""From a CUDA source to a cubin: packaged in the wheel, kept in the cache, or compiled by NVRTC.

Needs no GPU, no driver and no torch: setup.py packages by it, and CI compiles every kernel with it.
`loader.py` launches what it gives.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
import os
import re
import secrets
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from hybridzoo.errors import BackendError

# of nvcc and of NVRTC alike; neither takes a function without __device__ for the device's
FLAGS = ("-std=c++17",)

Defines = Mapping[str, str | int]

_log = logging.getLogger("hybridzoo.kernels")
_PACKAGE = Path(__file__).resolve().parents[1]
_INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*["<]([^">\n]+)[">]', re.MULTILINE)
_ERROR = re.compile(r"(^|: |fatal |catastrophic )error( #[\w-]+)?:")
_N_DIGEST = hashlib.sha256().digest_size
_has_warned = False


class Instance(NamedTuple):
    """A line of csrc/packaged.txt: a kernel that setup.py compiles when it is asked to."""

    source: str
    function: str
    defines: dict[str, str]


class Compiler(NamedTuple):
    """NVRTC: its version, or the reason why there is none."""

    version: str
    reason: str | None


def csrc() -> Path:
    """The folder of the sources: inside the package in a wheel, beside it in a checkout."""
    inside = _PACKAGE / "csrc"
    return inside if inside.is_dir() else _PACKAGE.parent / "csrc"


def key(source: str, defines: Defines, arch: str) -> str:
    """Name of a cubin, whoever compiles it: arch, and a digest of what else its code depends on.

    Args:
        source: a path below csrc, as selective_scan/fwd.cu.
        defines: macros and their values.
        arch: as sm_90.
    """
    root = csrc()
    texts = {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in _closure(source)
    }
    macros = {name: str(value) for name, value in defines.items()}
    content = json.dumps([source, texts, macros, FLAGS], sort_keys=True)
    return f"{arch}-{hashlib.sha256(content.encode()).hexdigest()[:32]}"


def cubin(source: str, defines: Defines, arch: str) -> bytes:
    """The code of a source for an arch: packaged, else cached, else compiled now and cached.

    Raises:
        BackendError: there is no compiler, or it does not compile.
    """
    for older in _compatible(arch):
        packaged = csrc() / "cubin" / f"{key(source, defines, older)}.cubin"
        if packaged.is_file():
            return packaged.read_bytes()
    name = f"{key(source, defines, arch)}-nvrtc{find_compiler().version}.cubin"
    code = _read_cached(name)
    if code is None:
        start = time.perf_counter()
        code = compile_source(source, defines, arch)
        _log.info("%s: compiled for %s in %.1f s", source, arch, time.perf_counter() - start)
        _write_cached(name, code)
    return code


def compile_source(source: str, defines: Defines, arch: str) -> bytes:
    """Compile by NVRTC, without looking into the wheel or the cache.

    Raises:
        BackendError: there is no compiler, or it does not compile; the text has the first error.
    """
    compiler = find_compiler()
    if compiler.reason is not None:
        raise BackendError(f"{source}: it cannot be compiled, {compiler.reason}.")
    from cuda.bindings import nvrtc

    path = csrc() / source
    options = [*FLAGS, f"-I{csrc()}", f"-arch={arch}", *(f"-D{k}={v}" for k, v in defines.items())]
    words = [option.encode() for option in options]
    # the path as its name: includes are looked up beside it, and errors name it
    _, program = nvrtc.nvrtcCreateProgram(path.read_bytes(), str(path).encode(), 0, [], [])
    try:
        (result,) = nvrtc.nvrtcCompileProgram(program, len(words), words)
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytearray(nvrtc.nvrtcGetProgramLogSize(program)[1])
            nvrtc.nvrtcGetProgramLog(program, log)
            raise BackendError(
                f"{source}: NVRTC {compiler.version} does not compile it for {arch}: "
                f"{_first_error(log.decode(errors='replace'))}. "
                f"Ask for another backend, as in --kernels {source.split('/')[0]}=reference."
            )
        code = bytearray(nvrtc.nvrtcGetCUBINSize(program)[1])
        nvrtc.nvrtcGetCUBIN(program, code)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return bytes(code)


@functools.cache
def find_compiler() -> Compiler:
    """NVRTC as torch's wheels or the system's CUDA bring it, called through cuda-bindings."""
    try:
        metadata.version("cuda-bindings")
    except metadata.PackageNotFoundError:
        return Compiler("", "cuda-bindings is not installed: pip install 'hybridzoo[cuda]'")
    from cuda.bindings import nvrtc

    # a library that is not found or too old for the bindings is a RuntimeError of theirs
    try:
        _, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError:
        version = metadata.version("cuda-bindings")
        return Compiler(
            "",
            f"no NVRTC library is found for cuda-bindings {version}: "
            f"pip install 'cuda-toolkit[nvrtc]=={version.split('.')[0]}.*'",
        )
    return Compiler(f"{major}.{minor}", None)


def packaged_archs() -> list[str]:
    """The archs of the cubins that came with the wheel, as sm_90."""
    return sorted({path.name.partition("-")[0] for path in (csrc() / "cubin").glob("*.cubin")})


def is_packaged(arch: str) -> bool:
    """Whether some cubin that came with the wheel runs on this arch."""
    return not set(_compatible(arch)).isdisjoint(packaged_archs())


def listed() -> list[Instance]:
    """The lines of csrc/packaged.txt."""
    lines = (
        line.partition("#")[0].split()
        for line in (csrc() / "packaged.txt").read_text().splitlines()
    )
    return [
        Instance(source, function, dict(d.split("=", 1) for d in defines))
        for source, function, *defines in filter(None, lines)
    ]


def cache_folder() -> Path:
    """Where compiled cubins are kept: HYBRIDZOO_CACHE, else below the user's cache.

    Begins with ~ where the user has no home directory; then nothing is kept.
    """
    own, common = os.environ.get("HYBRIDZOO_CACHE"), os.environ.get("XDG_CACHE_HOME")
    text = own or (os.path.join(common, "hybridzoo") if common else "~/.cache/hybridzoo")
    return Path(os.path.expanduser(text)) / "kernels"


def _closure(source: str) -> list[Path]:
    """The source and each header below csrc that it includes, directly or not."""
    root = csrc()
    found: list[Path] = []
    waiting = [root / source]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.append(path)
        for name in _INCLUDE.findall(path.read_bytes()):
            near = (Path(os.path.normpath(f / os.fsdecode(name))) for f in (path.parent, root))
            waiting += [p for p in near if p.is_relative_to(root) and p.is_file()][:1]
    return found


def _compatible(arch: str) -> Iterator[str]:
    """The arch and the older ones of its generation, whose cubins it runs."""
    number = int(arch.removeprefix("sm_"))
    return (f"sm_{n}" for n in range(number, number // 10 * 10 - 1, -1))


def _first_error(log: str) -> str:
    lines = [line for line in log.splitlines() if _ERROR.search(line)]
    return lines[0].rstrip(". \0") if lines else "it gives no reason"


def _read_cached(name: str) -> bytes | None:
    """What the cache holds, its checksum taken off; None where that is nothing or damaged."""
    try:
        content = (cache_folder() / name).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _warn(error)
        return None
    code, digest = content[:-_N_DIGEST], content[-_N_DIGEST:]
    if hashlib.sha256(code).digest() == digest:
        return code
    _log.info("%s: damaged in the cache, so it is compiled again", name)
    return None


def _write_cached(name: str, code: bytes) -> None:
    """Put code into the cache, whole or not at all; where it cannot be, warn and go on."""
    folder = cache_folder()
    # a name of its own, then a rename: processes that race overwrite each other's whole files
    temporary = folder / f".{secrets.token_hex(8)}.tmp"
    try:
        if str(folder).startswith("~"):
            raise FileNotFoundError(errno.ENOENT, "there is no home directory")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            # last, where the tools that disassemble a cubin do not mind it
            temporary.write_bytes(code + hashlib.sha256(code).digest())
            temporary.replace(folder / name)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    except OSError as error:
        _warn(error)


def _warn(error: OSError) -> None:
    global _has_warned
    if _has_warned:
        return
    _has_warned = True
    warnings.warn(
        f"{cache_folder()}: compiled kernels cannot be cached there ({error.strerror}), so each "
        "process compiles its own; set HYBRIDZOO_CACHE to a folder that can be written.",
        RuntimeWarning,
        stacklevel=2,
    )
