"""Cards: read, checked, rendered, taken by the hub's own client; their facts are counted."""

import importlib.util
import inspect
import re
import shlex
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData

from hybridzoo import HybridConfig, HybridLM
from hybridzoo.errors import ConfigError
from hybridzoo.zoo.card import Card, FrontMatter

ROOT = Path(__file__).resolve().parents[2]
CARDS = sorted((ROOT / "model_cards").glob("*.md"))
TEXT = """---
license: other
library_name: hybridzoo
pipeline_tag: text-generation
tags:
- mamba
- größe
language:
- en
license_name: a-licence
license_link: https://example.org/licence
hub: them/Model-v0.1
paper: arxiv:2403.19887
context: 4096
---
# A title

---
A line of three dashes belongs to the body.
"""


def test_card_is_read_as_written():
    card = Card.parse(TEXT)
    assert card.front == FrontMatter(
        license="other",
        library_name="hybridzoo",
        pipeline_tag="text-generation",
        tags=("mamba", "größe"),
        language=("en",),
        license_name="a-licence",
        license_link="https://example.org/licence",
        hub="them/Model-v0.1",
        paper="arxiv:2403.19887",
        context=4096,
    )
    assert card.body == "# A title\n\n---\nA line of three dashes belongs to the body.\n"


def test_rendered_card_is_the_same_text():
    assert Card.parse(TEXT).render() == TEXT


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_every_card_is_legal_and_in_canonical_form(path):
    assert Card.read(path).render() == path.read_text()


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_hub_client_takes_every_card(path):
    front = Card.read(path).front
    data = ModelCardData(**front.to_dict())
    assert data.to_dict() == front.to_dict()
    theirs = ModelCard(path.read_text())
    assert theirs.data.to_dict() == front.to_dict()
    assert theirs.text == Card.read(path).body


def test_keys_are_the_hub_s_own_but_for_three_of_ours():
    theirs = set(inspect.signature(ModelCardData).parameters)
    assert {f.name for f in fields(FrontMatter)} - theirs == {"hub", "paper", "context"}


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_licence_is_an_id_of_the_hub_or_has_a_name_and_a_text(path):
    front = Card.read(path).front
    assert front.license in ("apache-2.0", "other")
    assert (front.license == "other") == bool(front.license_name) == bool(front.license_link)


PUBLISHED = [path for path in CARDS if Card.read(path).front.hub]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_card_of_published_weights_says_where_they_are_and_that_they_are_not_measured(path):
    card = Card.read(path)
    assert card.front.base_model == card.front.hub
    assert f"[{card.front.hub}](https://huggingface.co/{card.front.hub})" in card.body
    assert f"](https://arxiv.org/abs/{card.front.paper.removeprefix('arxiv:')})" in card.body
    assert re.search(r"hybridzoo\s+has\s+not\s+(measured|run)\s+these\s+weights", card.body)
    assert card.body.startswith(f"# {path.stem}\n")


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_card_means_its_own_model_where_it_writes_a_name_of_the_zoo(path):
    meant = r"hybridzoo (?:convert|generate) (\S+)|hybridzoo\.load\(\"([^\"]+)"
    found = {"".join(pair) for pair in re.findall(meant, path.read_text())}
    assert found
    assert found & {path.stem for path in CARDS} <= {path.stem}


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_commands_of_a_card_follow_from_one_another(path):
    card = Card.read(path)
    blocks = re.findall(r"```bash\n(.*?)```", card.body, re.DOTALL)
    there = set()
    for words in (shlex.split(line) for block in blocks for line in block.splitlines()):
        if words[:2] == ["hybridzoo", "download"]:
            assert words[2] == path.stem and words[3:] in ([], ["--pickle"])
            there.add(words[2])
        elif words[:2] == ["hybridzoo", "convert"]:
            assert words[2] in there and words[4:] == ["--from-pickle"]
            there.add(words[3])
        elif words[:2] == ["hf", "download"]:
            assert words[3:5] == ["tokenizer.json", "--local-dir"] and words[5] in there
        elif words[:2] == ["hybridzoo", "generate"]:
            assert words[2] in there and words[3] == "--prompt"
        else:
            assert words == ["hf", "auth", "login"]


