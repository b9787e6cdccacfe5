"""Downloads: what was published comes and talks; what goes wrong is a sentence, the cache sound.

The client is huggingface_hub as it is installed, the server tests/hub_server.py on the loopback.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, snapshot_download

from hybridzoo import HybridConfig, HybridLM, list_models, load
from hybridzoo.checkpoint.golden import digest, write_sums
from hybridzoo.checkpoint.verify import verify
from hybridzoo.errors import ConfigError, HubError
from hybridzoo.zoo import cache, find_config, find_directory, hub
from tests.families import tiny
from tests.hub_server import TOKEN, Repo
from tests.zoo.conftest import CONFIG

ROOT = Path(__file__).resolve().parents[2]
REPO = "org/small"
WEIGHTS = "model.safetensors"


def model():
    """The one of the checkpoint."""
    return HybridLM(HybridConfig.from_dict(CONFIG), seed=5)


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


# what goes wrong on the way down


def flipped(content):
    return content[:-1] + bytes([content[-1] ^ 1])


def _change(path):
    return lambda server, patch: server.fail("GET", f"/resolve/.*{path}", change=flipped)


def _answer(method, path, status, times=99, **what):
    return lambda server, patch: server.fail(method, path, times, status=status, **what)


def _without(*names, **more):
    def spoil(server, patch):
        tree = server.files(REPO)
        server.add(REPO, {n: c for n, c in tree.items() if n not in names} | more)

    return spoil


def _set(owner, name, value):
    return lambda server, patch: patch.setattr(owner, name, value)


def _listed(path, oid):
    return lambda server, patch: server.listed_oids.update({path: oid})


def _no_room(*_, **__):
    raise OSError(28, "No space left on device")


def _token(token):
    return lambda server, patch: patch.setenv("HF_TOKEN", token)


def _is(**options):
    def spoil(server, patch):
        patch.delenv("HF_TOKEN")
        for name, value in options.items():
            setattr(server.repos[REPO], name, value)

    return spoil


INFO, FILE = f"/api/models/{REPO}$", "/resolve/.*safetensors"
CODE = "X-Error-Code"
FAULTS = {
    "wrong bytes": (_change(WEIGHTS), rf"{REPO}: {WEIGHTS} is not what the hub says"),
    "wrong bytes of a small file": (_change("config.json"), r"config\.json is not what the hub"),
    "hangs up": (
        lambda server, patch: server.fail("GET", FILE, 99, cut=0),
        r"127\.0\.0\.1:\d+ does not answer, or stops \(RemoteProtocolError",
    ),
    "too slow": (
        lambda server, patch: server.fail("GET", FILE, 99, delay=0.4),
        r"does not answer, or stops \(ReadTimeout",
    ),
    "no such repository": (lambda server, patch: server.repos.pop(REPO), r"no such repository"),
    "private": (_is(private=True), r"no such repository .* \(401\), or a private one"),
    "gated": (_is(gated=True), r"gated \(403\); .* Accept its terms at http://127"),
    "bad token": (_token("hf_wrong"), r"not allowed \(401: '?Invalid credentials"),
    "forbidden": (_answer("GET", INFO, 403), r"not allowed \(403: "),
    "listed and not there": (
        _answer("HEAD", FILE, 404, headers={CODE: "EntryNotFound"}),
        r"lists a file that it does not have \(404\)",
    ),
    "busy for an hour": (
        _answer("GET", INFO, 429, headers={"Retry-After": "3600"}),
        r"too many requests \(429\) and asks to wait 3600 s",
    ),
    "busy for an hour with a file": (
        _answer("GET", FILE, 429, headers={"Retry-After": "3600"}),
        r"too many requests \(429\) and asks to wait 3600 s",
    ),
    "busy for an hour with the listing": (
        _answer("GET", "/tree/", 429, headers={"Retry-After": "3600"}),
        r"too many requests \(429\) and asks to wait 3600 s",
    ),
    "busy for minutes in the words of the hub": (
        _answer("GET", FILE, 429, headers={"RateLimit": '"resolvers";r=0;t=290'}),
        r"too many requests \(429\) and asks to wait 290 s",
    ),
    # which of the two the client obeys
    "busy for minutes, said twice": (
        _answer("GET", FILE, 429, headers={"RateLimit": '"api";r=0;t=290', "Retry-After": "2"}),
        r"too many requests \(429\) and asks to wait 290 s",
    ),
    "down": (_answer("GET", INFO, 503), r"the hub is down \(503\); whole files are kept"),
    "down for a file": (_answer("GET", FILE, 503), r"the hub is down \(503\)"),
    "a web page": (
        _answer("GET", INFO, 200, body=b"<html>log in to the hotel's network"),
        r"an answer of .* that is cut or none of a hub's",
    ),
    "another server": (_answer("GET", INFO, 200, body=b"[1, 2]"), r"none of a hub's"),
    "no commit": (_answer("GET", INFO, 200, body=b'{"id": "org/small"}'), r"none of a hub's"),
    "an odd listing": (_answer("GET", "/tree/", 200, body=b'[{"type": "file"}]'), "of a hub's"),
    "a name with ..": (
        _without(**{"../../evil.json": b"{}"}),
        r"a file's name leads out of the directory \('\.\./\.\./evil",
    ),
    "wrong id": (_listed(WEIGHTS, "a" * 64), rf"{WEIGHTS} is not what the hub says .*a{{64}}"),
    "full disk": (
        _set(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 2**26)),
        r"bytes are to be downloaded and 67,108,864 are free .* set HF_HOME to another disk",
    ),
    "disk full meanwhile": (
        _set(huggingface_hub.file_download, "http_get", _no_room),
        r"no room left on the disk of .*cache",
    ),
    "offline": (_set(constants, "HF_HUB_OFFLINE", True), r"HF_HUB_OFFLINE is set"),
    "dead endpoint": (
        _set(constants, "ENDPOINT", "http://127.0.0.1:9"),
        r"http://127\.0\.0\.1:9 does not answer, or stops \(ConnectError",
    ),
    "no endpoint": (_set(constants, "ENDPOINT", "hub"), r"HF_ENDPOINT: no address \('hub'\)"),
    "no config": (_without("config.json"), rf"{REPO}: no config\.json"),
    "no weights": (_without(WEIGHTS, "SHA256SUMS"), r"no weights \(model\*\.safetensors\)"),
    "only pickles": (
        _without(WEIGHTS, **{"pytorch_model.bin": b"\x80\x02"}),
        rf"only pickled weights \(pytorch_model\.bin\); .*download {REPO} --pickle",
    ),
    "other checksums": (
        _without(**{"SHA256SUMS": f"{'0' * 64}  {WEIGHTS}\n".encode()}),
        rf"{WEIGHTS}: its SHA-256 is not that in SHA256SUMS of {REPO}",
    ),
    "no checksums": (_without(**{"SHA256SUMS": b"hello\n"}), r"SHA256SUMS: line 1 is not a check"),
}


@pytest.mark.parametrize("spoil, message", FAULTS.values(), ids=FAULTS)
def test_fault_is_one_sentence_and_the_next_download_is_right(
    server, files, run, waits, monkeypatch, spoil, message
):
    good = server.add(REPO, files)
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
        spoil(server, patch)
        code, out, err = run("download", REPO)
    assert (code, out) == (2, "")
    assert re.search(message, err), err
    sentences = [line for line in err.splitlines() if line.startswith("hybridzoo: ")]
    assert sentences == err.splitlines()[-1:]
    # seconds: nobody is kept waiting for an hour without a word
    assert max(waits, default=0) <= 120
    # the owner mends it
    server.faults.clear()
    server.listed_oids.clear()
    server.repos.setdefault(REPO, Repo()).gated = False
    again = server.add(REPO, files | {"chat_template.jinja": b"mended"})
    assert again != good
    got = load(REPO, revision=again)
    assert torch.equal(got.embed.weight, model().embed.weight)
    path = hub.download(REPO)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == server.files(REPO)
    code, out, _ = run("download", REPO, "--revision", good)
    if good in server.repos[REPO].trees:
        assert code == 0
        assert {p.name: p.read_bytes() for p in Path(out.strip()).iterdir()} == files


def test_busy_hub_is_asked_again_as_late_as_it_wants(server, files, waits):
    server.add(REPO, files)
    server.fail("GET", INFO, 1, status=429, headers={"Retry-After": "7"})
    server.fail("GET", INFO, 1, status=429, headers={"RateLimit": '"api";r=0;t=9'})
    server.fail("GET", INFO, 2, status=503)
    hub.download(REPO)
    # 7 and 9 as it says; then 4 and 8, each time twice as long
    assert [s for s in waits if s >= 2] == [7.0, 9.0, 4.0, 8.0]


def test_file_that_fails_for_a_moment_is_asked_for_again(server, files, waits):
    server.add(REPO, files)
    server.fail("GET", FILE, 2, status=503)
    path = hub.download(REPO)
    assert (path / WEIGHTS).read_bytes() == files[WEIGHTS]


def test_cut_stream_goes_on_where_it_stopped(server, files, waits, monkeypatch):
    server.add(REPO, files)
    # the client keeps whole pieces of a file, of 10 MB
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    ranges = []
    server.on_range = ranges.append
    server.fail("GET", f"/resolve/.*/{WEIGHTS}", 2, cut=1000)
    path = hub.download(REPO)
    assert (path / WEIGHTS).read_bytes() == files[WEIGHTS]
    assert ranges == ["bytes=1000-", "bytes=2000-"]


def test_second_attempt_fetches_only_what_is_missing(server, files, waits):
    server.add(REPO, files)
    server.fail("GET", f"/resolve/.*/{WEIGHTS}", 99, status=404)
    with pytest.raises(HubError):
        hub.download(REPO)
    server.faults.clear()
    server.requests.clear()
    path = hub.download(REPO)
    assert {p.name for p in path.iterdir()} == set(files)
    assert server.count("GET", "/resolve/") <= 2
    assert server.count("GET", "SHA256SUMS|config.json") == 0


def test_main_that_moves_meanwhile_is_served_as_it_was_listed(server, files):
    first = server.add(REPO, files)
    other = {**files, "config.json": b"{}", WEIGHTS: b"another"}
    server.fail("GET", "/tree/", 1, then=lambda: server.add(REPO, other))
    got = hub.fetch(REPO)
    assert got.commit == first != server.repos[REPO].refs["main"]
    assert {p.name: p.read_bytes() for p in got.path.iterdir()} == files


@pytest.mark.parametrize("is_link", [False, True])
def test_what_is_here_is_not_fetched_and_not_hashed_again(
    server, files, monkeypatch, tmp_path, is_link
):
    if is_link:
        (tmp_path / "disk").mkdir()
        Path(constants.HF_HUB_CACHE).symlink_to(tmp_path / "disk")
    commit = server.add(REPO, files)
    first = hub.fetch(REPO)
    server.requests.clear()
    hashed = []
    monkeypatch.setattr(cache, "digest", lambda path: hashed.append(path.name) or digest(path))
    assert hub.fetch(REPO) == first
    assert not any(name.endswith(".safetensors") for name in hashed)
    assert server.count("GET", "/resolve/") == 0
    # a commit cannot move: nobody is asked
    server.requests.clear()
    assert hub.fetch(REPO, revision=commit).path.samefile(first.path)
    assert server.requests == []


def test_file_that_changed_in_the_cache_is_seen_and_replaced(server, files):
    commit = server.add(REPO, files)
    blob = (hub.download(REPO) / WEIGHTS).resolve()
    blob.chmod(0o644)
    blob.write_bytes(flipped(files[WEIGHTS]))
    with pytest.raises(HubError, match=rf"{WEIGHTS} is not what the hub says .*the copy was remov"):
        load(REPO, revision=commit)
    assert (hub.download(REPO, revision=commit) / WEIGHTS).read_bytes() == files[WEIGHTS]


def test_what_another_tool_left_in_the_cache_is_checked_too(server, files, monkeypatch):
    server.add(REPO, files)
    server.fail("GET", f"/resolve/.*/{WEIGHTS}", 1, change=flipped)
    snapshot_download(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=f"{WEIGHTS} is not what the hub says"):
        load(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    snapshot_download(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(load(REPO).embed.weight, model().embed.weight)


def test_what_another_tool_downloaded_is_hashed_once(server, files, monkeypatch):
    commit = server.add(REPO, files)
    snapshot_download(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hashed = []
    monkeypatch.setattr(cache, "digest", lambda path, *_: hashed.append(path.name) or digest(path))

    def read_only(*_):
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_replace", read_only)
        load(REPO)
    load(REPO)
    assert hashed.count(WEIGHTS) == 2
    load(REPO)
    assert hashed.count(WEIGHTS) == 2
    # the other tool may have left files out: online the hub is asked whether it did
    assert cache.cached(REPO, commit, noted=True) is None
    blob = (cache.cached(REPO).path / WEIGHTS).resolve()
    blob.chmod(0o644)
    blob.write_bytes(flipped(files[WEIGHTS]))
    with pytest.raises(HubError, match=f"{WEIGHTS} is not what the hub says"):
        load(REPO)


def test_a_cache_that_may_only_be_read_serves_while_the_hub_answers(server, files, monkeypatch):
    server.add(REPO, files)
    path = Path(snapshot_download(REPO))

    def read_only(*_):
        raise PermissionError

    monkeypatch.setattr(cache, "_replace", read_only)
    assert hub.download(REPO) == path


def test_cache_is_the_one_that_other_tools_read(server, files, monkeypatch):
    path = Path(server.add(REPO, files) and hub.download(REPO))
    server.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert snapshot_download(REPO, allow_patterns=sorted(files)) == str(path)
    report = huggingface_hub.scan_cache_dir(constants.HF_HUB_CACHE)
    assert not report.warnings
    assert [r.repo_id for r in report.repos] == [REPO]


def test_blobs_that_repositories_share_are_read(server, files):
    """As huggingface_hub 2 keeps what came through Xet: a blob is a link to one of the cache's."""
    server.add(REPO, files)
    path = hub.download(REPO)
    blob = (path / WEIGHTS).resolve()
    shared = Path(constants.HF_HUB_CACHE) / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(os.path.relpath(shared, blob.parent))
    assert torch.equal(load(REPO).embed.weight, model().embed.weight)


