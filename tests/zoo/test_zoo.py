"""The zoo: what it lists, what it loads, and what it says when it cannot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hybridzoo
from hybridzoo import HybridConfig, HybridLM, list_models, load
from hybridzoo.errors import CheckpointError, ConfigError
from hybridzoo.tokenizer import ByteTokenizer
from hybridzoo.zoo import entries, find_config, load_tokenizer_of

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {
    "name": "small",
    "d_model": 16,
    "vocab_size": 320,
    "pattern": "MA",
    "layers": {"M": {"kind": "mamba1", "d_state": 4}, "A": {"kind": "attention", "n_heads": 2}},
    "eos_token_id": 256,
}
CARD = """---
license: apache-2.0
library_name: hybridzoo
pipeline_tag: text-generation
tags: [mamba]
context: 512
---
# {}
"""


@pytest.fixture
def small_zoo(tmp_path, monkeypatch):
    """A zoo of two: `small` has embedded weights, `large` is published on the hub."""
    for folder in ("configs/train", "model_cards", "hybridzoo/zoo/weights"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "configs" / "train" / "recipe.yaml").write_text("steps: 1\n")
    for name in ("small", "large"):
        (tmp_path / f"configs/{name}.yaml").write_text(json.dumps({**CONFIG, "name": name}))
        (tmp_path / f"model_cards/{name}.md").write_text(CARD.format(name))
    large = tmp_path / "model_cards" / "large.md"
    large.write_text(large.read_text().replace("context: 512", "hub: them/Large-v1"))
    monkeypatch.setattr(entries, "_PACKAGE", tmp_path / "hybridzoo")
    monkeypatch.setattr(entries, "_WEIGHTS", tmp_path / "hybridzoo" / "zoo" / "weights")
    model = HybridLM(HybridConfig.from_dict(CONFIG), seed=3)
    model.save_pretrained(tmp_path / "hybridzoo/zoo/weights/small", dtype=torch.bfloat16)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_model_is_listed_by_name_with_what_its_files_say(small_zoo):
    large, small = list_models()
    config = HybridConfig.from_dict(CONFIG)
    assert small.to_dict() == {
        "name": "small",
        "pattern": "MA",
        "n_params": config.n_params(),
        "n_active_params": config.n_active_params(),
        "context": 512,
        "licence": "apache-2.0",
        "weights": "embedded",
        "has_weights": True,
        "config_path": str(small_zoo / "configs/small.yaml"),
        "card_path": str(small_zoo / "model_cards/small.md"),
    }
    assert (large.name, large.weights, large.context) == ("large", "them/Large-v1", None)
    assert not large.has_weights


def test_files_inside_the_package_are_preferred_as_a_wheel_has_them(small_zoo):
    inside = small_zoo / "hybridzoo" / "configs"
    inside.mkdir()
    (inside / "inner.yaml").write_text(json.dumps(CONFIG))
    assert [entry.name for entry in list_models()] == ["inner"]


def test_names_and_licences_come_without_torch():
    code = (
        "import sys; from hybridzoo.zoo import list_models; "
        "assert all(m.name and m.licence for m in list_models()); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_name_with_embedded_weights_loads_them(small_zoo):
    model = load("small")
    expected = HybridLM(HybridConfig.from_dict(CONFIG), seed=3, dtype=torch.bfloat16)
    assert model.config == expected.config
    for name, parameter in expected.named_parameters():
        got = model.get_parameter(name)
        assert got.dtype == parameter.dtype
        assert torch.equal(got, parameter), name


def test_dtype_that_is_asked_for_is_what_comes(small_zoo):
    model = load("small", dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_directory_loads_by_its_path_and_a_name_wins_over_one(small_zoo):
    other = HybridLM(HybridConfig.from_dict(CONFIG), seed=4)
    other.save_pretrained(small_zoo / "small")
    assert torch.equal(load("./small").embed.weight, other.embed.weight)
    assert torch.equal(load(small_zoo / "small").embed.weight, other.embed.weight)
    assert load("small").embed.weight.dtype == torch.bfloat16
    other.save_pretrained(small_zoo / "mine")
    assert torch.equal(load("mine").embed.weight, other.embed.weight)
    assert torch.equal(HybridLM.from_pretrained("mine").embed.weight, other.embed.weight)


def test_name_without_weights_says_where_they_are_and_how_to_build_random_ones(small_zoo):
    with pytest.raises(ConfigError) as caught:
        load("large")
    path = str(small_zoo / "configs/large.yaml")
    n = HybridConfig.load(path).n_params()
    assert str(caught.value) == (
        f"large: its weights do not ship with hybridzoo ({n:,} parameters, licence apache-2.0); "
        "they are published at https://huggingface.co/them/Large-v1. Run `hybridzoo download "
        f"large`, or build it with random ones: HybridLM(HybridConfig.load({path!r}))."
    )
    (small_zoo / "large").mkdir()
    with pytest.raises(ConfigError, match=r"Write \./large for the directory of that name, or bui"):
        load("large")
    (small_zoo / "large").rmdir()
    card = small_zoo / "model_cards" / "large.md"
    card.write_text(card.read_text().replace("hub: them/Large-v1\n", ""))
    with pytest.raises(
        ConfigError, match=r"none are published\. Build it with random ones: Hybrid"
    ):
        load("large")


MISTAKES = {
    "near name": (
        "smal",
        r"^'smal' is not a model of the zoo, nor a directory; did you mean small",
    ),
    "no name": ("", r"^'' is not a model of the zoo.*; `hybridzoo list` names all 2\. Use"),
    "path": ("./runs/none", r"^\./runs/none: no such file or directory; .*on the hub\. Check the"),
    "path in a folder": ("configs/none", r"^configs/none: no such file or directory"),
    "file": ("runs/none.yaml", r"^runs/none\.yaml: no such file or directory"),
    "path object": (Path("none"), r"^none: no such file or directory"),
    "config": (
        "configs/small.yaml",
        r"is a file; a checkpoint is a directory\. For random weights",
    ),
    "weights": ("w.safetensors", r"^w.safetensors: is a file; .* Pass its directory \(\.\)"),
}


@pytest.mark.parametrize("source, message", MISTAKES.values(), ids=MISTAKES)
def test_source_that_is_no_model_is_refused_in_one_sentence(small_zoo, source, message):
    (small_zoo / "w.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=message) as caught:
        load(source)
    assert "\n" not in str(caught.value)


def test_config_is_found_by_name_file_and_directory(small_zoo):
    config = HybridConfig.from_dict(CONFIG)
    assert find_config("small") == config
    assert find_config("large").name == "large"
    assert find_config("configs/small.yaml") == config
    assert find_config(small_zoo / "hybridzoo/zoo/weights/small") == config
    with pytest.raises(ConfigError, match="did you mean large"):
        find_config("lage")


def test_tokenizer_is_the_one_beside_the_weights(small_zoo):
    config = HybridConfig.from_dict(CONFIG)
    assert isinstance(load_tokenizer_of("small", config), ByteTokenizer)
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save("words.json")
    (small_zoo / "mine").mkdir()
    (small_zoo / "words.json").rename(small_zoo / "mine" / "words.json")
    named = config.with_options(tokenizer="words.json")
    assert load_tokenizer_of("mine", named).encode("b") == [1]
    with pytest.raises(ConfigError, match=r"words\.json: missing"):
        load_tokenizer_of("small", named)


@pytest.mark.parametrize("name", ["../secret.json", "{}/secret.json", "link.json"])
def test_tokenizer_outside_the_checkpoint_is_not_read(small_zoo, name):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save("secret.json")
    (small_zoo / "mine").mkdir()
    (small_zoo / "mine" / "link.json").symlink_to(Path("secret.json").resolve())
    config = HybridConfig.from_dict(CONFIG).with_options(tokenizer=name.format(Path.cwd()))
    with pytest.raises(CheckpointError, match="leads out of the directory"):
        load_tokenizer_of("mine", config)


@pytest.mark.parametrize("entry", list_models(), ids=lambda entry: entry.name)
def test_model_of_the_real_zoo_has_its_name_its_card_and_its_own_weights(entry):
    assert entry.config.name == entry.name
    assert entry.front.library_name == "hybridzoo"
    if entry.has_weights:
        assert find_config(entry.weights_path) == entry.config
        model = hybridzoo.load(entry.name)
        assert model.generate(torch.tensor([[10]]), max_new_tokens=2, seed=0).shape == (1, 3)


def test_loaded_model_drops_nothing_until_it_is_asked_to_train():
    config = find_config("shakespeare")
    assert config.dropout > 0
    model = load("shakespeare", dtype=torch.float32)
    ids = torch.arange(40, 60)[None]
    assert torch.equal(model(ids), model(ids))
    assert not torch.equal(model.train()(ids), model(ids))
