"""SIGKILL in a real training process, at random moments: only unsaved steps are lost."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybridzoo.checkpoint import load
from hybridzoo.train import snapshot
from hybridzoo.train.log import read_log
from hybridzoo.train.loop import train
from tests.train import runs

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
CODE = """
import json, sys
from hybridzoo.train.loop import train
from hybridzoo.parallel.recipe import Recipe
train(Recipe.from_dict(json.loads(sys.argv[1])), resume=True)
"""
CHANGES = {"steps": STEPS, "save_every": 1, "eval_every": 2, "eval_batches": 1}


def kill_at_random(recipe, rng):
    """Start the run, or go on with it, and kill it within about a second of training."""
    log = Path(recipe.output) / "log.jsonl"
    before = log.read_bytes() if log.exists() else b""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, json.dumps(recipe.to_dict())],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 120
    # a run that the kill before found at its very end ends at once
    while not (log.exists() and log.read_bytes() != before) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.7))
    process.send_signal(signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), said.decode()
    return process.returncode


def killed_and_resumed(directory, n_kills):
    """A run killed `n_kills` times, each followed by a look at what it left, then finished."""
    recipe = runs.recipe(directory, **CHANGES)
    root = Path(recipe.output)
    seed = random.SystemRandom().randrange(1 << 32)
    rng = random.Random(seed)
    for _ in range(n_kills):
        if kill_at_random(recipe, rng) == 0:
            # it was finished before the kill came: begin again
            directory = directory / "again"
            directory.mkdir()
            recipe = runs.recipe(directory, **CHANGES)
            root = Path(recipe.output)
            continue
        if (root / "latest").exists():
            latest = root / (root / "latest").read_text().strip()
            assert snapshot.why_broken(latest) == "", f"seed {seed}"
            load(latest)
        # the first save there, cut off, leaves what it had staged and nothing else
        if (root / "best").exists() and {p.name for p in (root / "best").iterdir()} - {".saving"}:
            load(root / "best")
    train(recipe, resume=True, console=runs.quiet())
    return root


def losses(root):
    return [{**r, "tokens_per_s": 0} for r in read_log(root / "log.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize("n_kills", [3, pytest.param(20, marks=pytest.mark.soak)])
def test_a_killed_run_loses_nothing(tmp_path, n_kills):
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
    straight = Path(
        train(runs.recipe(tmp_path / "straight", **CHANGES), console=runs.quiet())
    ).parent
    killed = killed_and_resumed(tmp_path / "killed", n_kills)
    assert losses(killed) == losses(straight)
    name = f"step-{STEPS:08d}"
    runs.assert_same(runs.weights(killed / name), runs.weights(straight / name))
    runs.assert_same(runs.weights(killed / "best"), runs.weights(straight / "best"))