def test_offline_serves_what_is_here_and_asks_nobody(server, files, run, monkeypatch):
    commit = server.add(REPO, files)
    hub.download(REPO)
    server.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, err = run("download", REPO)
    assert (code, err) == (0, f"{REPO}: commit {commit}, from the cache\n")
    load(REPO, revision=commit)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        load(REPO, revision="v2")
    assert server.requests == []


def test_hub_out_of_reach_is_said_and_the_cache_serves(server, files, waits, monkeypatch):
    commit = server.add(REPO, files)
    hub.download(REPO)
    server.fail("GET", INFO, 99, status=503)
    with pytest.warns(UserWarning, match=rf"is down \(503\).*Used: commit {commit} in the cache"):
        load(REPO)
    # a no is a no
    server.faults.clear()
    server.repos.pop(REPO)
    with pytest.raises(HubError, match="no such repository"):
        load(REPO)


def test_shard_that_is_missing_in_the_cache_is_not_overlooked(server, monkeypatch, tmp_path):
    model().save_pretrained(tmp_path / "m", max_shard_bytes=12_000)
    tree = {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir() if p.is_file()}
    server.add(REPO, tree)
    assert torch.equal(load(REPO).embed.weight, model().embed.weight)
    path = hub.download(REPO)
    for notes in cache.storage(REPO).glob(".hybridzoo/*"):
        notes.unlink()
    (path / sorted(n for n in tree if n.startswith("model-"))[0]).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"it is not in .* HF_HUB_OFFLINE is set"):
        load(REPO)


