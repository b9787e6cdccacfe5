"""From a CUDA source to a cubin: the compiler, the key, the cache, what came packaged."""

import errno
import hashlib
import logging
import os
import re
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

import pytest

from hybridzoo.errors import BackendError
from hybridzoo.kernels import sources
from tests.kernels.csrc import DEFINES, SOURCE, make_root

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def root(tmp_path, monkeypatch):
    return make_root(tmp_path, monkeypatch)


@pytest.fixture
def compiled(monkeypatch):
    """The arch of each compilation from here on."""
    archs = []
    compile_source = sources.compile_source

    def record(source, defines, arch):
        archs.append(arch)
        return compile_source(source, defines, arch)

    monkeypatch.setattr(sources, "compile_source", record)
    return archs


def in_processes(n: int, code: str, *arguments) -> list[str]:
    """What n processes print that run `code` at once."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(n)
    ]
    done = [(*process.communicate(timeout=120), process.returncode) for process in running]
    assert [(error, code) for _, error, code in done] == [("", 0)] * n
    return [out for out, *_ in done]


# the compiler


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_source_compiles_without_a_gpu(root, arch):
    code = sources.compile_source(SOURCE, DEFINES, arch)
    assert code.startswith(b"\x7fELF")
    assert b"axpy" in code
    assert int.from_bytes(code[18:20], "little") == 190  # EM_CUDA


def test_macros_and_arch_reach_the_compiler(root):
    codes = {
        sources.compile_source(SOURCE, DEFINES, "sm_80"),
        sources.compile_source(SOURCE, DEFINES, "sm_90"),
        sources.compile_source(SOURCE, {**DEFINES, "SCALE": "2.0f"}, "sm_90"),
    }
    assert len(codes) == 3


def test_error_of_the_compiler_is_its_first_line(root):
    with pytest.raises(BackendError) as caught:
        sources.cubin(SOURCE, {"STRIDE": 1}, "sm_90")
    text = str(caught.value)
    assert text.startswith(f"{SOURCE}: NVRTC ")
    assert 'inner.cuh(1): error: identifier "SCALE" is undefined' in text
    assert text.endswith("Ask for another backend, as in --kernels axpy=reference.")
    assert text.count("error: ") == 1
    assert not list(sources.cache_folder().glob("*"))


def test_warning_before_the_error_is_not_the_reason(root):
    path = root / SOURCE
    head = "__device__ void f() { int error; }\n"
    path.write_text(head + path.read_text().replace("scaled(a)", "undefined_name"))
    with pytest.raises(BackendError, match='identifier "undefined_name" is undefined'):
        sources.cubin(SOURCE, DEFINES, "sm_90")


def test_arch_that_the_compiler_does_not_know_is_named(root):
    with pytest.raises(BackendError, match=r"for sm_999: .*invalid value for --gpu-architecture"):
        sources.cubin(SOURCE, DEFINES, "sm_999")


def test_missing_compiler_is_a_reason_with_the_way_out(root, monkeypatch):
    from cuda.bindings import nvrtc

    def missing(*_):
        raise RuntimeError("libnvrtc was not found")

    monkeypatch.setattr(nvrtc, "nvrtcVersion", missing)
    reason = sources.find_compiler.__wrapped__().reason
    major = metadata.version("cuda-bindings").split(".")[0]
    assert f"pip install 'cuda-toolkit[nvrtc]=={major}.*'" in reason

    def not_installed(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", not_installed)
    found = sources.find_compiler.__wrapped__()
    assert found.reason == "cuda-bindings is not installed: pip install 'hybridzoo[cuda]'"
    monkeypatch.setattr(sources, "find_compiler", lambda: found)
    with pytest.raises(BackendError, match="cuda-bindings is not installed"):
        sources.cubin(SOURCE, DEFINES, "sm_90")


# the key


@pytest.mark.parametrize(
    "name", ["axpy/fwd.cu", "axpy/near.cuh", "common/outer.cuh", "common/inner.cuh"]
)
def test_key_changes_with_every_file_that_is_included(root, name):
    before = sources.key(SOURCE, DEFINES, "sm_90")
    (root / name).write_text((root / name).read_text() + "\n")
    assert sources.key(SOURCE, DEFINES, "sm_90") != before


def test_key_changes_with_macros_arch_and_flags_only(root, monkeypatch):
    before = sources.key(SOURCE, DEFINES, "sm_90")
    assert re.fullmatch(r"sm_90-[0-9a-f]{32}", before)
    (root / "axpy" / "other.cuh").write_text("changed")
    assert sources.key(SOURCE, {"SCALE": "1.0f", "STRIDE": "1"}, "sm_90") == before
    monkeypatch.setattr(sources, "find_compiler", lambda: sources.Compiler("99.9", None))
    assert sources.key(SOURCE, DEFINES, "sm_90") == before
    keys = {
        before,
        sources.key(SOURCE, {**DEFINES, "STRIDE": 2}, "sm_90"),
        sources.key(SOURCE, {**DEFINES, "MORE": 1}, "sm_90"),
        sources.key(SOURCE, DEFINES, "sm_80"),
    }
    monkeypatch.setattr(sources, "FLAGS", ("-std=c++17", "-lineinfo"))
    keys.add(sources.key(SOURCE, DEFINES, "sm_90"))
    assert len(keys) == 5


# the cache


def test_second_use_reads_the_cache_and_only_the_first_says_so(root, compiled, caplog, capfd):
    caplog.set_level(logging.INFO, "hybridzoo.kernels")
    first = sources.cubin(SOURCE, DEFINES, "sm_90")
    assert re.fullmatch(r"axpy/fwd\.cu: compiled for sm_90 in \d+\.\d s", caplog.messages[0])
    assert sources.cubin(SOURCE, DEFINES, "sm_90") == first
    assert compiled == ["sm_90"]
    assert len(caplog.messages) == 1
    assert capfd.readouterr() == ("", "")
    sources.cubin(SOURCE, DEFINES, "sm_80")
    assert compiled == ["sm_90", "sm_80"]


def test_cache_belongs_to_one_version_of_the_compiler(root, compiled, monkeypatch):
    sources.cubin(SOURCE, DEFINES, "sm_90")
    monkeypatch.setattr(sources, "find_compiler", lambda: sources.Compiler("99.9", None))
    sources.cubin(SOURCE, DEFINES, "sm_90")
    assert len(compiled) == 2
    assert len(list(sources.cache_folder().glob("*.cubin"))) == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "lengthened"])
def test_damaged_file_is_compiled_again(root, compiled, damage):
    code = sources.cubin(SOURCE, DEFINES, "sm_90")
    (path,) = sources.cache_folder().iterdir()
    whole = path.read_bytes()
    assert whole == code + hashlib.sha256(code).digest()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    changed = {"cut": whole[:-1], "flipped": flipped, "empty": b"", "lengthened": whole + b"x"}
    path.write_bytes(changed[damage])
    assert sources.cubin(SOURCE, DEFINES, "sm_90") == code
    assert len(compiled) == 2
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("own", "common", "expected"),
    [
        ("/own", "/common", "/own/kernels"),
        ("~/own", "/common", "/home/me/own/kernels"),
        ("", "/common", "/common/hybridzoo/kernels"),
        ("", "", "/home/me/.cache/hybridzoo/kernels"),
    ],
)
def test_folder_is_ours_then_the_users(monkeypatch, own, common, expected):
    monkeypatch.setenv("HYBRIDZOO_CACHE", own)
    monkeypatch.setenv("XDG_CACHE_HOME", common)
    monkeypatch.setenv("HOME", "/home/me")
    assert sources.cache_folder() == Path(expected)


def check_works_from_memory(place: str, reason: str) -> None:
    """Two kernels compile, with one warning that names the place and the way out."""
    with pytest.warns(RuntimeWarning) as told:
        codes = [sources.cubin(SOURCE, DEFINES, arch) for arch in ("sm_80", "sm_90")]
    assert all(code.startswith(b"\x7fELF") for code in codes)
    assert len(told) == 1
    text = str(told[0].message)
    assert text.startswith(f"{place}: ")
    assert reason in text
    assert "set HYBRIDZOO_CACHE" in text


def test_file_in_the_way_of_the_folder(root, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HYBRIDZOO_CACHE", str(tmp_path / "file"))
    check_works_from_memory(f"{tmp_path}/file/kernels", "Not a directory")


# root may write wherever it likes, so these three failures are made
def test_read_only_folder(root, tmp_path, monkeypatch):
    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    check_works_from_memory(f"{tmp_path}/cache/kernels", "Read-only file system")


def test_unreadable_file(root, tmp_path, monkeypatch):
    sources.cubin(SOURCE, DEFINES, "sm_80")
    (path,) = sources.cache_folder().iterdir()
    path.unlink()
    path.mkdir()
    check_works_from_memory(f"{tmp_path}/cache/kernels", "Is a directory")
    assert path.is_dir()


def test_no_home_directory(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYBRIDZOO_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    before = set(tmp_path.iterdir())
    check_works_from_memory("~/.cache/hybridzoo/kernels", "there is no home directory")
    assert set(tmp_path.iterdir()) == before


FULL_DISK = """
import pathlib, resource, sys, warnings
from hybridzoo.kernels import sources
root, source = sys.argv[1:]
sources.csrc = lambda: pathlib.Path(root)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for arch in ("sm_80", "sm_90"):
        assert len(sources.cubin(source, {"STRIDE": 1, "SCALE": "1.0f"}, arch)) > 2000