MISTAKES = {
    "no front matter": ("# Title\n", "card: no front matter; it is YAML between two lines of ---"),
    "open front matter": (TEXT.replace("\n---\n", "\n"), "card: no front matter"),
    "not YAML": (TEXT.replace("license: other", "license: [other"), "front matter is not YAML"),
    "not a mapping": ("---\n- a\n---\n", "expected keys of a model card"),
    "missing": (TEXT.replace("license: other\n", ""), "license is missing; a model card needs it"),
    "unknown": (
        TEXT.replace("hub:", "hubb:"),
        "hubb is not a key of a model card; did you mean hub?",
    ),
    "library": (TEXT.replace("hybridzoo", "mamba"), r"library_name: unknown choice \('mamba'\)"),
    "a number": (TEXT.replace("arxiv:2403", "2403"), r"paper: wrong type \(2403\.19887\)"),
    "paper": (TEXT.replace("arxiv:", "arXiv "), r"paper: wrong form .*it is arxiv:NNNN\.NNNNN"),
    "hub": (TEXT.replace("them/", ""), r"hub: wrong form \('Model-v0\.1'\); it is owner/name"),
    "hub path": (
        TEXT.replace("Model-v0.1", "Model/main"),
        r"hub: wrong form \('them/Model/main'\)",
    ),
    "licence": (TEXT.replace("license: other", "license: MIT"), r"license: wrong form \('MIT'\)"),
    "other": (TEXT.replace("license_name: a-licence\n", ""), "license: 'other' needs a name"),
    "context": (TEXT.replace("context: 4096", "context: 0"), r"context: too small \(0\)"),
}


@pytest.mark.parametrize("text, message", MISTAKES.values(), ids=MISTAKES)
def test_mistake_in_a_card_is_one_sentence_with_the_file(text, message, tmp_path):
    path = tmp_path / "model.md"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        Card.read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_missing_card_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.md: no such file"):
        Card.read(tmp_path / "none.md")


@pytest.fixture
def make_cards(monkeypatch):
    """The script, called in this process: what it exits with, None where all is well."""
    spec = importlib.util.spec_from_file_location("make_cards", ROOT / "scripts" / "make_cards.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["make_cards.py", *map(str, arguments)])
        try:
            script.main()
        except SystemExit as end:
            return end.code
        return None

    return run


def test_facts_of_every_card_are_those_of_its_config(make_cards):
    assert make_cards("--check") is None


@pytest.fixture
def copy(tmp_path):
    for folder in ("configs", "model_cards"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "configs" / "tiny-hybrid.yaml", tmp_path / "configs")
    shutil.copy(ROOT / "model_cards" / "tiny-hybrid.md", tmp_path / "model_cards")
    return tmp_path


def test_stale_facts_are_found_then_written_and_the_prose_is_kept(copy, make_cards):
    config, card = copy / "configs" / "tiny-hybrid.yaml", copy / "model_cards" / "tiny-hybrid.md"
    before = card.read_text()
    config.write_text(config.read_text().replace("d_ff: 160", "d_ff: 168"))
    checked = make_cards("--root", copy, "--check")
    assert checked == "out of date: tiny-hybrid.md; run python scripts/make_cards.py"
    assert card.read_text() == before
    assert make_cards("--root", copy) is None
    after = card.read_text()
    changed = HybridConfig.load(config)
    assert f"| parameters | {changed.n_params():,} |" in after
    model = HybridLM(changed, dtype=torch.bfloat16)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert f"| weights in bf16 | {weights / 1024:.2f} KiB |" in after
    in_fp32 = 4 * sum(p.numel() for p in model.parameters())
    assert f"| weights in fp32 | {in_fp32 / 1024:.2f} KiB |" in after
    least = weights + changed.state_bytes(4096)
    assert f"| least memory in bf16, weights and state at 4K | {least / 1024:.2f} KiB |" in after
    start, end = "<!-- facts:", "<!-- end of facts -->"
    assert after.partition(start)[0] == before.partition(start)[0]
    assert after.partition(end)[2] == before.partition(end)[2]
    assert make_cards("--root", copy, "--check") is None


def test_card_without_a_block_for_facts_is_refused(copy, make_cards):
    card = copy / "model_cards" / "tiny-hybrid.md"
    card.write_text(card.read_text().replace("<!-- end of facts -->\n", ""))
    said = make_cards("--root", copy)
    assert said.startswith("tiny-hybrid.md: no block for the facts; it begins with")
