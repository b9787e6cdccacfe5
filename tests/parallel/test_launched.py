"""How a rank ends: what it says, when, and its exit code."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
from hybridzoo.errors import ConfigError
from hybridzoo.parallel.launched import run
def command():
    print("begins", flush=True)
    {body}
run(command, lambda e: "in words: " + str(e), (ConfigError,), is_debug="--debug" in sys.argv)
"""
MISTAKE = 'raise ConfigError("lr is wrong.")'
BUG = 'raise ValueError("a bug")'
CLOSED = 'raise RuntimeError("[/third_party/gloo/gloo/pair.cc:5] Connection closed by peer")'
SILENT = 'raise RuntimeError("[gloo/unbound_buffer.cc:78] Timed out waiting 5000ms")'
NO_ROOM = r'raise RuntimeError("NCCL error in: a.cpp\nLast error:\nno room in /dev/shm/nccl-a")'
LOST = "rank {}: lost contact with another rank; its error comes first"
# where the launcher ends nobody, a rank's own error may be the first
OR_HERE = ", or the cause is here ({}). Set NCCL_DEBUG=INFO, or add --debug for the traceback.\n"


def start(rank, body, *arguments):
    environment = {**os.environ, "RANK": str(rank), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(body=body), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_each_end_has_its_words_and_code():
    """All at once: most of the time is the imports."""
    cases = {
        "a mistake of the first": (0, MISTAKE, 2, "rank 0: in words: lr is wrong.\n"),
        "of another": (1, MISTAKE, 2, "rank 1: in words: lr is wrong.\n"),
        "agreed": (
            0,
            'raise ConfigError("rank 3: lr is wrong.")',
            2,
            "rank 0: in words: rank 3: lr is wrong.\n",
        ),
        "lost": (
            2,
            CLOSED,
            1,
            LOST.format(2)
            + OR_HERE.format("[/third_party/gloo/gloo/pair.cc:5] Connection closed by peer"),
        ),
        "its own": (
            0,
            NO_ROOM,
            1,
            LOST.format(0) + OR_HERE.format("no room in /dev/shm/nccl-a"),
        ),
        "silent": (
            0,
            SILENT,
            1,
            "rank 0: no answer from another rank within parallel.timeout_s; it hangs, or is still "
            "at work" + OR_HERE.format("[gloo/unbound_buffer.cc:78] Timed out waiting 5000ms"),
        ),
        "its wish": (0, "raise SystemExit(130)", 130, ""),
        "its value": (0, "return 7", 7, ""),
        "done": (0, "pass", 0, ""),
        "ctrl-c": (0, "raise KeyboardInterrupt", 130, ""),
    }
    running = {name: start(rank, body) for name, (rank, body, *_) in cases.items()}
    for name, (_, _, code, words) in cases.items():
        _, said = running[name].communicate(timeout=120)
        assert (running[name].returncode, said) == (code, words), name


def test_a_bug_shows_its_traceback_below_its_sentence():
    _, said = start(0, BUG).communicate(timeout=120)
    first, second, *_ = said.splitlines()
    assert first == "rank 0: ValueError: a bug"
    assert second == "Traceback (most recent call last):"
    _, said = start(0, MISTAKE, "--debug").communicate(timeout=120)
    assert said.startswith("rank 0: in words: lr is wrong.\nTraceback")


def test_a_rank_that_is_told_to_end_is_silent_about_what_the_first_says_too():
    """But says that it lost contact, where it did: nobody else may have seen it."""
    ends = []
    for body in (MISTAKE, CLOSED):
        rank = start(1, body)
        assert rank.stdout.readline() == "begins\n"
        # within the moment that it waits for the launcher
        time.sleep(1)
        rank.send_signal(signal.SIGTERM)
        ends.append((rank.communicate(timeout=60)[1], rank.returncode))
    assert ends == [("", 2), (f"{LOST.format(1)}.\n", 1)]
