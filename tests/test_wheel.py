"""A stranger's machine: the two scripts in a fresh copy, and a wheel in an empty environment."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def run(command: list[str | Path], cwd: Path, **environment: str) -> str:
    """The command's stdout; fails with all it said. The caller's Python variables stay out."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST", "VIRTUAL_ENV"))
    }
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**kept, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def fresh_copy(tmp_path) -> Path:
    """What a clone would hold once the present work is committed; nothing that git ignores."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    copy = tmp_path / "fresh copy"  # the space is on purpose
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


def test_wheel_generates_offline_in_an_empty_environment(fresh_copy, tmp_path):
    pip = [sys.executable, "-m", "pip"]
    build = ["wheel", fresh_copy, "--no-deps", "--no-build-isolation", "-qq", "-w", tmp_path]
    run([*pip, *build], tmp_path)
    (wheel,) = tmp_path.glob("hybridzoo-*.whl")
    assert wheel.stat().st_size < 20 * 2**20

    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        f"hybridzoo/{path.relative_to(fresh_copy)}" for path in fresh_copy.glob("configs/**/*.yaml")
    }
    wanted |= {
        f"hybridzoo/{path.relative_to(fresh_copy)}" for path in fresh_copy.glob("model_cards/*.*")
    }
    wanted |= {str(path.relative_to(fresh_copy)) for path in fresh_copy.glob("hybridzoo/**/*.py")}
    weights = [path for path in fresh_copy.glob("hybridzoo/zoo/weights/**/*") if path.is_file()]
    assert {".safetensors", ".json", ".xz"} <= {path.suffix for path in weights}
    wanted |= {str(path.relative_to(fresh_copy)) for path in weights} | {"hybridzoo/py.typed"}
    assert not sorted(wanted - names)

    empty = tmp_path / "empty"
    venv.create(empty, with_pip=False)
    python = empty / "bin" / "python"
    run([*pip, "--python", python, "install", "--no-deps", "--no-index", "-qq", wheel], tmp_path)
    (site,) = empty.glob("lib/python*/site-packages")
    # the dependencies are this environment's; a .pth's lines only add folders, after the venv's
    # own: the wheel's hybridzoo comes first, and an editable one of this environment is not seen
    folders = [folder for folder in sys.path if folder.endswith(("site-packages", "dist-packages"))]
    (site / "dependencies.pth").write_text("\n".join(folders))

    where = run([python, "-c", "import hybridzoo; print(hybridzoo.__file__)"], tmp_path)
    assert Path(where.strip()) == site / "hybridzoo" / "__init__.py"
    command = empty / "bin" / "hybridzoo"
    assert "shakespeare" in run([command, "list"], tmp_path, HF_HUB_OFFLINE="1")
    generate = [command, "generate", "--max-new-tokens", "20", "--seed", "1"]
    assert len(run(generate, tmp_path, HF_HUB_OFFLINE="1")) >= 20


AXPY = 'extern "C" __global__ void axpy(float* y, float a) { y[threadIdx.x] += a * SCALE; }\n'
PACKAGED = """
import pathlib, sys
from hybridzoo.kernels import sources
assert pathlib.Path(sources.__file__).is_relative_to(pathlib.Path.cwd())
sources.find_compiler = lambda: sources.Compiler("", "nothing may be compiled")
for arch in ("sm_80", "sm_86", "sm_90"):
    code = sources.cubin("axpy/fwd.cu", {"SCALE": 2}, arch)
    assert code[:4] == b"\\x7fELF" and b"axpy" in code
