"""Files: a bad one is refused in a sentence; a save cut short leaves the old or the new one."""

import fcntl
import json
import os
import pickle
import signal
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hybridzoo.checkpoint.io import INDEX_FILE, SINGLE_FILE, plan, write
from hybridzoo.checkpoint.reader import Reader, read_json, resolve
from hybridzoo.checkpoint.shard import Spec
from hybridzoo.checkpoint.transfer import Piece
from hybridzoo.errors import CheckpointError

SHAPES = {"a": (3, 5), "b": (7,), "c": (2, 3, 4), "scalar": (), "none": (0, 4)}


def tensors(value):
    """Five odd shapes, two dtypes, filled with one number."""
    made = {n: torch.full(s, float(value)) for n, s in SHAPES.items()}
    return made | {"b": made["b"].bfloat16()}


def store(directory, value, max_shard_bytes=10**9):
    """Write them, and a config that says the same number."""
    content = tensors(value)
    names = {torch.float32: "F32", torch.bfloat16: "BF16"}
    specs = {n: Spec(names[t.dtype], tuple(t.shape)) for n, t in content.items()}
    texts = {"config.json": json.dumps({"value": value}).encode()}
    write(directory, plan(specs, max_shard_bytes), content.__getitem__, texts=texts)


def assert_holds(directory, value):
    reader = Reader(directory)
    assert json.loads(resolve(directory, "config.json").read_text()) == {"value": value}
    for name, tensor in tensors(value).items():
        assert torch.equal(reader.view(name), tensor) and reader.view(name).dtype == tensor.dtype


@pytest.mark.parametrize("max_shard_bytes", [10**9, 70, 1])
def test_written_is_read(tmp_path, max_shard_bytes):
    store(tmp_path / "new" / "directory", 3, max_shard_bytes)
    assert_holds(tmp_path / "new" / "directory", 3)


def test_safetensors_reads_ours_and_we_read_theirs(tmp_path):
    store(tmp_path, 3)
    theirs = load_file(tmp_path / SINGLE_FILE)
    assert all(torch.equal(theirs[n], t) for n, t in tensors(3).items()) and len(theirs) == 5
    with safe_open(tmp_path / SINGLE_FILE, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    save_file(tensors(4), tmp_path / SINGLE_FILE)
    (tmp_path / "config.json").write_text('{"value": 4}')
    assert_holds(tmp_path, 4)


def test_index_says_where_each_tensor_is(tmp_path):
    store(tmp_path, 3, 70)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == 15 * 4 + 7 * 2 + 24 * 4 + 4
    assert set(index["weight_map"]) == set(SHAPES)
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)
    n = len(set(index["weight_map"].values()))
    assert set(index["weight_map"].values()) == {
        f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)
    }


def test_shards_stay_below_the_limit():
    specs = {str(i): Spec("F32", (n,)) for i, n in enumerate((3, 9, 2, 2, 2, 30, 1))}
    sizes = [
        [s.n_bytes for s in shard.tensors.values()] for shard in plan(specs, 40).files.values()
    ]
    assert all(sum(s) <= 40 or len(s) == 1 for s in sizes)
    assert sum(map(sum, sizes)) == 49 * 4


def test_every_tensor_starts_at_a_multiple_of_its_item_size():
    specs = {"h": Spec("BF16", (1,)), "f": Spec("F32", (1,)), "d": Spec("F64", (1,))}
    assert list(plan(specs).files[SINGLE_FILE].tensors) == ["d", "f", "h"]


