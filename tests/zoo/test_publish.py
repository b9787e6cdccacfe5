"""Publishing: what goes up, to whom, and what never does."""

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from hybridzoo import HybridConfig, HybridLM, load
from hybridzoo.checkpoint import save
from hybridzoo.checkpoint.io import locked
from hybridzoo.comm import Axis, Parallel
from hybridzoo.errors import CheckpointError, ConfigError, HubError
from hybridzoo.zoo.card import Card
from hybridzoo.zoo.publish import publish
from tests.zoo.conftest import CONFIG

REPO = "org/small"
SECRET = "hf_" + "aB3" * 12


def test_it_is_private_unless_it_is_said(server, source):
    assert publish(source, REPO).private
    assert server.repos[REPO].private
    assert not publish(source, "org/open", private=False).private
    assert not server.repos["org/open"].private


@pytest.mark.parametrize("name", ["mine", "https://hub.example/you/mine", "you/"])
def test_name_without_an_owner_is_refused(source, name):
    with pytest.raises(ConfigError, match="not a repository's name; it is owner/name"):
        publish(source, name)


def test_public_repository_is_not_taken_for_a_private_one(server, source):
    server.add(REPO, {"README.md": b"mine"}, private=False)
    with pytest.raises(HubError, match=r"is public already; .* Pass --public \(private=False\)"):
        publish(source, REPO)
    assert server.files(REPO) == {"README.md": b"mine"}
    publish(source, REPO, private=False)
    server.repos[REPO].private = True
    with pytest.warns(UserWarning, match="is private and stays so"):
        assert publish(source, REPO, private=False).private


def test_dry_run_says_all_and_asks_nobody(server, source, files, run):
    (source / ".cache").mkdir()
    code, out, err = run("publish", source, REPO, "--dry-run")
    assert (code, err) == (0, "")
    for name in files:
        assert name in out
    assert f"{REPO} (private): a dry run: nothing was uploaded" in out
    assert "left out: .cache" in out
    assert server.requests == []
    (source / "README.md").unlink()
    (source / "SHA256SUMS").unlink()
    assert "README.md" in publish(source, REPO, dry_run=True, license="mit").files
    assert not (source / "README.md").exists()


PICKLES = dict.fromkeys(("a.bin", "b.PT", "c.pth", "d.pkl", "e.ckpt", "f.joblib"), b"weights")
PICKLES |= {"weights.dat": b"\x80\x04\x95", "archive": b"PK\x03\x04"}


@pytest.mark.parametrize("name", PICKLES)
def test_pickle_stays_here(server, source, name):
    (source / name).write_bytes(PICKLES[name])
    with pytest.raises(CheckpointError, match=rf"{name}: a pickle"):
        publish(source, REPO)
    assert server.requests == []


SECRETS = {
    ".env": b"",
    ".env.local": b"",
    "token": b"",
    "id_rsa": b"",
    "server.pem": b"",
    "credentials.json": b"{}",
    "notes.md": f"a\nb {SECRET}\n".encode(),
    "training_log.jsonl": json.dumps({"token": SECRET}).encode(),
    "key.txt": b"\n-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n",
    "run.sh": b"\nexport AWS_ACCESS_KEY_ID=AKIAABCDEFGHIJKLMNOP",
}
LINES = {"notes.md": 2, "training_log.jsonl": 1, "key.txt": 2, "run.sh": 2}


@pytest.mark.parametrize("name", SECRETS)
def test_secret_stays_here_and_out_of_the_sentence(server, source, run, name):
    (source / name).write_bytes(SECRETS[name])
    code, out, err = run("publish", source, REPO)
    assert code == 2
    where = f": line {LINES[name]} holds what looks like" if name in LINES else ": a name that sec"
    assert f"{name}{where}" in err
    assert err.count("\n") == 1
    assert SECRET not in out + err
    assert "AKIA" not in out + err
    assert server.requests == []


