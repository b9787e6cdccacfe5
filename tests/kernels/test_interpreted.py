"""Triton backends in the interpreter, on the CPU: the same source as on a GPU, small shapes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hybridzoo.kernels.jit import triton

HERE = Path(__file__).parent
FILES = {path.stem.removeprefix("interpreted_"): path for path in HERE.glob("interpreted_*.py")}
OPS = sorted(FILES)
PARTS = [
    *((op, "quick") for op in OPS),
    *(
        pytest.param(op, "slow", marks=pytest.mark.slow)
        for op in OPS
        if re.search(r"^SLOW = ", FILES[op].read_text(), re.MULTILINE)
    ),
]


@pytest.mark.parametrize(("op", "part"), PARTS)
def test_interpreted_kernels_are_right(op, part):
    if triton is None:
        pytest.skip("triton is not installed")
    # scripts/install.sh brings 3.6; interpreters since refuse masks that a GPU takes
    if not triton.__version__.startswith("3.6."):
        pytest.skip(f"the interpreter of Triton {triton.__version__} is not that of 3.6")
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.interpreted", op, part],
        cwd=HERE.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # a generator that yields nothing proves nothing
    assert re.search(r"^[1-9]\d* cases passed$", done.stdout, re.MULTILINE), done.stdout


def test_every_triton_backend_has_cases():
    kernels = HERE.parents[1] / "hybridzoo" / "kernels"
    assert sorted(path.parent.name for path in kernels.glob("*/triton.py")) == OPS


def test_modules_import_without_triton():
    code = (
        "import importlib.util, pathlib, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "import importlib, torch\n"
        f"for op in {OPS!r}:\n"
        "    module = importlib.import_module(f'hybridzoo.kernels.{op}.triton')\n"
        "    assert module.available(torch.device('cuda')) == 'triton is not installed', op\n"
        "    assert 'triton' not in sys.modules, op\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
