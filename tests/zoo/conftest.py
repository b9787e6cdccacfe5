"""What the hub's tests share: a server of their own, a small checkpoint, the command line."""

import shutil
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from hybridzoo import HybridConfig, HybridLM, cli
from hybridzoo.checkpoint import save
from hybridzoo.checkpoint.golden import seal
from tests.hub_server import TOKEN, Hub

CONFIG = {
    "name": "small",
    "d_model": 16,
    "vocab_size": 320,
    "pattern": "MA",
    "layers": {"M": {"kind": "mamba1", "d_state": 4}, "A": {"kind": "attention", "n_heads": 2}},
    "eos_token_id": 256,
}
CARD = "---\nlicense: apache-2.0\n---\n# small\n"


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
