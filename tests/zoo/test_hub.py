"""The hub: what goes up comes down and talks; whatever goes wrong is a sentence, the cache sound.

The client is huggingface_hub as it is installed, the server tests/hub_server.py on the loopback.
"""

import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, try_to_load_from_cache

from hybridzoo import HybridConfig, HybridLM, cli, load
from hybridzoo.checkpoint import save
from hybridzoo.checkpoint.golden import seal, write_sums
from hybridzoo.errors import CheckpointError, ConfigError, HubError
from hybridzoo.zoo import cache, client, find_config, hub
from hybridzoo.zoo.publish import publish
from tests.families import tiny
from tests.hub_server import TOKEN, Hub, git_id, sha256

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {
    "name": "small",
    "d_model": 16,
    "vocab_size": 320,
    "pattern": "MA",
    "layers": {"M": {"kind": "mamba1", "d_state": 4}, "A": {"kind": "attention", "n_heads": 2}},
    "eos_token_id": 256,
}
CARD = "---\nlicense: apache-2.0\n---\n# small\n"
REPO = "org/small"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A whole small model with its card, golden values and checksums."""
    directory = tmp_path_factory.mktemp("checkpoint") / "small"
    save(HybridLM(HybridConfig.from_dict(CONFIG), seed=5), directory)
    (directory / "README.md").write_text(CARD)
    seal(directory)
    return directory


@pytest.fixture
def source(checkpoint, tmp_path):
    """A copy of it, to be spoilt."""
    return Path(shutil.copytree(checkpoint, tmp_path / "source"))


@pytest.fixture(scope="module")
def files(checkpoint):
    return {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.is_file()}


@pytest.fixture
def waits(monkeypatch):
    """Nobody sleeps; the seconds that would have been slept."""
    found = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub of its own, as HF_ENDPOINT, with an empty cache and a token."""
    with Hub() as found:
        where = found.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", where)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.chdir(tmp_path)
        yield found
        huggingface_hub.close_session()


@pytest.fixture
def run(monkeypatch, capfd):
    """Run a command line in this process; its exit code, stdout and stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["hybridzoo", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code or 0, *capfd.readouterr()

    return call


def test_what_is_published_is_downloaded_loaded_and_talks(server, checkpoint, files, run):
    code, out, err = run("publish", checkpoint, REPO)
    assert (code, err) == (0, "")
    commit = server.repos[REPO].refs["main"]
    assert f"{REPO} (private): commit {commit}" in out
    there = server.files(REPO)
    assert {name: there[name] for name in files} == files
    assert server.repos[REPO].private

    code, out, err = run("download", REPO)
    assert (code, err) == (0, f"{REPO}: commit {commit}\n")
    path = Path(out.strip())
    assert path.is_relative_to(constants.HF_HUB_CACHE)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == files

    want = load(checkpoint).state_dict()
    got = load(REPO).state_dict()
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)

    talk = ["--prompt", "To be", "--max-new-tokens", "8", "--temperature", "0"]
    expected = run("generate", checkpoint, *talk, "--quiet")
    assert run("generate", REPO, *talk, "--quiet") == expected
    code, out, err = run("generate", REPO, *talk, "--revision", commit)
    assert (code, out) == expected[:2]
    assert err.startswith(f"{REPO}: commit {commit}, from the cache\nsmall: ")
    assert run("verify", REPO)[0] == 0