def test_misaligned_tensor_is_read(tmp_path):
    """A bf16 of odd length before an fp32 puts it at a byte that is no multiple of four."""
    store(tmp_path, 3)
    raw = (tmp_path / SINGLE_FILE).read_bytes()
    header = {
        "h": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]},
        "f": {"dtype": "F32", "shape": [2], "data_offsets": [2, 10]},
    }
    text = json.dumps(header).encode()
    data = torch.tensor([1.5], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    data += torch.tensor([2.5, -3.5]).view(torch.uint8).numpy().tobytes()
    (tmp_path / SINGLE_FILE).write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert Reader(tmp_path).view("f").tolist() == [2.5, -3.5]
    assert Reader(tmp_path).view("h").tolist() == [1.5]
    assert raw != (tmp_path / SINGLE_FILE).read_bytes()


def test_slice_reads_only_its_bytes(tmp_path):
    """A sparse file of 1 TiB: only reading a slice can finish, in time and in memory."""
    shape = [2**20, 2**18]
    header = json.dumps(
        {"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 2**40]}}
    ).encode()
    header += b" " * (-len(header) % 8)
    path = tmp_path / SINGLE_FILE
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2**40)
        file.seek(8 + len(header) + (2**18 * 1000 + 7) * 4)
        file.write(torch.tensor([2.5]).numpy().tobytes())
    target = torch.full((2, 4), torch.nan)
    Reader(tmp_path).fill([Piece("x", tuple(shape), (999, 5), target)])
    assert target.tolist() == [[0, 0, 0, 0], [0, 0, 2.5, 0]]


# bad files: name of the case -> (what to do to a directory with one file, what is said)
def _header(change):
    def damage(directory):
        path = directory / SINGLE_FILE
        raw = path.read_bytes()
        n = int.from_bytes(raw[:8], "little")
        text = change(raw[8 : 8 + n])
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + n :])

    return damage


def _entries(change):
    def edit(text):
        entries = json.loads(text)
        change(entries)
        return json.dumps(entries).encode()

    return _header(edit)


def _content(make):
    return lambda directory: (directory / SINGLE_FILE).write_bytes(
        make((directory / SINGLE_FILE).read_bytes())
    )


def _rename(name):
    return lambda directory: (directory / SINGLE_FILE).rename(directory / name)


