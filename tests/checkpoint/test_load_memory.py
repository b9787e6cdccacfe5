"""Memory of loading and converting 200 MB, as the system counts it: mapped files too."""

import subprocess
import sys

import pytest
import torch

from hybridzoo.checkpoint import save
from hybridzoo.config import HybridConfig
from hybridzoo.model import HybridLM

SHARD = 40_000_000
CONFIG = {
    "d_model": 512,
    "vocab_size": 2000,
    "pattern": "40F",
    "layers": {"F": {"kind": "mlp", "d_ff": 1600}},
    "tie_embeddings": False,
}
# VmHWM is the most that was ever resident; what comes before `peak()` is warmed up and taken off
MEASURED = """
import sys, torch
from pathlib import Path
from hybridzoo.checkpoint import convert, load

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(l.split()[1] for l in lines if l.startswith("VmHWM")))

directory, small = sys.argv[1:]
load(small, dtype=torch.float32)
before = peak()
{action}
print(peak() - before)
"""
LOAD = """
model = load(directory, dtype=torch.{dtype})
# an element of every page, without a temporary
assert all(p.detach().view(-1)[::1000].sum() >= 0 for p in model.parameters())
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """200 MB of bf16 in shards, and a little one."""
    directory, small = tmp_path_factory.mktemp("large"), tmp_path_factory.mktemp("small")
    # from a counter: random numbers take longer than all the rest
    model = HybridLM(HybridConfig.from_dict(CONFIG), dtype=torch.bfloat16, init=False)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.fill_(i)
    save(model, directory, max_shard_bytes=SHARD)
    little = HybridConfig.from_dict(CONFIG | {"pattern": "F", "d_model": 64})
    save(HybridLM(little, dtype=torch.bfloat16), small)
    return directory, small


def size(directory):
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def measured(checkpoints, action):
    command = [sys.executable, "-c", MEASURED.replace("{action}", action), *checkpoints]
    return int(subprocess.check_output(command, text=True))


def test_load_takes_its_size_and_less_than_a_shard(checkpoints):
    grown = measured(checkpoints, LOAD.format(dtype="bfloat16"))
    n = size(checkpoints[0])
    assert 190e6 < n <= grown < n + SHARD


def test_cast_takes_the_parameters_and_two_buffers(checkpoints):
    grown = measured(checkpoints, LOAD.format(dtype="float32"))
    n = 2 * size(checkpoints[0])
    assert n <= grown < n + SHARD


def test_convert_takes_less_than_a_shard(checkpoints, tmp_path):
    grown = measured(checkpoints, f"convert(directory, {str(tmp_path / 'target')!r})")
    assert grown < SHARD
    assert size(tmp_path / "target") == size(checkpoints[0])
