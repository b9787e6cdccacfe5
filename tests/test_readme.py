"""The README is true: its tree is the repository's, and each of its blocks runs.

The tree is the fenced block with a line `hybridzoo/`: two spaces of indent a level, one entry a
line, folders end in `/`, then at least two spaces and what the entry is. A folder's line stands for
its `__init__.py` too.

Blocks of yaml are models: each is built on the meta device and written to `<its name>.yaml`. Blocks
of python run one after the other in one namespace; each block of bash runs by itself. Either has a
fresh folder that holds the yaml files, links to the repository's own files and `hybridzoo`. The hub
is a loopback one that has a small model under the name of mamba-130m's repository.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import hybridzoo
from tests.families import tiny
from tests.hub_server import TOKEN, Hub

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
# lines that set a machine up: tests/test_wheel.py runs these scripts in a fresh copy (slow)
SETUP = re.compile(r"^(git clone|cd |pip install|source |bash scripts/(quickstart|test)\.sh)")


def blocks_of(language: str) -> list[str]:
    return [body for name, body in BLOCKS if name == language]


def tracked_files() -> list[str]:
    """What git tracks, and what it does not ignore; both must be in the tree."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [name for name in listed.splitlines() if (ROOT / name).exists()]


def tree_paths() -> list[str]:
    """The paths that the README's tree names, folders with a trailing slash."""
    (tree,) = [body for _, body in BLOCKS if re.search(r"^hybridzoo/(\s|$)", body, re.MULTILINE)]
    parents, paths = [], []
    for line in filter(str.strip, tree.splitlines()):
        match = re.fullmatch(r"((?:  )*)(\S+)\s{2,}\S.*", line)
        assert match, f"README's tree: {line!r} is not 'indent name  what it is'"
        indent, name = match.groups()
        del parents[len(indent) // 2 :]
        assert len(parents) == len(indent) // 2, f"README's tree: {line!r} is indented too far"
        paths.append("".join(parents) + name)
        parents.append(name)
    return paths


def test_tree_names_nothing_that_does_not_exist():
    paths = tree_paths()
    assert len(paths) == len(set(paths))
    gone = [p for p in paths if not (ROOT / p).exists() or (ROOT / p).is_dir() != p.endswith("/")]
    assert not gone


def test_tree_has_a_line_for_each_top_level_entry_and_each_module():
    wanted = set()
    for name in tracked_files():
        top, slash, _ = name.partition("/")
        wanted.add(top + slash)
        if name.startswith("hybridzoo/") and name.endswith(".py"):
            wanted.add(name.removesuffix("__init__.py"))
    wanted.add("hybridzoo/__init__.py")
    assert not sorted(wanted - set(tree_paths()))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Where a block runs; the package itself comes from PYTHONPATH."""
    for name in {name.partition("/")[0] for name in tracked_files()} - {"hybridzoo"}:
        (tmp_path / name).symlink_to(ROOT / name)
    for body in blocks_of("yaml"):
        (tmp_path / f"{yaml.safe_load(body)['name']}.yaml").write_text(body)
    shim = tmp_path / "bin" / "hybridzoo"
    shim.parent.mkdir()
    shim.write_text(f"#!{sys.executable}\nfrom hybridzoo.cli import main\nmain()\n")
    shim.chmod(0o755)
    return tmp_path


@pytest.fixture
def hub(tmp_path_factory):
    """Variables that lead to a hub with a published Mamba and its tokenizer."""
    from tokenizers import Tokenizer, models

    directory = tiny("mamba", "plain", tmp_path_factory.mktemp("published") / "mamba").directory
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "space": 1, "state": 2}, unk_token="?"))
    tokenizer.save(str(directory / "tokenizer.json"))
    with Hub() as found:
        files = {path.name: path.read_bytes() for path in directory.iterdir()}
        found.add("state-spaces/mamba-130m-hf", files)
        home = str(tmp_path_factory.mktemp("hf"))
        yield {"HF_ENDPOINT": found.url, "HF_HOME": home, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}


def run(folder: Path, *command: str, **variables: str) -> None:
    environment = {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        **variables,
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"


def test_every_block_is_of_a_language_that_is_checked():
    assert {name for name, _ in BLOCKS} <= {"bash", "python", "yaml", "text", ""}


def test_yaml_blocks_build(folder):
    assert blocks_of("yaml")
    for body in blocks_of("yaml"):
        config = hybridzoo.HybridConfig.load(folder / f"{yaml.safe_load(body)['name']}.yaml")
        model = hybridzoo.HybridLM(config, device="meta")
        assert sum(p.numel() for p in model.parameters()) == config.n_params()


def test_python_blocks_run(folder):
    assert blocks_of("python")
    run(folder, sys.executable, "-c", "\n".join(blocks_of("python")))


def run_blocks():
    # a launch is minutes on two busy cores
    return [
        pytest.param(i, marks=[pytest.mark.slow] if "--num_gpus" in body else [])
        for i, body in enumerate(blocks_of("bash"))
    ]


@pytest.mark.parametrize("number", run_blocks())
def test_bash_blocks_run(folder, hub, number):
    lines = blocks_of("bash")[number].splitlines()
    for script in re.findall(r"\bscripts/\S+", "\n".join(lines)):
        assert (ROOT / script).is_file(), script
    run(folder, "bash", "-n", "-c", "\n".join(lines))
    commands = "\n".join(x for x in lines if not SETUP.match(x))
    run(folder, "bash", "-euo", "pipefail", "-c", commands, **hub)


@pytest.mark.parametrize("script", ["scripts/quickstart.sh", "scripts/test.sh"])
def test_the_two_commands_are_there(script):
    assert any(f"bash {script}" in body for body in blocks_of("bash"))