def test_model_that_fails_a_check_stays_here(server, source):
    weights = source / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(
        CheckpointError, match=r"^not published: .*SHA-256 is not that in SHA256SUMS"
    ):
        publish(source, REPO)
    weights.write_bytes(content[:-8])
    with pytest.raises(CheckpointError, match=r"^not published: .*model\.safetensors"):
        publish(source, REPO)
    weights.unlink()
    (source / "golden.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"^not published: .*no weights"):
        publish(source, REPO)
    with pytest.raises(CheckpointError, match=r"^not published: nowhere: no such directory"):
        publish("nowhere", REPO)
    assert server.requests == []


def test_model_with_a_value_that_is_no_number_stays_here(server, source):
    model = HybridLM(HybridConfig.from_dict(CONFIG), seed=5)
    with torch.no_grad():
        model.embed.weight[0, 0] = math.nan
    save(model, source)
    with pytest.raises(
        CheckpointError, match=r"^not published: .*embed\.weight has 1 NaN and 0 Inf"
    ):
        publish(source, REPO)
    assert server.requests == []


def test_save_that_was_cut_goes_up_as_it_was_checked(server, source, monkeypatch):
    replace, model = os.replace, HybridLM(HybridConfig.from_dict(CONFIG), seed=6)

    def cut(start, end):
        if Path(end) == source / "model.safetensors":
            raise KeyboardInterrupt
        replace(start, end)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cut)
        with pytest.raises(KeyboardInterrupt):
            save(model, source)
    assert (source / ".saved" / "model.safetensors").is_file()
    with (
        locked(source, "saving to"),
        pytest.raises(CheckpointError, match="another process is saving to it"),
    ):
        publish(source, REPO)
    assert server.requests == []
    publish(source, REPO)
    assert torch.equal(load(REPO).embed.weight, model.embed.weight)


