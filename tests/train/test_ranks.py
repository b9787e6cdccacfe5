"""The trainer on several ranks: the run of one process, whatever the layout, also resumed."""

import errno
import hashlib
import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from hybridzoo.errors import ConfigError, HybridzooError
from hybridzoo.parallel import init
from hybridzoo.tokenizer import load_tokenizer
from hybridzoo.train import loop, snapshot
from hybridzoo.train.data import PackedData
from hybridzoo.train.held_out import held_out
from hybridzoo.train.log import read_log
from hybridzoo.train.loop import Trainer, train
from tests import gloo
from tests.train import runs

# DeepSpeed on several processes: minutes, of which the quick suite has ten
pytestmark = pytest.mark.slow

# balance losses are of each rank's own tokens, and dropout of each data-parallel rank's
PLAIN = {"dropout: 0.2": "dropout: 0.0", "n_experts: 3": "n_experts: 4, aux_loss: 0.0"}
LAYOUTS = {
    "tp": (2, {"tp": 2}),
    "sequence": (2, {"tp": 2, "sequence_parallel": True}),
    "pp": (2, {"pp": 2, "balance": "auto"}),
    "zero 1": (2, {"zero_stage": 1}),
    "zero 2": (2, {"zero_stage": 2}),
    "zero 3": (2, {"zero_stage": 3}),
    "ep": (2, {"ep": 2}),
    "tp x pp": (4, {"tp": 2, "pp": 2, "balance": "auto"}),
    "tp x dp": (4, {"tp": 2, "zero_stage": 2, "sequence_parallel": True}),
}


def recipe(directory, layout=None, **changes):
    parallel = {} if layout is None else LAYOUTS[layout][1]
    made = runs.recipe(directory, **{"parallel": parallel, "accumulate": 2, "steps": 8} | changes)
    text = runs.MODEL
    for old, new in PLAIN.items():
        text = text.replace(old, new)
    (directory / "model.yaml").write_text(text)
    return made


def trained(_, made, resume=False):
    """What a run ends with on this rank: its last checkpoint, its lines, its exit or error."""
    console = runs.quiet()
    # DeepSpeed asks for it, and the pool is no launcher
    os.environ["LOCAL_RANK"] = "0"
    try:
        last = train(made, resume=resume, console=console)
    except HybridzooError as error:
        return type(error).__name__, str(error), runs.said(console)
    except SystemExit as end:
        return "SystemExit", end.code, runs.said(console)
    return "done", last.name, runs.said(console)


def spread(layout, made, resume=False):
    return gloo.run(LAYOUTS[layout][0], trained, made, resume)


def losses(directory):
    return [{**r, "tokens_per_s": 0} for r in read_log(directory / "run" / "log.jsonl")]