BAD_FILES = {
    "zero byte": (_content(lambda raw: b""), "0 bytes"),
    "short": (_content(lambda raw: raw[:7]), "7 bytes"),
    "cut in the header": (_content(lambda raw: raw[:50]), "truncated"),
    "cut in the data": (_content(lambda raw: raw[:-1]), "truncated"),
    "trailing": (_content(lambda raw: raw + b"\0"), "trailing bytes"),
    "huge header": (
        _content(lambda raw: (2**63).to_bytes(8, "little") + raw[8:]),
        "a header of 9223372036854775808",
    ),
    "lfs": (
        _content(lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"),
        "git-lfs pointer.*git lfs pull",
    ),
    "html": (_content(lambda raw: b"\n<!DOCTYPE html><html><body>404"), "web page"),
    "zip": (_content(lambda raw: b"PK\x03\x04" + raw), "zip file.*convert --from-pickle"),
    "pickle": (
        _content(lambda raw: pickle.dumps({"a": list(range(9))}, 4)),
        "a pickle.*convert --from-pickle",
    ),
    "header not json": (_header(lambda text: b"{" + text), "header that is not JSON"),
    "header not utf-8": (_header(lambda text: b"\xff" * 16), "header that is not JSON"),
    "deep header": (_header(lambda text: b"[" * 100_000), "header that is not JSON"),
    "header a list": (_header(lambda text: b"[]"), "header that is a list"),
    "twice": (
        _header(lambda t: t.rstrip()[:-1] + b"," + t[t.index(b'"a"') :].rstrip()),
        "is there twice",
    ),
    "dtype": (_entries(lambda e: e["a"].update(dtype="F4")), "dtype 'F4'"),
    "negative": (_entries(lambda e: e["a"].update(shape=[-3, -5])), "whole numbers"),
    "float shape": (_entries(lambda e: e["a"].update(shape=[3.0, 5])), "whole numbers"),
    "shape": (_entries(lambda e: e["a"].update(shape=[3, 6])), "spans 60 bytes.*has 72"),
    "dtype a list": (_entries(lambda e: e["a"].update(dtype=[])), r"dtype \[\]"),
    "lone surrogate": (
        _entries(lambda e: e.update({"\ud800": e.pop("a")})),
        "header that is not JSON",
    ),
    "shape of a book": (
        _entries(lambda e: e["a"].update(shape=[10**18] * 1000)),
        r"shape \[.*, \.\.\.\]; a tensor has < 2\*\*63",
    ),
    "header utf-16": (
        _header(lambda text: text.decode().encode("utf-16")),
        "header that is not JSON",
    ),
    "metadata of objects": (
        _entries(lambda e: e.update(__metadata__={"a": {}})),
        "metadata {'a': {}}",
    ),
    "entry": (_entries(lambda e: e.update(a=3)), "dtype None"),
    "overlap": (_entries(lambda e: e["c"].update(data_offsets=[56, 152])), "overlaps"),
    "hole": (_entries(lambda e: e.pop("c")), "hole"),
    "metadata": (_entries(lambda e: e.update(__metadata__=3)), "metadata 3"),
    "bin only": (_rename("pytorch_model.bin"), "pickled weights.*convert .* --from-pickle"),
    "pt only": (_rename("weights.pt"), "pickled weights"),
    "nothing": (_rename("weights"), "no weights"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_refused(tmp_path, case):
    damage, said = BAD_FILES[case]
    store(tmp_path, 3)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=said) as refused:
        Reader(tmp_path)
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


def _index(change):
    def damage(directory):
        path = directory / INDEX_FILE
        index = json.loads(path.read_text())
        changed = change(index)
        path.write_text(json.dumps(index if changed is None else changed))

    return damage


def _duplicate(directory):
    files = sorted(directory.glob("model-*.safetensors"))
    save_file(load_file(files[0]) | load_file(files[1]), files[1])


def _outside(directory):
    first = min(directory.glob("model-*.safetensors"))
    first.rename(directory.parent / "outside.safetensors")
    first.symlink_to(directory.parent / "outside.safetensors")


BAD_INDEXES = {
    "absent shard": (lambda d: min(d.glob("model-*")).unlink(), "model-00001-of-.*missing"),
    "traversal": (
        _index(lambda i: i["weight_map"].update(a="../model.safetensors")),
        "illegal file",
    ),
    "absolute": (
        _index(lambda i: i["weight_map"].update(a="/etc/model.safetensors")),
        "illegal file",
    ),
    "not a name": (_index(lambda i: i["weight_map"].update(a=3)), "illegal file"),
    "other file": (_index(lambda i: i["weight_map"].update(a="config.json")), "illegal file"),
    "symlink": (_outside, "leads out of the directory"),
    "deep index": (lambda d: (d / INDEX_FILE).write_text("[" * 100_000), "not JSON"),
    "two shards": (_duplicate, "is also in"),
    "unlisted": (
        _index(lambda i: i["weight_map"].pop("none") and None),
        "none should be in no file",
    ),
    "absent tensor": (
        _index(lambda i: i["weight_map"].update(x=i["weight_map"]["a"])),
        "x should be in model.* but is in none",
    ),
    "no map": (_index(lambda i: {"weight_map": {}}), "no weight_map"),
    "a list": (_index(lambda i: [1]), "a list, not an object"),
    "not json": (lambda d: (d / INDEX_FILE).write_text("{"), "not JSON"),
    "both": (lambda d: save_file(tensors(3), d / SINGLE_FILE), "holds both"),
}


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_bad_index_is_refused(tmp_path, case):
    damage, said = BAD_INDEXES[case]
    store(tmp_path / "model", 3, 70)
    damage(tmp_path / "model")
    with pytest.raises(CheckpointError, match=said) as refused:
        Reader(tmp_path / "model")
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


def test_index_of_the_single_file_is_an_index(tmp_path):
    """As some tools write it beside a model that fits one file."""
    store(tmp_path, 3)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors(3), SINGLE_FILE)}
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    assert_holds(tmp_path, 3)
    store(tmp_path, 4)
    assert not (tmp_path / INDEX_FILE).exists()
    assert_holds(tmp_path, 4)


def test_answers_and_checksums_go_with_the_weights_they_are_of(tmp_path):
    for name in ("golden.safetensors", "SHA256SUMS", "notes.txt"):
        (tmp_path / name).write_text("of older weights")
    store(tmp_path, 3)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", SINGLE_FILE, "notes.txt"}


def test_json_of_absurd_size_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{}")
    os.truncate(path, 10**11)
    with pytest.raises(CheckpointError, match=r"config\.json: 100000000000 bytes; no such file"):
        read_json(path)


