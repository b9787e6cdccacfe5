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
from hybridzoo.parallel import finish, groups, init
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


def second_task(monkeypatch, n_gpus):
    """The second process of a host, as it sees the host's GPUs."""
    for name, value in environment("deepspeed", "1", 29_999).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)


def test_a_rank_without_a_gpu_of_its_own_names_what_slurm_hides(monkeypatch):
    second_task(monkeypatch, 1)
    with pytest.raises(ConfigError) as caught:
        init(device="cuda")
    assert str(caught.value) == (
        "parallel: rank 1 is process 2 of its host and sees too few GPUs (1); each rank needs its "
        "own. Start fewer ranks; with SLURM ask for --gpus-per-node, as --gpus-per-task shows a "
        "task only its own."
    )


OWN = """NCCL error in: NCCLUtils.cpp:94, invalid usage, NCCL version 2.27.5
ncclInvalidUsage: This usually reflects invalid usage of NCCL library.
Last error:
Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 65000"""
ANOTHERS = [
    "NCCL error in: NCCLUtils.cpp:94, remote process exited or there was a network error\n"
    "ncclRemoteError: A call failed possibly due to a remote process exiting prematurely.\n"
    "Last error:\nsocketProgress: Connection closed by remote peer",
    "[1] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value "
    "store by key '0', but store->get('0') got error: failed to recv, got 0 bytes",
]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("1/2 clients joined.", "1/2 clients joined"),
        ("NCCL error\nLast error:\nno room", "no room"),
        ("no room\nException raised from a (most recent call first):\nframe #0: b", "no room"),
        ("ncclSystemError: a call failed. \nLast error:\n\n", "ncclSystemError: a call failed"),
        ("a call failed.\nLast error: Unknown NCCL Error\n", "a call failed"),
        ("", "RuntimeError"),
    ],
)
def test_the_line_of_an_error_that_says_most_is_its_last(text, line):
    assert groups.last_line(RuntimeError(text)) == line


def fail(monkeypatch, text):
    def start(*args, device_id, **options):
        assert device_id == torch.device("cuda", 1)
        raise dist.DistBackendError(text)

    second_task(monkeypatch, 2)
    monkeypatch.setattr(dist, "init_process_group", start)
    init(device="cuda")


def test_why_nccl_cannot_start_is_a_sentence(monkeypatch):
    with pytest.raises(ConfigError) as caught:
        fail(monkeypatch, OWN)
    assert str(caught.value) == (
        "parallel: NCCL cannot start (Duplicate GPU detected : rank 1 and rank 0 both on CUDA "
        "device 65000); it needs a GPU for each rank, room in /dev/shm and a network between "
        "hosts. Set NCCL_DEBUG=INFO to see what it lacks."
    )


@pytest.mark.parametrize("text", ANOTHERS, ids=["remote", "store"])
def test_the_end_of_another_rank_is_no_mistake_of_this_one(monkeypatch, text):
    with pytest.raises(dist.DistBackendError):
        fail(monkeypatch, text)


def test_a_port_in_use_is_said(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for name, value in environment("deepspeed", "0", port).items():
            monkeypatch.setenv(name, value)
        sentence = rf"^parallel: the ranks cannot meet at 127\.0\.0\.1:{port} \(.*EADDRINUSE.*\); "
        with pytest.raises(ConfigError, match=sentence):
            init(device="cpu", timeout_s=5)
    assert not dist.is_initialized()