def assert_close(found, expected):
    """The same records, to what fp32 sums in another order and 8 steps of AdamW make of it."""
    assert [r.keys() for r in found] == [r.keys() for r in expected]
    for one, other in zip(found, expected, strict=True):
        numbers = [k for k, v in other.items() if isinstance(v, float)]
        for key in numbers:
            assert one[key] == pytest.approx(other[key], rel=2e-4, abs=1e-6), (key, other["step"])


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The run of one process, with an average of the weights and without."""
    made = {}
    for ema in (0.9, 0.0):
        made[ema] = tmp_path_factory.mktemp("straight")
        train(recipe(made[ema], ema=ema), console=runs.quiet())
    return made


def slow_where_four(layouts):
    marks = {2: (), 4: pytest.mark.slow}
    return [pytest.param(name, marks=marks[LAYOUTS[name][0]], id=name) for name in layouts]


@pytest.mark.parametrize("layout", slow_where_four(LAYOUTS))
def test_ranks_train_as_one_process_does(tmp_path, straight, layout):
    ema = 0.0 if layout == "zero 3" else 0.9
    ends = spread(layout, recipe(tmp_path, layout, ema=ema))
    assert [end[:2] for end in ends] == [("done", "step-00000008")] * len(ends)
    assert_close(losses(tmp_path), losses(straight[ema]))
    # rank 0 alone speaks
    assert f"{len(ends)} ranks: tp " in ends[0][2]
    assert not any(said for *_, said in ends[1:])


@pytest.mark.parametrize("layout", ["tp", "pp", "zero 2"])
def test_a_run_resumed_at_its_layout_is_the_straight_run_to_the_bit(tmp_path, layout):
    for name, cuts in (("straight", [8]), ("cut", [3, 5, 8])):
        (tmp_path / name).mkdir()
        made = recipe(tmp_path / name, layout)
        for i, steps in enumerate(cuts):
            # dropout too
            (tmp_path / name / "model.yaml").write_text(runs.MODEL)
            gloo.run(2, stopped, made, steps, i > 0)
    assert losses(tmp_path / "cut") == losses(tmp_path / "straight")
    for name in ("step-00000008", "best"):
        found = [runs.weights(tmp_path / n / "run" / name) for n in ("cut", "straight")]
        runs.assert_same(*found)


def stopped(_, made, step, resume):
    """A run that a signal to the last rank cuts off after some steps."""
    os.environ["LOCAL_RANK"] = "0"
    spread = made.parallel
    parallel = init(tp=spread.tp, pp=spread.pp)
    trainer = Trainer(made, resume, runs.quiet(), parallel)
    update = trainer._update

    def signalled(batches):
        outcome = update(batches)
        if trainer.step == step and dist.get_rank() == dist.get_world_size() - 1:
            caught.append(signal.SIGTERM)
        return outcome

    trainer._update, caught = signalled, []
    trainer.run(caught)
    return trainer.step, trainer.signal


@pytest.mark.parametrize(("before", "after"), [("tp", "pp"), ("zero 2", None), (None, "zero 3")])
def test_a_run_goes_on_at_another_layout(tmp_path, straight, before, after):
    ema = 0.0 if after == "zero 3" else 0.9
    for layout, steps in ((before, 4), (after, 8)):
        made = recipe(tmp_path, layout, steps=8, ema=ema)
        if layout is None:
            runs.run_until(made, steps, resume=steps == 8)
        else:
            found = gloo.run(2, stopped, made, steps, steps == 8)
            assert [at for at, _ in found] == [steps, steps]
    assert_close(losses(tmp_path), losses(straight[ema]))


def failing(_, made):
    """Rank 1 finds the disk full when it writes its moments, in the second checkpoint."""

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save, write = loop.save_slots, os.pwrite
    # moments and average of step 3, then moments of step 6
    calls = iter([write, write, full, full])

    def saved(*args):
        os.pwrite = next(calls)
        save(*args)

    if dist.get_rank() == 1:
        loop.save_slots = saved
    try:
        return trained(_, made)
    finally:
        loop.save_slots, os.pwrite = save, write


def test_a_disk_that_is_full_for_one_rank_is_one_error_on_all(tmp_path):
    ends = gloo.run(2, failing, recipe(tmp_path, "zero 1"))
    kind, said, _ = ends[0]
    assert (kind, said) == ends[1][:2]
    assert kind == "CheckpointError"
    assert said.startswith(f"{tmp_path}/run/step-00000006: cannot be written (rank 1: ")
    assert "No space left on device" in said
    assert sorted(p.name for p in (tmp_path / "run").glob("*step*")) == ["step-00000003"]
    assert snapshot.newest(tmp_path / "run", pytest.fail)[1]["step"] == 3


def unreadable(_, made):
    """Rank 1 cannot read back its share of the first checkpoint's files."""
    known = snapshot._digest

    def failed(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    if dist.get_rank() == 1:
        snapshot._digest = failed
    try:
        return trained(_, made)
    finally:
        snapshot._digest = known


def test_files_that_one_rank_cannot_read_back_are_one_error_on_all(tmp_path):
    ends = gloo.run(2, unreadable, recipe(tmp_path, "zero 1"))
    kind, said, _ = ends[0]
    assert (kind, said) == ends[1][:2]
    assert said.startswith(f"rank 1: {tmp_path}/run/step-00000003: cannot be written (")
    assert "Input/output error" in said
    assert not list((tmp_path / "run").glob("*step*"))


def checked(_, directory):
    """What is wrong with a checkpoint, and which files this rank read to know."""
    known, read = snapshot._digest, []

    def noted(path):
        read.append(path.name)
        return known(path)

    snapshot._digest = noted
    try:
        return snapshot.why_broken(directory), read
    finally:
        snapshot._digest = known


def test_ranks_share_the_reading_of_a_checkpoint(tmp_path):
    (tmp_path / "step").mkdir()
    names = ["a", "b", "c"]
    for name in names:
        (tmp_path / "step" / name).write_text(name)
    files = {name: hashlib.sha256(name.encode()).hexdigest() for name in names}
    (tmp_path / "step" / "trainer.json").write_text(json.dumps({"files": files}))
    assert gloo.run(2, checked, tmp_path / "step") == [("", ["a", "c"]), ("", ["b"])]
    (tmp_path / "step" / "b").write_text("B")
    broken = gloo.run(2, checked, tmp_path / "step")
    assert [said for said, _ in broken] == ["b is damaged"] * 2


def told(_, made):
    """What each rank hears of a held-out loss that came out a last bit higher on rank 1."""
    engine = SimpleNamespace(model=runs.model(), recipe=made)
    engine.evaluate = lambda batches: (2.0 + dist.get_rank() * 2**-51, 1)
    data = PackedData([runs.TEXT] * 20, load_tokenizer("bytes"), seq_len=24, batch_size=2)
    return held_out(engine, data)[0]


def test_the_held_out_loss_is_the_same_to_the_last_bit_on_all(tmp_path):
    assert gloo.run(2, told, recipe(tmp_path)) == [2.0, 2.0]


REFUSED = {
    "shares": (
        {"batch_size": 2},
        "batch_size: (2) must be a multiple of dp (2) x accumulate (2). Use a multiple of 4.",
    ),
    "average": (
        {"parallel": {"zero_stage": 3}},
        "parallel.zero_stage: (3) cannot work with ema 0.9; no rank has all weights to average. "
        "Use zero_stage 0, 1 or 2, or ema 0.",
    ),
    "letter": (
        {"parallel": {"recompute": {"Q": "full"}}},
        "parallel.recompute: no such letter ('Q'); the pattern has S, F, M, A, E. Use one of them.",
    ),
    "layout": (
        {"parallel": {"tp": 3}},
        "parallel: 2 ranks cannot be laid out as tp 3 x pp 1; the product divides their number. "
        "Use a product of 1, 2, or start 3 ranks.",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_ranks_cannot_do_is_the_same_sentence_on_all(tmp_path, what):
    change, sentence = REFUSED[what]
    ends = gloo.run(2, trained, recipe(tmp_path, "zero 1", **change))
    assert [end[:2] for end in ends] == [("ConfigError", sentence)] * 2
    assert not (tmp_path / "run").exists()


def test_the_directory_of_another_run_is_refused_on_all_ranks(tmp_path):
    made = recipe(tmp_path, "zero 1", steps=1, eval_every=0)
    gloo.run(2, trained, made)
    ends = gloo.run(2, trained, made)
    assert ends[0][:2] == ends[1][:2]
    assert "rank 0: output: " in ends[0][1]
    assert "already holds step-" in ends[0][1]


def test_one_process_refuses_a_deepspeed_config_that_it_would_not_read(tmp_path):
    with pytest.raises(ConfigError, match=r"^parallel.deepspeed: ds.json would not be read; "):
        train(recipe(tmp_path, parallel={"deepspeed": "ds.json"}), console=runs.quiet())