def test_revision_is_a_branch_a_tag_or_a_commit(server, files):
    first = server.add(REPO, files)
    other = server.add(REPO, {**files, "NOTICE": b"second"}, "next")
    server.repos[REPO].refs["v1"] = first
    for revision, commit in [(None, first), ("next", other), ("v1", first), (other, other)]:
        assert hub.fetch(REPO, revision=revision).commit == commit
    with pytest.raises(HubError, match=r"no revision 'v9' \(404\); it is a branch"):
        load(REPO, revision="v9")


def test_only_a_checkpoint_s_files_come(server, files):
    extra = {
        "pytorch_model.bin": b"\x80\x02",
        "consolidated.safetensors": b"twice",
        "optimizer.pt": b"x",
        "original/params.json": b"{}",
        "modeling_small.py": b"",
        ".gitattributes": b"",
        "LICENSE": b"do as you like",
        "tokenizer.json": b"{}",
        "curve.png": b"picture",
    }
    del extra["curve.png"]
    tree = {**files, **extra}
    server.add(REPO, tree)
    assert {p.name for p in hub.download(REPO).iterdir()} == {*files, "LICENSE", "tokenizer.json"}


def test_what_the_checksums_list_comes_too(server, source):
    (source / "curve.png").write_bytes(b"picture")
    write_sums(source)
    server.add(REPO, {p.name: p.read_bytes() for p in source.iterdir() if p.is_file()})
    path = hub.download(REPO)
    assert (path / "curve.png").read_bytes() == b"picture"
    assert [f.status for f in verify(path, only=["checksums"])] == ["ok"]


