"""A run that is cut off and resumed is the run that never was; damage is seen and passed over."""

import errno
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from hybridzoo.checkpoint import load
from hybridzoo.checkpoint.io import locked
from hybridzoo.errors import CheckpointError, ConfigError
from hybridzoo.train import loop, snapshot
from hybridzoo.train.log import read_log
from hybridzoo.train.loop import Trainer, train
from tests.train import runs


def losses(root):
    """The log without its clock."""
    records = read_log(root / "log.jsonl")
    return [{k: v for k, v in r.items() if k != "tokens_per_s"} for r in records]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """12 steps without a break."""
    directory = tmp_path_factory.mktemp("straight")
    train(runs.recipe(directory), console=runs.quiet())
    return directory / "run"


def assert_same_run(root, straight):
    assert losses(root) == losses(straight)
    for name in ("step-00000012", "best"):
        runs.assert_same(runs.weights(root / name), runs.weights(straight / name))
    for stem in ("optimizer", "average"):
        runs.assert_same(
            load_file(root / "step-00000012" / stem / "model.safetensors"),
            load_file(straight / "step-00000012" / stem / "model.safetensors"),
        )
    infos = [snapshot.read_info(r / "step-00000012") for r in (root, straight)]
    assert infos[0]["best"] == infos[1]["best"]


# 5 is no multiple of save_every; 4 has an evaluation
@pytest.mark.parametrize("cuts", [(6,), (5,), (1, 2, 4, 9)], ids=str)
def test_a_resumed_run_is_the_straight_run_to_the_bit(tmp_path, straight, cuts):
    recipe = runs.recipe(tmp_path)
    for i, step in enumerate(cuts):
        runs.run_until(recipe, step, resume=i > 0)
        # whatever the process drew in between
        torch.manual_seed(step)
    last = train(recipe, resume=True, console=runs.quiet())
    assert last.name == "step-00000012"
    assert_same_run(tmp_path / "run", straight)


def test_a_log_that_ran_ahead_of_the_checkpoint_is_cut_back(tmp_path, straight):
    """A kill at step 8 leaves the checkpoint of step 6, records up to 8 and half a line."""
    recipe = runs.recipe(tmp_path)
    runs.run_until(recipe, 6)
    with (tmp_path / "run" / "log.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 9.0}\n{"step": 8, "loss": 9.0}\n{"step": 9, "lo')
    train(recipe, resume=True, console=runs.quiet())
    assert_same_run(tmp_path / "run", straight)


def test_a_power_cut_in_log_and_pointer_stops_no_resume(tmp_path):
    """Blocks that never reached the disk come back as zeros, or as what was there before."""
    root = tmp_path / "run"
    train(runs.recipe(tmp_path, steps=3), console=runs.quiet())
    log = (root / "log.jsonl").read_bytes()
    (root / "log.jsonl").write_bytes(log + b"\0" * 40 + b"\n\xff\n3\n")
    (root / "latest").write_bytes(b"\xff\0")
    console = runs.quiet()
    assert (
        train(runs.recipe(tmp_path, steps=3), resume=True, console=console).name == "step-00000003"
    )
    assert "which is not there; looking for another" in runs.said(console)
    assert (root / "log.jsonl").read_bytes() == log


def test_resuming_a_finished_run_changes_nothing(tmp_path, straight):
    shutil.copytree(straight, tmp_path / "run")
    recipe = runs.recipe(tmp_path)
    again = tmp_path / "run"
    text = (again / "step-00000012" / "trainer.json").read_text()
    data = {**recipe.to_dict()["data"]}
    info = json.loads(text)
    info["recipe"]["data"]["source"] = data["source"]
    (again / "step-00000012" / "trainer.json").write_text(json.dumps(info))
    assert train(recipe, resume=True, console=runs.quiet()) == again / "step-00000012"
    assert_same_run(again, straight)


def test_a_resumed_run_remembers_its_best(tmp_path):
    """As if the steps before had reached a loss that no later one does."""
    recipe = runs.recipe(tmp_path)
    last = runs.run_until(recipe, 5)
    best = runs.weights(tmp_path / "run" / "best")
    info = snapshot.read_info(last)
    assert info["best"] == losses(tmp_path / "run")[4]["val_loss"]
    (last / "trainer.json").write_text(json.dumps({**info, "best": 0.001}))
    train(recipe, resume=True, console=runs.quiet())
    runs.assert_same(runs.weights(tmp_path / "run" / "best"), best)


def test_resume_of_nothing_starts_and_says_so(tmp_path):
    console = runs.quiet()
    recipe = runs.recipe(tmp_path, steps=1, eval_every=0)
    train(recipe, resume=True, console=console)
    root = tmp_path / "run"
    assert runs.said(console).startswith(f"{root}: no checkpoint yet; starting at step 0.\n")


CHANGES = [
    ("lr", {"lr": 0.5}),
    ("seed", {"seed": 1}),
    ("batch_size", {"batch_size": 2}),
    ("ema", {"ema": 0.0}),
    ("precision", {"precision": "bf16"}),
]


@pytest.mark.parametrize(("key", "change"), CHANGES, ids=lambda v: str(v))
def test_a_changed_recipe_is_refused_by_its_key(tmp_path, key, change):
    last = runs.run_until(runs.recipe(tmp_path), 3)
    with pytest.raises(ConfigError) as caught:
        train(runs.recipe(tmp_path, **change), resume=True, console=runs.quiet())
    assert str(caught.value) == (
        f"{key}: changed since {last} was written; a resumed run keeps its recipe. Restore the "
        "value, or train into another output."
    )


def test_a_changed_model_is_refused(tmp_path):
    recipe = runs.recipe(tmp_path)
    runs.run_until(recipe, 3)
    path = tmp_path / "model.yaml"
    path.write_text(runs.MODEL.replace("dropout: 0.2", "dropout: 0.1"))
    with pytest.raises(ConfigError, match=r"^model: .*model.yaml is not the model that "):
        train(recipe, resume=True, console=runs.quiet())


def test_free_keys_may_change(tmp_path):
    runs.run_until(runs.recipe(tmp_path), 3)
    free = {"steps": 4, "log_every": 2, "eval_every": 0, "save_every": 1, "keep_last": 1}
    last = train(runs.recipe(tmp_path, **free), resume=True, console=runs.quiet())
    assert last.name == "step-00000004"
    assert not (tmp_path / "run" / "step-00000003").exists()


def flip_last_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a flipped bit": lambda d: flip_last_byte(d / "optimizer" / "model.safetensors"),
    "a short file": lambda d: os.truncate(d / "model.safetensors", 100),
    "a missing file": lambda d: (d / "average" / "model.safetensors").unlink(),
    "no trainer.json": lambda d: (d / "trainer.json").unlink(),
    "half a trainer.json": lambda d: os.truncate(d / "trainer.json", 30),
    "no directory": shutil.rmtree,
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path, straight, what):
    recipe, console = runs.recipe(tmp_path), runs.quiet()
    last = runs.run_until(recipe, 9)
    assert last.name == "step-00000009"
    DAMAGE[what](last)
    train(recipe, resume=True, console=console)
    first, second = runs.said(console).splitlines()[:2]
    assert "step-00000009" in first
    assert second.startswith("resuming after step 6 from ")
    assert_same_run(tmp_path / "run", straight)


