"""Generation on several ranks: the text of one process, said once; mistakes said once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hybridzoo
from hybridzoo import arguments
from hybridzoo.comm import SINGLE
from hybridzoo.parallel import groups
from tests import gloo
from tests.models import make_model, randint

ROOT = Path(hybridzoo.__file__).resolve().parents[1]
# fp32: bf16 rounds each rank's share of a sum, so that near ties may fall otherwise
TEXT = ["generate", "--prompt", "ROMEO:", "--max-new-tokens", "12", "--dtype", "fp32"]


@pytest.fixture
def run(tmp_path):
    """Run a command line with `hybridzoo` and torchrun on its path."""
    shim = tmp_path / "hybridzoo"
    shim.write_text(f"#!{sys.executable}\nfrom hybridzoo.cli import main\nmain()\n")
    shim.chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(*command):
        return subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True
        )

    return run


TORCHRUN = ["torchrun", "--standalone", "--nproc-per-node", "2", "--no-python", "hybridzoo"]


def test_ranks_wait_for_a_download_of_hours(monkeypatch):
    """The first one downloads; torch's collectives would give up after ten minutes."""
    asked = {}

    def joined(**options):
        asked.update(options)
        return SINGLE

    monkeypatch.setattr(groups, "init", joined)
    arguments._join(2, torch.device("cpu"))
    assert asked["timeout_s"] >= 12 * 3600


@pytest.mark.slow
@pytest.mark.parametrize("draw", [("--temperature", "0"), ("--seed", "3")], ids=["greedy", "drawn"])
def test_two_ranks_say_once_what_one_process_says(run, draw):
    alone = run("hybridzoo", *TEXT, *draw)
    together = run(*TORCHRUN, *TEXT, *draw, "--tp", "2")
    assert together.returncode == 0, together.stderr
    assert together.stdout == alone.stdout
    assert together.stderr.count("shakespeare: ") == 1


@pytest.mark.slow
def test_without_a_seed_two_ranks_draw_alike(run):
    # ranks that drew apart would feed different tokens, and the first one's text would be noise
    together = run(*TORCHRUN, *TEXT, "--tp", "2", "--quiet")
    assert together.returncode == 0, together.stderr
    assert together.stdout.startswith("ROMEO:")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--tp", "2", "--temperature", "-1"], "sampling: temperature cannot be -1.0"),
        (["--tp", "1"], "--tp: 1 of 2 ranks would share a model"),
        (["--tp", "3"], "parallel: 2 ranks cannot be laid out as tp 3"),
        (["--tp", "2", "--device", "cpu", "--kernels", "ssd=none"], "ssd: backend 'none'"),
    ],
)
def test_a_mistake_is_said_once(run, options, sentence):
    done = run(*TORCHRUN, *TEXT, *options)
    assert done.returncode == 1
    assert not done.stdout
    assert done.stderr.count(sentence) == 1
    # before the launcher's own words
    assert done.stderr.index(sentence) < done.stderr.index("FAILED")


@pytest.mark.slow
def test_one_process_is_told_the_command_that_starts_two(run):
    done = run("hybridzoo", *TEXT, "--tp", "2")
    assert done.returncode == 2
    assert "Type: torchrun --nproc-per-node 2 --no-python hybridzoo generate" in done.stderr


def drawn(parallel, options):
    model = make_model(parallel=parallel, dtype=torch.float32)
    return model.generate(randint(2, 5), max_new_tokens=12, **options)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 5, "top_k": 9}], ids=str)
def test_ranks_generate_one_ranks_ids(options):
    # 23 ids on two ranks: 11 and 12
    alone = drawn(SINGLE, options)
    for ids in gloo.run(2, drawn, options):
        assert torch.equal(ids, alone)


def test_ranks_without_a_seed_draw_alike():
    first, second = gloo.run(2, drawn, {"temperature": 2.0})
    assert torch.equal(first, second)
