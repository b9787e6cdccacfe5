"""The ranks' places: who shares a group with whom, and the sentence for each layout that fails."""

import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from hybridzoo import launcher
from hybridzoo.comm import SINGLE
from hybridzoo.errors import ConfigError
from hybridzoo.parallel import finish, init
from tests import gloo

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in [k for k in os.environ if k in LAUNCHERS or k.startswith("SLURM_")]:
        monkeypatch.delenv(name)


def members(parallel, sizes):
    found = init(**sizes)
    places = {}
    for name in ("tp", "ep", "pp", "dp"):
        axis = getattr(found, name)
        ranks = axis.all_gather(torch.tensor([dist.get_rank()])).tolist()
        assert ranks[axis.rank] == dist.get_rank()
        assert len(ranks) == axis.world
        places[name] = ranks
    return places


def test_tp_is_fastest_then_dp_then_pp():
    found = gloo.run(4, members, {"tp": 2, "pp": 2})
    assert [f["tp"] for f in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [f["pp"] for f in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [f["dp"] for f in found] == [[0], [1], [2], [3]]
    found = gloo.run(4, members, {"tp": 2})
    assert [f["dp"] for f in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    found = gloo.run(4, members, {"pp": 2})
    assert [f["dp"] for f in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_expert_groups_are_data_parallel_ranks_in_a_row_of_one_slice():
    found = gloo.run(4, members, {"ep": 2})
    assert [f["ep"] for f in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [f["dp"] for f in found] == [[0, 1, 2, 3]] * 4
    found = gloo.run(4, members, {"ep": 2, "tp": 2})
    assert [f["ep"] for f in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    found = gloo.run(4, members, {"ep": 2, "pp": 2})
    assert [f["ep"] for f in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]


def refusal(parallel, sizes):
    try:
        init(**sizes)
    except ConfigError as error:
        return str(error)
    return None


def test_what_cannot_be_laid_out_lists_what_can():
    said = gloo.run(4, refusal, {"tp": 3})
    assert said[0] == (
        "parallel: 4 ranks cannot be laid out as tp 3 x pp 1; the product divides their number. "
        "Use a product of 1, 2, 4, or start 3 ranks."
    )
    assert set(said) == {said[0]}
    said = gloo.run(4, refusal, {"tp": 2, "ep": 4})
    assert said[0] == (
        "parallel: ep 4 cannot divide 2 data-parallel ranks (4 / tp 2 / pp 1); each group of "
        "experts has as many. Use ep 1, 2."
    )
    assert "tp cannot be 0; it is a count >= 1" in gloo.run(2, refusal, {"tp": 0})[0]


def sequence(parallel, tp):
    return init(tp=tp, sequence_parallel=True).sequence_parallel


def test_sequence_parallel_means_nothing_without_tp():
    assert gloo.run(2, sequence, 2) == [True, True]
    assert gloo.run(2, sequence, 1) == [False, False]


def test_without_a_launcher_there_is_one_rank():
    assert init() is SINGLE
    assert launcher.rank() == 0
    finish()


def test_without_a_launcher_more_ranks_name_the_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/hybridzoo", "generate", "a b", "--tp", "2"])
    with pytest.raises(ConfigError) as caught:
        init(tp=2, pp=2)
    assert str(caught.value) == (
        "parallel: tp 2, pp 2 needs 4 processes, and this is one; a launcher starts them. "
        "Type: torchrun --nproc-per-node 4 --no-python hybridzoo generate 'a b' --tp 2"
    )
    monkeypatch.setattr(sys, "argv", ["go.py"])
    with pytest.raises(ConfigError, match=r"Type: torchrun --nproc-per-node 2 go.py$"):
        init(ep=2)


def test_a_batch_script_of_slurm_is_one_process_and_its_steps_are_ranks(monkeypatch):
    # sbatch sets these two for the script itself, which is no rank
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert init() is SINGLE
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert launcher.is_launched()
    with pytest.raises(ConfigError, match="MASTER_ADDR is not set; the ranks need the host"):
        init()


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"RANK": "0"}, "parallel: SLURM_STEP_NUM_TASKS cannot be ''; a launcher sets it"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "parallel: WORLD_SIZE cannot be 'two'"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "parallel: MASTER_ADDR is not set"),
    ],
    ids=["no world", "a word", "no master"],
)
def test_a_broken_environment_is_named(monkeypatch, setting, sentence):
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        init()
    assert str(caught.value).startswith(sentence)


PROGRAM = """
import torch, torch.distributed as dist
from hybridzoo.parallel import finish, init
parallel = init(tp=2, device="cpu", timeout_s=30)
total = parallel.tp.all_reduce(torch.tensor([dist.get_rank() + 1])).item()
finish()
print(f"rank {parallel.tp.rank} of {parallel.tp.world}: {total}, {dist.is_initialized()}")
"""


def environment(kind, rank, port):
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TORCHELASTIC"))}
    if kind == "srun":
        plain |= {"SLURM_PROCID": rank, "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": rank}
    else:
        plain |= {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}
    return plain | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


@pytest.mark.parametrize("kind", ["deepspeed", "srun"])
def test_two_processes_with_a_launchers_environment_find_each_other(kind):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=environment(kind, str(rank), port),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert said == [f"rank {rank} of 2: 3, False\n" for rank in range(2)]


def test_a_port_in_use_is_said(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for name, value in environment("deepspeed", "0", port).items():
            monkeypatch.setenv(name, value)
        sentence = rf"^parallel: the ranks cannot meet at 127\.0\.0\.1:{port} \(.*EADDRINUSE.*\); "
        with pytest.raises(ConfigError, match=sentence):
            init(device="cpu", timeout_s=5)
    assert not dist.is_initialized()
