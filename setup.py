"""What a wheel holds: the package, the top-level folders that live outside it, and cubins if asked.

HYBRIDZOO_BUILD_ARCHS=sm_90,sm_80 pip install .   also compiles csrc/packaged.txt, which takes nvcc
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# an isolated build has neither this folder on its path nor torch; sources.py needs no torch
sys.path.insert(0, str(ROOT))
from hybridzoo.kernels import sources  # noqa: E402

# configs/, model_cards/ and csrc/ stand at the top level, where a reader looks for them; a wheel
# carries them inside the package, where hybridzoo finds them once it is installed
MAPPED = {
    "configs": ["*.yaml", "train/*.yaml"],
    "model_cards": ["*.md", "*.png"],
    "csrc": ["**/*.cu", "**/*.cuh", "packaged.txt"],
}


class BuildWithCubins(build_py):
    """Adds hybridzoo/csrc/cubin for the archs of HYBRIDZOO_BUILD_ARCHS."""

    def run(self) -> None:
        super().run()
        # a clone's sources change: they are compiled at first use
        if self.editable_mode:
            return
        archs = [a.strip() for a in os.environ.get("HYBRIDZOO_BUILD_ARCHS", "").split(",")]
        folder = Path(self.build_lib) / "hybridzoo" / "csrc" / "cubin"
        # what an earlier build left would be packaged too
        shutil.rmtree(folder, ignore_errors=True)
        for arch in filter(None, archs):
            folder.mkdir(parents=True, exist_ok=True)
            for instance in sources.listed():
                package(instance, arch, folder)


def package(instance: sources.Instance, arch: str, folder: Path) -> None:
    source, function, defines = instance
    target = folder / f"{sources.key(source, defines, arch)}.cubin"
    options = [*sources.FLAGS, f"-I{sources.csrc()}", f"-arch={arch}"]
    options += [f"-D{name}={value}" for name, value in defines.items()]
    command = [find_nvcc(), "-cubin", *options, "-o", target, sources.csrc() / source]
    if subprocess.run(command).returncode:
        raise SystemExit(f"HYBRIDZOO_BUILD_ARCHS: nvcc does not compile {source} for {arch}.")
    if function.encode() not in target.read_bytes():
        raise SystemExit(f"csrc/packaged.txt: {source} has no function {function}.")


def find_nvcc() -> str:
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    found = shutil.which("nvcc") or shutil.which("nvcc", path=home / "bin")
    if found is None:
        raise SystemExit(
            "HYBRIDZOO_BUILD_ARCHS: there is no nvcc on PATH or in CUDA_HOME. Install CUDA's "
            "compiler, or unset the variable: kernels are then compiled at first use."
        )
    return found


setup(
    cmdclass={"build_py": BuildWithCubins},
    packages=[
        *find_packages(include=["hybridzoo", "hybridzoo.*"]),
        *(f"hybridzoo.{folder}" for folder in MAPPED),
    ],
    package_dir={f"hybridzoo.{folder}": folder for folder in MAPPED},
    package_data={
        "hybridzoo": ["py.typed"],
        "hybridzoo.zoo": ["weights/**/*"],
        **{f"hybridzoo.{folder}": patterns for folder, patterns in MAPPED.items()},
    },
)
