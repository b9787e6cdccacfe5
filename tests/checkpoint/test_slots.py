"""Moments and averages: written by any layout of ranks, read by any other, or refused."""

import pytest
import torch
from safetensors.torch import load_file

from hybridzoo.checkpoint import save
from hybridzoo.checkpoint.slots import load_slots, save_slots
from hybridzoo.errors import CheckpointError
from tests import gloo
from tests.checkpoint import ranks
from tests.checkpoint.ranks import LAYOUTS, SLOTS, WORLDS, contents, make_model, slots_of

SLOW = {"tp2-ep2", "pp2-ep2", "ep2-dp2"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A model in bf16 and the slots of it that one process writes."""
    directory = tmp_path_factory.mktemp("written")
    model = make_model(dtype=torch.bfloat16)
    save(model, directory / "model")
    save_slots(directory / "slots", model, SLOTS, slots_of(model))
    return directory / "model", directory / "slots"


def test_slots_are_stored_in_full_under_canonical_names(written):
    model = make_model(dtype=torch.bfloat16)
    found = load_file(written[1] / "model.safetensors")
    trained = {name: p for name, p in model.config.params() if p.trained}
    assert found.keys() == {f"{name}:{slot}" for name in trained for slot in SLOTS}
    for name in trained:
        p = model.get_parameter(name).detach().float()
        assert torch.equal(found[f"{name}:exp_avg"], p * 0.5)
        assert torch.equal(found[f"{name}:exp_avg_sq"], p * -2)


@pytest.mark.parametrize(
    "layout", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in LAYOUTS]
)
def test_any_layout_reads_and_writes_the_slots_of_one_process(tmp_path, written, layout):
    model, slots = written
    world = WORLDS[layout]
    assert gloo.run(world, ranks.saves_slots, layout, model, tmp_path / "new") == [""] * world
    assert contents(tmp_path / "new") == contents(slots)
    assert min(gloo.run(world, ranks.loads_slots, layout, model, slots)) > 8


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failing_rank_leaves_the_old_slots(tmp_path, written, failing):
    model, _ = written
    gloo.run(2, ranks.saves_slots, "dp2", model, tmp_path)
    before = contents(tmp_path)
    answers = gloo.run(2, ranks.saves_slots, "dp2", model, tmp_path, failing)
    assert len(set(answers)) == 1 and answers[0].startswith(f"rank {failing}: {tmp_path}: cannot")
    assert contents(tmp_path) == before


def test_slots_of_a_float64_model_stay_exact(tmp_path):
    model = make_model(dtype=torch.float64)
    save_slots(tmp_path, model, ["average"], lambda name, slot: model.get_parameter(name) / 3)
    for name, values in load_slots(tmp_path, model, ["average"]):
        assert torch.equal(values["average"], model.get_parameter(name) / 3), name


def test_slots_fill_several_files(tmp_path, written):
    model = make_model(dtype=torch.bfloat16)
    save_slots(tmp_path, model, SLOTS, slots_of(model), max_shard_bytes=30_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    read = slots_of(model)
    for name, values in load_slots(tmp_path, model, SLOTS):
        assert torch.equal(values["exp_avg"], read(name, "exp_avg")), name


@pytest.mark.parametrize(
    ("slots", "change", "sentence"),
    [
        (("exp_avg",), {}, r"A_log:exp_avg_sq is unexpected; .* one tensor for each slot"),
        ((*SLOTS, "max"), {}, r"blocks.0.layer.A_log:max is missing"),
        (SLOTS, {"vocab_size": 24}, r"embed.weight:exp_avg is \(23, 16\), .* wants \(24, 16\)"),
    ],
)
def test_slots_of_another_run_are_refused_at_once(written, slots, change, sentence):
    model = make_model(dtype=torch.bfloat16, **change)
    with pytest.raises(CheckpointError, match=sentence):
        load_slots(written[1], model, slots)
