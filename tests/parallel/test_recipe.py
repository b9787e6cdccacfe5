"""Recipes: what they read, and the sentence for each mistake."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from hybridzoo.errors import ConfigError
from hybridzoo.parallel.recipe import FREE_KEYS, Recipe
from hybridzoo.tokenizer import ByteTokenizer
from hybridzoo.train.documents import load_documents
from tests.train import runs

RECIPES = sorted((Path(__file__).parents[2] / "configs" / "train").glob("*.yaml"))
NEEDED = {
    "model": "m.yaml",
    "data": {"source": "t.txt", "seq_len": 8},
    "output": "o",
    "steps": 10,
    "batch_size": 4,
    "lr": 0.1,
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_names_a_model_that_is_there(path):
    assert Path(Recipe.load(path).model).is_file()


def test_a_recipe_survives_the_way_through_plain_values():
    recipe = Recipe.from_dict(NEEDED | {"betas": [0.8, 0.9], "clip_norm": None})
    assert Recipe.from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe


def test_paths_are_relative_to_the_file_and_output_to_the_caller(tmp_path):
    path = tmp_path / "deep" / "r.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(NEEDED))
    recipe = Recipe.load(path, output="elsewhere", steps=3)
    assert recipe.model == str(path.parent / "m.yaml")
    assert recipe.data.source == str(path.parent / "t.txt")
    assert (recipe.output, recipe.steps) == ("elsewhere", 3)
    data = {"source": "shakespeare", "seq_len": 8}
    path.write_text(yaml.safe_dump(NEEDED | {"data": data}))
    assert Recipe.load(path).data.source == "shakespeare"
    path.write_text(yaml.safe_dump(NEEDED | {"data": data | {"source": "my text"}}))
    assert Recipe.load(path).data.source == str(path.parent / "my text")


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    path = tmp_path / "r.yaml"
    data = {"source": "~/t*.txt", "seq_len": 8, "tokenizer": "~/tok.json"}
    path.write_text(yaml.safe_dump(NEEDED | {"model": "~/m", "output": "~/o", "data": data}))
    recipe = Recipe.load(path)
    assert (recipe.model, recipe.output) == ("/home/me/m", "/home/me/o")
    assert (recipe.data.source, recipe.data.tokenizer) == ("/home/me/t*.txt", "/home/me/tok.json")
    assert Recipe.load(path, output="~/p").output == "/home/me/p"


def test_brackets_in_the_recipes_directory_are_no_part_of_a_glob(tmp_path):
    path = tmp_path / "a [1]" / "r.yaml"
    path.parent.mkdir()
    (path.parent / "t.txt").write_text("text of a document")
    path.write_text(yaml.safe_dump(NEEDED | {"data": {"source": "*.txt", "seq_len": 8}}))
    source = Recipe.load(path).data.source
    assert load_documents(source, ByteTokenizer(), "all").n_bytes == 18


MISTAKES = [
    ({"stpes": 3}, "stpes is not a key of a recipe; did you mean steps? its keys: model, data,"),
    ({"steps": 0}, "steps: too small (0); it must be at least 1. Use a larger number."),
    ({"steps": "many"}, "steps: wrong type ('many'); expected a whole number. Change the value."),
    ({"lr": -1.0}, "lr: out of range (-1.0); it must be above 0. Change the value."),
    ({"lr": float("nan")}, "lr: "),
    (
        {"accumulate": 3},
        "accumulate: (3) must divide batch_size (4). Use a divisor of it.",
    ),
    (
        {"schedule": "cosin"},
        "schedule: unknown choice ('cosin'); did you mean cosine? use one of: cosine, constant,",
    ),
    ({"betas": [0.9]}, "betas: wrong type ([0.9]); expected a list of 2 values."),
    (
        {"betas": [0.9, 1.0]},
        "betas: out of range ((0.9, 1.0)); it must lie in 0..1, 1 excluded. Change the value.",
    ),
    ({"ema": 1.0}, "ema: out of range (1.0); it must lie in 0..1, 1 excluded. Change the value."),
    ({"clip_norm": 0.0}, "clip_norm: out of range (0.0); it must be above 0, or null."),
    ({"precision": "fp16"}, "precision: unknown choice ('fp16'); "),
    ({"decay_ratio": 0.0}, "decay_ratio: out of range (0.0); it must lie in 0..1, 0 excluded."),
    ({"min_lr_ratio": 1.5}, "min_lr_ratio: out of range (1.5); it must lie in 0..1."),
    ({"compile": "yes please"}, "compile: wrong type ('yes please'); expected true or false."),
    ({"seed": -1}, "seed: too small (-1); it must be at least 0."),
    (
        {"parallel": {"sequence_parallel": True}},
        "parallel.sequence_parallel: (true) needs tp above 1; its ranks share the tokens. Set tp,",
    ),
    ({"data": "t.txt"}, "data: expected keys of a recipe's data ('t.txt'); write a mapping"),
    ({"data": {"source": "t.txt"}}, "data.seq_len is missing; a recipe's data needs it."),
    (
        {"data": {"source": "t", "seq_len": 8, "packing": "tight"}},
        "data.packing: unknown choice ('tight'); use one of: documents, none.",
    ),
]


@pytest.mark.parametrize(("change", "sentence"), MISTAKES, ids=lambda v: str(v)[:40])
def test_a_mistake_is_one_sentence_that_names_file_key_and_value(tmp_path, change, sentence):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(NEEDED | change))
    with pytest.raises(ConfigError) as caught:
        Recipe.load(path)
    assert str(caught.value).startswith(f"{path}: {sentence}")
    assert "\n" not in str(caught.value)


def test_a_recipe_made_in_code_is_checked_too(tmp_path):
    with pytest.raises(ConfigError, match=r"^steps: too small|^recipe.steps: too small"):
        dataclasses.replace(runs.recipe(tmp_path), steps=0)


def other_value(value):
    """A value of the same type that is not `value`."""
    others = {"cosine": "wsd", "fp32": "bf16", "auto": "cpu", "none": "documents"}
    if isinstance(value, bool):
        return not value
    if isinstance(value, dict):
        return value | {"tp": 2}
    if isinstance(value, str):
        return others.get(value, value + "x")
    return [0.1, 0.2] if isinstance(value, list) else 0.5 if value is None else value + 1


@pytest.mark.parametrize("key", [f.name for f in dataclasses.fields(Recipe)])
def test_every_key_but_the_free_ones_makes_another_run(key):
    recipe = Recipe.from_dict(NEEDED)
    plain = recipe.to_dict()
    if key == "data":
        for inner, value in plain["data"].items():
            changed = {**plain, "data": {**plain["data"], inner: other_value(value)}}
            assert recipe.changed_key(changed) == f"data.{inner}"
        return
    changed = recipe.changed_key({**plain, key: other_value(plain[key])})
    # the trainer compares the configs, so that a moved file is still the same model
    assert changed == (None if key in FREE_KEYS | {"model"} else key)