assert len(told) == 1, told
print(told[0].message)
"""


def test_full_disk_leaves_no_half_file(root, tmp_path):
    (text,) = in_processes(1, FULL_DISK, root, SOURCE)
    assert text.startswith(f"{tmp_path}/cache/kernels: ")
    assert not list(sources.cache_folder().iterdir())


COMPILE = """
import hashlib, pathlib, sys
from hybridzoo.kernels import sources
root, source = sys.argv[1:]
sources.csrc = lambda: pathlib.Path(root)
for _ in range(3):
    code = sources.cubin(source, {"STRIDE": 1, "SCALE": "1.0f"}, "sm_90")
print(hashlib.sha256(code).hexdigest())
"""
WRITE = """
import os
from hybridzoo.kernels import sources
mine = os.urandom(1) * 400_000
for i in range(40):
    sources._write_cached("one.cubin", mine)
    found = sources._read_cached("one.cubin")
    assert found is not None, "a torn file was read"
    assert len(set(found)) == 1 and len(found) == len(mine)
"""


def test_processes_that_race_agree_and_leave_one_file(root):
    assert len(set(in_processes(8, COMPILE, root, SOURCE))) == 1
    (path,) = sources.cache_folder().iterdir()
    assert path.suffix == ".cubin"


def test_nobody_reads_what_another_has_half_written(root):
    in_processes(8, WRITE)
    assert [path.name for path in sources.cache_folder().iterdir()] == ["one.cubin"]


# what came packaged


def package(root, arch: str, content: bytes) -> None:
    folder = root / "cubin"
    folder.mkdir(exist_ok=True)
    (folder / f"{sources.key(SOURCE, DEFINES, arch)}.cubin").write_bytes(content)


def test_packaged_code_comes_first_and_needs_no_compiler(root, compiled, monkeypatch):
    sources.cubin(SOURCE, DEFINES, "sm_90")
    package(root, "sm_90", b"packaged")
    missing = sources.Compiler("", "there is none")
    monkeypatch.setattr(sources, "find_compiler", lambda: missing)
    assert sources.cubin(SOURCE, DEFINES, "sm_90") == b"packaged"
    assert compiled == ["sm_90"]
    (root / "axpy" / "near.cuh").write_text("#define NEAR 2.0f\n")
    with pytest.raises(BackendError, match="there is none"):
        sources.cubin(SOURCE, DEFINES, "sm_90")


def test_packaged_code_runs_on_newer_devices_of_its_generation(root, compiled):
    package(root, "sm_80", b"for 8.0")
    package(root, "sm_86", b"for 8.6")
    assert sources.packaged_archs() == ["sm_80", "sm_86"]
    assert [sources.is_packaged(f"sm_{n}") for n in (75, 80, 89, 90)] == [False, True, True, False]
    assert sources.cubin(SOURCE, DEFINES, "sm_80") == b"for 8.0"
    assert sources.cubin(SOURCE, DEFINES, "sm_89") == b"for 8.6"
    assert sources.cubin(SOURCE, DEFINES, "sm_90") != b"for 8.6"
    assert compiled == ["sm_90"]


def test_list_of_kernels_to_package_is_read(root):
    (root / "packaged.txt").write_text(
        "# a comment\n\naxpy/fwd.cu axpy A=1 B=x=y # more\nb/b.cu f\n"
    )
    assert sources.listed() == [
        ("axpy/fwd.cu", "axpy", {"A": "1", "B": "x=y"}),
        ("b/b.cu", "f", {}),
    ]


def test_listed_kernels_are_there():
    for source, function, _ in sources.listed():
        code = re.sub(r"//.*", "", (sources.csrc() / source).read_text())
        assert re.search(rf"\b{function}\b", code), f"{source} {function}"


def test_module_needs_no_torch():
    code = "import sys, hybridzoo.kernels.sources; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_working_cache_warns_of_nothing(root):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sources.cubin(SOURCE, DEFINES, "sm_90")