def test_pruning_counts_no_damaged_checkpoint(tmp_path):
    """After going back from a damaged step 9, step 7 is the newest and must not be pruned."""
    recipe = runs.recipe(tmp_path, keep_last=1, save_every=100)
    root = tmp_path / "run"
    runs.run_until(recipe, 6)
    shutil.copytree(root / "step-00000006", root / "step-00000009")
    (root / "latest").write_text("step-00000009\n")
    (root / "step-00000009" / "trainer.json").unlink()
    runs.run_until(recipe, 7, resume=True)
    assert [d.name for d in root.glob("step-*")] == ["step-00000007"]
    assert (root / "latest").read_text() == "step-00000007\n"


def test_nothing_intact_is_an_error(tmp_path):
    last = runs.run_until(runs.recipe(tmp_path), 2)
    (last / "trainer.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        train(runs.recipe(tmp_path), resume=True, console=runs.quiet())
    assert str(caught.value) == (
        f"{tmp_path / 'run'}: none of 1 checkpoints is intact (the oldest: trainer.json is "
        "missing); a run resumes from one. Train into another directory."
    )


def test_a_full_disk_is_a_sentence_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    runs.run_until(runs.recipe(tmp_path), 3)
    monkeypatch.setattr(loop, "save_slots", full)
    with pytest.raises(
        CheckpointError, match=r"step-00000006: cannot be written \(.*No space left"
    ):
        train(runs.recipe(tmp_path), resume=True, console=runs.quiet())
    assert not list((tmp_path / "run").glob("tmp-*"))
    assert snapshot.newest(tmp_path / "run", pytest.fail)[1]["step"] == 3


@pytest.mark.parametrize("resume", [False, True], ids=["new", "resume"])
def test_a_second_trainer_in_one_directory_is_refused_and_clears_nothing(tmp_path, resume):
    root = tmp_path / "run"
    half = root / "tmp-step-00000003"
    half.mkdir(parents=True)
    with (
        locked(root, "training into"),
        pytest.raises(CheckpointError, match="another process is training into it"),
    ):
        train(runs.recipe(tmp_path), resume=resume, console=runs.quiet())
    assert half.is_dir()


class Killed(BaseException):
    """Stands for SIGKILL: no handler of ours catches it."""


def dying(monkeypatch, at):
    """Let call number `at` of anything that changes the disk kill the process before it acts."""
    calls = iter(range(10**9))

    def guard(act):
        def guarded(*args, **kwargs):
            if next(calls) == at:
                raise Killed
            return act(*args, **kwargs)

        return guarded

    for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir"):
        monkeypatch.setattr(os, name, guard(getattr(os, name)))
    return calls


def test_a_kill_at_any_touch_of_the_disk_leaves_a_checkpoint(tmp_path, monkeypatch):
    """Every fsync, rename and unlink of a save with pruning, each with the kill right before it."""
    recipe = runs.recipe(tmp_path, keep_last=1)
    root = tmp_path / "run"
    old = runs.weights(runs.run_until(recipe, 1))
    new = runs.weights(runs.run_until(recipe, 2, resume=True))
    trainer = Trainer(recipe, True, runs.quiet())
    survivors = set()
    for at in range(200):
        shutil.rmtree(root)
        root.mkdir()
        for step, values in ((1, old), (2, new)):
            trainer.model.load_state_dict(values)
            trainer.step = step
            if step == 1:
                trainer._save()
        with monkeypatch.context() as patch:
            dying(patch, at)
            try:
                trainer._save()
                is_killed = False
            except Killed:
                is_killed = True
        directory, info = snapshot.newest(root, lambda line: pytest.fail(line))
        survivors.add(info["step"])
        runs.assert_same(dict(load(directory).state_dict()), {1: old, 2: new}[info["step"]])
        snapshot.remove_halves(root)
        assert not [p for p in root.iterdir() if p.name.startswith("tmp-")]
        if not is_killed:
            break
    assert at > 15
    assert survivors == {1, 2}