print(*sources.packaged_archs())
"""


@pytest.fixture
def axpy_copy(fresh_copy) -> Path:
    """A fresh copy whose csrc is one small kernel, listed."""
    (fresh_copy / "csrc" / "axpy").mkdir()
    (fresh_copy / "csrc" / "axpy" / "fwd.cu").write_text(AXPY)
    (fresh_copy / "csrc" / "packaged.txt").write_text("axpy/fwd.cu axpy SCALE=2\n")
    return fresh_copy


def build(copy: Path, target: Path, **environment: str) -> str:
    """What setup.py says while it lays out what a wheel would hold; no pip around it."""
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", target]
    return run(command, copy, **environment)


def test_wheel_carries_cubins_when_asked(axpy_copy, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc here")
    command = [sys.executable, "-m", "pip", "wheel", axpy_copy, "--no-deps", "-qq", "-w", tmp_path]
    run([*command, "--no-build-isolation"], tmp_path, HYBRIDZOO_BUILD_ARCHS="sm_90, sm_80")
    (wheel,) = tmp_path.glob("hybridzoo-*.whl")
    (tmp_path / "site").mkdir()
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    assert run([sys.executable, "-c", PACKAGED], tmp_path / "site") == "sm_80 sm_90\n"
    # the tree of that build is still there, and the next one has other wishes
    build(axpy_copy, axpy_copy / "build" / "lib")
    assert not list((axpy_copy / "build" / "lib").rglob("*.cubin"))


def test_wheel_needs_no_nvcc_unless_asked(axpy_copy, tmp_path):
    bare = {"PATH": str(Path(sys.executable).parent), "CUDA_HOME": str(tmp_path)}
    build(axpy_copy, tmp_path / "lib", **bare)
    for name in ("axpy/fwd.cu", "packaged.txt"):
        assert (tmp_path / "lib" / "hybridzoo" / "csrc" / name).is_file()
    assert not list((tmp_path / "lib").rglob("*.cubin"))
    with pytest.raises(AssertionError, match="HYBRIDZOO_BUILD_ARCHS: there is no nvcc on PATH"):
        build(axpy_copy, tmp_path / "lib", HYBRIDZOO_BUILD_ARCHS="sm_90", **bare)


def test_nvcc_is_found_in_cuda_home_and_told_what_to_do(axpy_copy, tmp_path):
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text('#!/bin/bash\necho "$@" >&2\nexit 1\n')
    nvcc.chmod(0o755)
    bare = {"PATH": "/bin", "CUDA_HOME": str(tmp_path), "HYBRIDZOO_BUILD_ARCHS": "sm_90"}
    if shutil.which("nvcc", path="/bin") is not None:
        pytest.skip("nvcc is in /bin")
    with pytest.raises(AssertionError) as caught:
        build(axpy_copy, tmp_path / "lib", **bare)
    assert "-cubin -std=c++17" in str(caught.value)
    assert "-arch=sm_90 -DSCALE=2" in str(caught.value)
    assert "nvcc does not compile axpy/fwd.cu for sm_90" in str(caught.value)


def test_line_that_names_no_function_is_an_error(axpy_copy, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc here")
    (axpy_copy / "csrc" / "packaged.txt").write_text("axpy/fwd.cu other SCALE=2\n")
    with pytest.raises(AssertionError, match=r"packaged.txt: axpy/fwd.cu has no function other"):
        build(axpy_copy, tmp_path / "lib", HYBRIDZOO_BUILD_ARCHS="sm_90")


@pytest.mark.timeout(1800)  # torch and the dev extra are downloaded
def test_scripts_set_up_a_fresh_copy(fresh_copy, tmp_path):
    """quickstart.sh talks, again without installing, and test.sh checks and tests, in one copy."""
    torch_here = {"HYBRIDZOO_TORCH": f"torch=={torch.__version__.partition('+')[0]}"}
    quickstart = ["bash", fresh_copy / "scripts" / "quickstart.sh"]
    first = run(quickstart, tmp_path, **torch_here)
    assert "==> making .venv" in first
    assert "shakespeare" in first
    text = first.partition("==> hybridzoo generate")[2].partition("\n")[2]
    assert len(text) >= 200
    second = run(quickstart, tmp_path)
    assert "installing" not in second
    assert second.endswith(text)
    tested = run(["bash", fresh_copy / "scripts" / "test.sh", "tests/test_sharding.py"], tmp_path)
    assert " passed" in tested.splitlines()[-1]