def test_pickles_come_when_asked_for_and_convert(server, run, tmp_path):
    tiny("state_spaces", "mamba", tmp_path)
    server.add("org/original", {p.name: p.read_bytes() for p in tmp_path.glob("*.*")})
    code, _, err = run("generate", "org/original")
    assert code == 2
    assert "hybridzoo convert org/original TARGET --from-pickle" in err
    code, out, _ = run("download", "org/original", "--pickle")
    assert code == 0
    assert (Path(out.strip()) / "pytorch_model.bin").is_file()
    code, out, err = run("convert", "org/original", "native", "--from-pickle")
    assert (code, out) == (0, "native: written in the native layout\n")


def test_directory_gets_plain_files(server, files, run):
    commit = server.add(REPO, files)
    code, out, err = run("download", REPO, "--dir", "here")
    assert (code, err) == (0, f"{REPO}: commit {commit}\n")
    assert Path(out.strip()) == Path("here").resolve()
    assert {p.name: p.read_bytes() for p in Path("here").iterdir() if p.is_file()} == files
    assert not any(p.is_symlink() for p in Path("here").iterdir())
    Path("file").write_text("")
    assert "is a file; a download needs a directory" in run("download", REPO, "--dir", "file")[2]


def test_config_alone_is_enough_for_info(server, files, run):
    server.add(REPO, files)
    code, out, _ = run("info", REPO)
    assert code == 0
    assert out.startswith("small  MA\n")
    assert server.count("GET", "/resolve/") == 1
    assert find_config(REPO) == HybridConfig.from_dict(CONFIG)