def test_pipe_in_a_files_place_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / SINGLE_FILE)
    signal.alarm(10)
    try:
        with pytest.raises(CheckpointError, match=r"model\.safetensors: missing"):
            Reader(tmp_path)
    finally:
        signal.alarm(0)


def test_missing_directory_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        Reader(tmp_path / "absent")


def test_hub_cache_links_are_followed(tmp_path):
    """huggingface_hub keeps files in blobs/ and links to them from snapshots/<revision>/."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    store(snapshot, 3, 70)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for i, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(i))
        path.symlink_to(f"../../blobs/{i}")
    assert_holds(snapshot, 3)


def killed_at(step, directory, action):
    """Run `action` in a child killed before its step-th change of files; True when it got there."""
    child = os.fork()
    if child == 0:
        count = 0

        def watch(event, arguments):
            nonlocal count
            changes = event in (
                "os.rename",
                "os.remove",
                "os.mkdir",
                "os.rmdir",
                "shutil.rmtree",
            ) or (event == "open" and str(arguments[0]).startswith(str(directory)))
            if changes:
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        action()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL


# 1 GB: one file; 70: four shards; 110: three.
@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param(70, 70, id="same names"),
        pytest.param(70, 10**9, id="shards to single"),
        pytest.param(10**9, 70, id="single to shards", marks=pytest.mark.slow),
        pytest.param(70, 110, id="fewer shards", marks=pytest.mark.slow),
        pytest.param(10**9, 10**9, id="single to single", marks=pytest.mark.slow),
    ],
)
def test_killed_save_leaves_one_whole_checkpoint(tmp_path, old, new):
    seen = set()
    for step in range(1, 100):
        directory = tmp_path / str(step)
        store(directory, 1, old)
        (directory / "notes.txt").write_text("kept")
        was_killed = killed_at(step, directory, lambda d=directory: store(d, 2, new))
        value = json.loads(resolve(directory, "config.json").read_text())["value"]
        assert_holds(directory, value)
        seen.add(value)
        # and killed while saving again over what was left
        killed_at(1 + step // 2, directory, lambda d=directory: store(d, 3, old))
        value = json.loads(resolve(directory, "config.json").read_text())["value"]
        assert_holds(directory, value)
        store(directory, 4, new)
        assert_holds(directory, 4)
        left = {p.name for p in directory.iterdir()}
        assert left == set(plan_names(new)) | {"config.json", "notes.txt"}
        if not was_killed:
            break
    assert seen == {1, 2} and step > 12


def plan_names(max_shard_bytes):
    specs = {n: Spec("BF16" if n == "b" else "F32", s) for n, s in SHAPES.items()}
    layout = plan(specs, max_shard_bytes)
    return [*layout.files, *([INDEX_FILE] if layout.index else [])]


def test_failed_save_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    store(tmp_path, 1)

    def full_disk(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(CheckpointError, match=r"No space left on device.*there before.*whole"):
        store(tmp_path, 2)
    assert_holds(tmp_path, 1)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", SINGLE_FILE}


def test_second_saver_is_refused(tmp_path):
    store(tmp_path, 1)
    holder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    with pytest.raises(CheckpointError, match="another process is saving"):
        store(tmp_path, 2)
    os.close(holder)
    store(tmp_path, 2)
    assert_holds(tmp_path, 2)


def test_tensor_of_another_size_is_refused(tmp_path):
    store(tmp_path, 1)
    with pytest.raises(CheckpointError, match="a has 2 elements"):
        write(tmp_path, plan({"a": Spec("F32", (3,))}), lambda name: torch.ones(2), texts={})
    assert_holds(tmp_path, 1)


@pytest.mark.parametrize("name", ["../config.json", "/tmp/config.json", ".saved", "", "a/b"])
def test_file_outside_the_directory_is_not_written(tmp_path, name):
    with pytest.raises(CheckpointError, match="illegal file name"):
        write(tmp_path, plan({}), lambda name: torch.ones(2), texts={name: b""})
    assert not list(tmp_path.iterdir())
