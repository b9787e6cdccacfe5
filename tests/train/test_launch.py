"""Real launchers and real signals: what trains, what a user reads, and that nothing hangs."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from hybridzoo.train import snapshot
from hybridzoo.train.log import read_log
from tests.train import runs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "launch" / "train.py"
BIN = Path(sys.executable).parent
# what the issue promises from a failure to the job's end
LIMIT_S = 60
STEPS = 24
LOST = "rank 0: lost contact with another rank; its error comes first"


def free_port():
    """One that no connection takes by itself meanwhile: below the system's own range."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return str(port)


class Job:
    """A launcher with two ranks of scripts/launch/train.py, or of another program."""

    def __init__(self, launcher, arguments, program=SCRIPT):
        port = free_port()
        commands = {
            "torchrun": [BIN / "torchrun", "--nproc-per-node", "2", "--master-port", port],
            "deepspeed": [BIN / "deepspeed", "--num_gpus", "2", "--master_port", port],
        }
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        # deepspeed starts `python` by the name that this one has
        environment |= {"PATH": f"{BIN}:{os.environ['PATH']}"}
        self.process = subprocess.Popen(
            [*map(str, commands[launcher]), str(program), *map(str, arguments)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def rank(self, number):
        """The process of a rank, as soon as there is one."""
        while self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                try:
                    if child.environ().get("RANK") == str(number):
                        return child
                except psutil.Error:
                    continue
            time.sleep(0.01)
        raise AssertionError(self.process.communicate()[0])

    def end(self, limit=300):
        """Exit code, and all that it said; its processes are gone."""
        try:
            said, _ = self.process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            said, _ = self.process.communicate()
            raise AssertionError(f"no end within {limit} s: {said}") from None
        return self.process.returncode, said


def write_recipe(directory, **changes):
    """A recipe's file for two data-parallel ranks; the run goes to directory/run."""
    directory.mkdir(exist_ok=True)
    options = {"steps": STEPS, "save_every": 2, "eval_every": 6, "eval_batches": 1, "ema": 0.5}
    made = runs.recipe(directory, **{**options, **changes})
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(made.to_dict()))
    return path


def losses(directory):
    return [{**r, "tokens_per_s": 0} for r in read_log(directory / "run" / "log.jsonl")]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nobody disturbs, and what was said."""
    directory = tmp_path_factory.mktemp("straight")
    code, said = Job("torchrun", [write_recipe(directory)]).end()
    assert code == 0, said
    return directory, said


def test_torchrun_trains_and_rank_0_alone_speaks(straight):
    directory, said = straight
    assert said.count("2 ranks: tp 1 x pp 1 x dp 2, ZeRO 1, gloo") == 1
    assert said.count(f"step {STEPS} · val ") == 1
    assert (directory / "run" / "loss.png").exists()


def test_a_mistake_in_the_recipe_is_said_once_and_first(tmp_path):
    path = write_recipe(tmp_path)
    path.write_text(path.read_text() + "stpes: 3\n")
    code, said = Job("torchrun", [path]).end()
    assert code != 0
    sentence = f"rank 0: {path}: stpes is not a key of a recipe; did you mean steps?"
    # torchrun speaks first when it has to share the cores
    own = [line for line in said.splitlines() if line.startswith("rank ")]
    assert len(own) == 1
    assert own[0].startswith(sentence)
    assert said.index(sentence) < said.index("Traceback" if "Traceback" in said else sentence) + 1


BROKEN = """
import os, sys
from hybridzoo.cli import main
from hybridzoo.train.data import PackedData
batch_at = PackedData.batch_at
def broken(self, step):
    if step == 5 and os.environ["RANK"] == "1":
        raise RuntimeError("a bug of rank 1")
    return batch_at(self, step)
PackedData.batch_at = broken
main(["train", *[a for a in sys.argv[1:] if not a.startswith("--local_rank")]])
"""


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_failing_rank_ends_the_job_with_its_own_error_first(tmp_path, launcher):
    program = tmp_path / "broken.py"
    program.write_text(BROKEN)
    code, said = Job(launcher, [write_recipe(tmp_path)], program).end()
    # the step before the bug was the last thing that the run wrote
    assert time.time() - (tmp_path / "run" / "log.jsonl").stat().st_mtime < LIMIT_S
    assert code != 0
    own = [line for line in said.splitlines() if line.startswith(("rank ", "Traceback"))]
    assert own[0] == "rank 1: RuntimeError: a bug of rank 1", said
    # the other has nothing to show but that it noticed, and how if the launcher is slow
    assert all(line.startswith(("Traceback (most recent call last):", LOST)) for line in own[1:])


def test_a_network_that_nobody_has_is_named_though_all_ranks_lose_contact(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    code, said = Job("torchrun", [write_recipe(tmp_path)]).end()
    assert code != 0
    own = [line for line in said.splitlines() if line.startswith("rank ")]
    assert "Unable to find address for: nowhere0). Set NCCL_DEBUG=INFO, or add --debug" in own[0]


STUCK = """
import os, signal, threading
from hybridzoo.parallel import init
from hybridzoo.train.interrupt import interruptible
init(device="cpu")
with interruptible():
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    # as in a collective on a GPU, which does not see that the other rank is gone
    threading.Event().wait()
"""


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_rank_that_waits_for_a_dead_one_ends_when_the_launcher_says_so(tmp_path, launcher):
    program = tmp_path / "stuck.py"
    program.write_text(STUCK)
    code, said = Job(launcher, [], program).end()
    assert code != 0
    # after half a minute the launcher would have killed it without a word
    assert f"{LOST}." in said


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_sigterm_to_one_rank_saves_and_stops_all(tmp_path, straight, launcher):
    path, log = write_recipe(tmp_path), tmp_path / "run" / "log.jsonl"
    job = Job(launcher, [path])
    victim = job.rank(1)
    wait_for(job, lambda: log.exists() and log.stat().st_size > 0)
    victim.send_signal(signal.SIGTERM)
    code, said = job.end()
    assert code == 0, said
    assert "SIGTERM: stopped after step " in said
    code, said = Job(launcher, [path, "--resume"]).end()
    assert code == 0, said
    assert losses(tmp_path) == losses(straight[0])


def wait_for(job, is_true):
    deadline = time.monotonic() + 120
    while not is_true() and job.process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def kill(job, moment, rank, run, rng):
    """SIGKILL to a rank at one of three moments; whether it came before the end."""
    log, victim = run / "log.jsonl", job.rank(rank)
    size = log.stat().st_size if log.exists() else 0
    if moment == "start":
        time.sleep(rng.uniform(0, 6))
    elif moment == "step":
        wait_for(job, lambda: log.exists() and log.stat().st_size not in (0, size))
        time.sleep(rng.uniform(0, 0.3))
    else:
        wait_for(job, lambda: any(run.glob("tmp-step-*")))
        time.sleep(rng.uniform(0, 0.02))
    try:
        victim.kill()
    except psutil.NoSuchProcess:
        return False
    return True


@pytest.mark.parametrize("n_kills", [3, pytest.param(20, marks=pytest.mark.soak)])
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_killed_rank_ends_the_job_and_the_resumed_run_loses_nothing(
    tmp_path, straight, launcher, n_kills
):
    path, run = write_recipe(tmp_path), tmp_path / "run"
    seed = random.SystemRandom().randrange(1 << 32)
    rng = random.Random(seed)
    for i in range(n_kills):
        job = Job(launcher, [path, "--resume"])
        moment = ("start", "step", "save")[i % 3]
        is_killed = kill(job, moment, rng.randrange(2), run, rng)
        code, said = job.end(LIMIT_S)
        where = f"seed {seed}, kill {i} ({moment}): {said}"
        if code == 0:
            # the run was over first
            assert not is_killed or moment == "save", where
            break
        assert "-9" in said or "SIGKILL" in said, where
        if (run / "latest").exists():
            latest = run / (run / "latest").read_text().strip()
            assert snapshot.why_broken(latest) == "", where
    code, said = Job(launcher, [path, "--resume"]).end()
    assert code == 0, said
    assert losses(tmp_path) == losses(straight[0]), f"seed {seed}"
    last = f"step-{STEPS:08d}"
    runs.assert_same(runs.weights(run / last), runs.weights(straight[0] / "run" / last))