def test_config_alone_leaves_a_whole_download_in_its_place(server, files, monkeypatch):
    first = server.add(REPO, files)
    assert hub.fetch(REPO, only_config=True).commit == first
    second = server.add(REPO, {**files, "NOTICE": b"second"})
    assert hub.fetch(REPO, only_config=True).commit == second
    with monkeypatch.context() as patch:
        # nothing whole was here: the newest is what is known
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert hub.fetch(REPO, only_config=True).commit == second
    hub.download(REPO)
    third = server.add(REPO, {**files, "NOTICE": b"third"})
    assert hub.fetch(REPO, only_config=True).commit == third
    assert cache.cached(REPO).commit == second
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.fetch(REPO).commit == second
    assert torch.equal(load(REPO).embed.weight, model().embed.weight)


def test_published_model_is_called_by_its_repository(server, tmp_path):
    source = tiny("jamba", "dense", tmp_path / "published").directory
    server.add("org/Jamba-x", {p.name: p.read_bytes() for p in source.iterdir()})
    assert load("org/Jamba-x").config.name == "Jamba-x"
    assert find_config("org/Jamba-x").name == "Jamba-x"


def test_directory_of_that_name_wins_and_its_neighbours_are_paths(server, files, source):
    server.add("source/other", files)
    shutil.copytree(source, "org/small")
    server.requests.clear()
    assert load("org/small").config.name == "small"
    with pytest.raises(ConfigError, match=r"^source/other: no such file or directory"):
        load("source/other")
    assert server.requests == []


def test_name_of_the_zoo_comes_when_it_is_said_and_then_loads(server, tmp_path, run):
    (entry,) = [m for m in list_models() if m.name == "jamba-tiny-random"]
    source = tiny("jamba", "dense", tmp_path / "published").directory
    server.add(entry.front.hub, {p.name: p.read_bytes() for p in source.iterdir()})
    with pytest.raises(ConfigError, match=r"Run `hybridzoo download jamba-tiny-random`, or build"):
        load(entry.name)
    assert server.requests == []
    assert hub.download(entry.name) == find_directory(entry.name)
    assert load(entry.name).config.n_params() > 0


@pytest.mark.parametrize(
    "name, message",
    {
        "shakespeare": "its weights are in the package; there is nothing to download",
        "tiny-hybrid": "no weights are published; there is nothing to download",
        "jamba-tiny-randm": "did you mean jamba-tiny-random",
        "./here": "no such file or directory",
    }.items(),
)
def test_name_without_a_repository_is_refused(server, name, message):
    with pytest.raises(ConfigError, match=message):
        hub.download(name)
    assert server.requests == []


def test_revision_of_what_has_none_is_refused(server, source):
    for name in ("shakespeare", str(source)):
        with pytest.raises(ConfigError, match=r"^revision: .* \(v1\); .*Leave it out"):
            load(name, revision="v1")
    with pytest.raises(ConfigError, match=r"^revision: mamba-130m is here and has none"):
        find_config("mamba-130m", revision="v1")


def test_token_goes_to_the_hub_and_into_no_sentence(server, files, run):
    server.add(REPO, files, private=True)
    assert run("download", REPO)[0] == 0
    server.tokens.clear()
    code, out, err = run("download", REPO)
    assert code == 2
    assert TOKEN not in out + err


def test_environment_is_the_client_s_own(server, files, tmp_path):
    """As a process: HF_ENDPOINT and HF_HOME as they are read at its start."""
    commit = server.add(REPO, files)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
    }
    command = [sys.executable, "-m", "hybridzoo.cli", "download", REPO]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, f"{REPO}: commit {commit}\n")
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "home" / "hub")