def test_card_says_the_licence_or_is_written(server, source):
    (source / "README.md").write_text("# small\n")
    (source / "SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match=r"README\.md: no licence in its front matter"):
        publish(source, REPO)
    (source / "README.md").unlink()
    with pytest.raises(CheckpointError, match=r"README\.md: missing; .* --license apache-2\.0"):
        publish(source, REPO)
    publish(source, REPO, license="mit")
    card = Card.parse(server.files(REPO)["README.md"].decode())
    assert card.front.license == "mit"
    assert card.front.tags == ("attention", "mamba1")
    assert f'load("{REPO}")' in card.body
    # what is there is not written over
    assert publish(source, REPO, license="mit").commit
    with pytest.raises(
        CheckpointError, match=r"README\.md: its licence is 'mit', not 'apache-2\.0'; .*leave out"
    ):
        publish(source, REPO, license="apache-2.0", dry_run=True)
    assert Card.read(source / "README.md").front.license == "mit"


def test_what_the_last_version_had_and_this_one_has_not_goes(server, source, tmp_path):
    model = HybridLM(HybridConfig.from_dict(CONFIG), seed=6)
    model.save_pretrained(tmp_path / "sharded", max_shard_bytes=12_000)
    publish(tmp_path / "sharded", REPO, license="mit")
    server.repos[REPO].commit({**server.files(REPO), "paper.pdf": b"mine"})
    found = publish(source, REPO)
    assert "model.safetensors.index.json" in found.removed
    assert {n for n in server.files(REPO) if "safetensors" in n} == {
        "model.safetensors",
        "golden.safetensors",
    }
    assert server.files(REPO)["paper.pdf"] == b"mine"
    assert torch.equal(load(REPO).embed.weight, load(source).embed.weight)


def test_branch_is_made_and_main_stays(server, source, run):
    publish(source, REPO)
    before = server.repos[REPO].refs["main"]
    (source / "NOTICE").write_text("another")
    code, _, _ = run("publish", source, REPO, "--revision", "next")
    assert code == 0
    refs = server.repos[REPO].refs
    assert refs["main"] == before != refs["next"]
    assert load(REPO, revision="next").config.name == "small"


WHETHER = rf"; http://\S+/{REPO}/commits/main shows whether this was published\. Try again"
FAULTS = {
    "moved meanwhile": (
        lambda server, patch: server.fail(
            "POST", "/commit/", then=lambda: server.add(REPO, {"other": b""})
        ),
        r"changed while it was written to \(412\)" + WHETHER,
    ),
    "no token": (lambda server, patch: patch.delenv("HF_TOKEN"), r"\(401: .*[Ll]og in with|log in"),
    "read-only token": (
        lambda server, patch: server.fail("POST", "/commit/", status=403),
        r"not allowed \(403",
    ),
    "offline": (
        lambda server, patch: patch.setattr(constants, "HF_HUB_OFFLINE", True),
        "HF_HUB_OFFLINE is set",
    ),
    "dead endpoint": (
        lambda server, patch: patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9"),
        r"does not answer, or stops .*; nothing was published\.",
    ),
    "down": (
        lambda server, patch: server.fail("POST", "/commit/", 99, status=503),
        r"the hub is down \(503\)" + WHETHER,
    ),
    "storage down": (
        lambda server, patch: server.fail("PUT", "/lfs/", 99, status=503),
        r"the hub is down \(503\); nothing was published\. Try again",
    ),
    "storage busy for an hour": (
        lambda server, patch: server.fail(
            "PUT", "/lfs/", 99, status=429, headers={"Retry-After": "3600"}
        ),
        r"too many requests \(429\) and asks to wait 3600 s; nothing was published",
    ),
    "storage full": (
        lambda server, patch: server.fail("PUT", "/lfs/", 99, status=507),
        r"the hub refused \(507",
    ),
}


@pytest.mark.parametrize("spoil, message", FAULTS.values(), ids=FAULTS)
def test_fault_is_one_sentence_and_the_next_publication_is_whole(
    server, source, files, run, waits, monkeypatch, spoil, message
):
    server.add(REPO, {"README.md": b"before"}, private=True)
    with monkeypatch.context() as patch:
        spoil(server, patch)
        code, out, err = run("publish", source, REPO)
    assert (code, out) == (2, "")
    (sentence,) = [line for line in err.splitlines() if line.startswith("hybridzoo: ")]
    assert re.search(message, sentence), sentence
    assert "model.safetensors" not in server.files(REPO)
    assert max(waits, default=0) <= 120
    server.faults.clear()
    publish(source, REPO)
    assert {name: server.files(REPO)[name] for name in files} == files


# of an earlier version
STALE = {"model-00001-of-00002.safetensors": b""}


def test_commit_whose_answer_was_lost_is_found(server, source, files, waits):
    server.add(REPO, STALE, private=True)
    server.fail("POST", "/commit/", 1, status=504, lost=True)
    found = publish(source, REPO)
    repo = server.repos[REPO]
    assert found.commit == repo.refs["main"]
    assert found.removed == list(STALE)
    assert len(repo.trees) == 2
    assert server.files(REPO) == files


def test_commit_is_not_found_in_what_another_wrote(server, source, files, waits):
    flipped = files["config.json"][::-1]
    for other in ({"config.json": flipped}, {"README.md": b"other"}, STALE):
        server.add(REPO, STALE, private=True)
        tree = {**files, **other}
        server.fail("POST", "/commit/", then=lambda tree=tree: server.add(REPO, tree))
        with pytest.raises(HubError, match=r"\(412\)" + WHETHER):
            publish(source, REPO)


def test_commit_that_may_have_landed_is_not_denied(server, source, files, waits):
    server.add(REPO, {"README.md": b"before"}, private=True)

    def go_away():
        server.fail("GET", "/api/models/", 99, status=503)

    server.fail("POST", "/commit/", 1, status=504, lost=True, then=go_away)
    with pytest.raises(HubError, match=r"the hub is down \(503\)" + WHETHER):
        publish(source, REPO)
    assert {name: server.files(REPO)[name] for name in files} == files


def test_busy_storage_is_tried_again(server, source, waits):
    server.fail("PUT", "/lfs/", 2, status=503)
    publish(source, REPO)
    assert "model.safetensors" in server.files(REPO)


def test_model_in_memory_is_published(server):
    model = HybridLM(HybridConfig.from_dict(CONFIG), seed=7)
    model.push_to_hub(REPO, license="mit")
    assert server.repos[REPO].private
    assert torch.equal(load(REPO).embed.weight, model.embed.weight)


def test_model_that_is_spread_is_published_from_its_directory(server):
    model = HybridLM(HybridConfig.from_dict(CONFIG), device="meta")
    model.parallel = Parallel(dp=Axis(rank=0, world=2))
    with pytest.raises(ConfigError, match="push_to_hub: the model is spread over ranks"):
        model.push_to_hub(REPO, license="mit")
    assert server.requests == []
