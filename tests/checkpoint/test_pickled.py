"""PyTorch's files: written as they were read, and a bad one refused before it does anything."""

import base64
import io
import json
import os
import pickle
import struct
import time
import zipfile
import zlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridzoo.checkpoint import archive, frame
from hybridzoo.checkpoint.frame import PICKLE_FILE, Frame, Pickle
from hybridzoo.checkpoint.io import SINGLE_FILE, Layout, plan, write
from hybridzoo.checkpoint.pickled import PickleReader
from hybridzoo.checkpoint.reader import Reader, resolve
from hybridzoo.checkpoint.shard import Spec
from hybridzoo.errors import CheckpointError
from tests.checkpoint.test_io import killed_at


def tensors():
    """Odd shapes and dtypes, a transposed one, one under two names, an empty one."""
    torch.manual_seed(0)
    made = {"a": torch.randn(5, 7), "half": torch.randn(3, 301).bfloat16()}
    made |= {"turned": torch.randn(2, 4, 3).permute(2, 0, 1), "scalar": torch.tensor(2.5)}
    whole = torch.randn(11)
    made |= {"first": whole[:4], "last": whole[4:], "none": torch.empty(0, 3)}
    return made | {"again": made["a"], "wide": torch.randn(3).double(), "count": torch.arange(5)}


def saved(directory, content=None, **options):
    directory.mkdir(exist_ok=True)
    torch.save(tensors() if content is None else content, directory / PICKLE_FILE, **options)
    return directory


def repacked(directory, keep=lambda name: True, change=lambda name, raw: raw, **options):
    """The archive as Python's zipfile writes it: checksums before the bytes, entries unaligned."""
    saved(directory)
    with zipfile.ZipFile(directory / PICKLE_FILE) as old:
        entries = {name: old.read(name) for name in old.namelist() if keep(name)}
    with zipfile.ZipFile(directory / PICKLE_FILE, "w", **options) as new:
        for name, raw in entries.items():
            new.writestr(name, change(name, raw))
    return directory


def without_sums(directory):
    torch.serialization.set_crc32_options(False)
    try:
        return saved(directory)
    finally:
        torch.serialization.set_crc32_options(True)


def part_of_more(directory):
    """Bytes of a storage that no tensor has are the frame's."""
    return saved(directory, {"part": torch.arange(40.0)[7:19].view(3, 4), "other": torch.ones(2)})


SOURCES = {
    "torch.save": saved,
    "without checksums": without_sums,
    "by another writer": repacked,
    # torch 1.6 to 2.0 knew neither the byte order nor the alignment
    "without new entries": lambda d: repacked(
        d, lambda name: "/." not in name and "order" not in name
    ),
    "part of a storage": part_of_more,
}


def read(directory):
    reader = PickleReader(directory, remember=True)
    assert isinstance(reader.layout.files.get(PICKLE_FILE), Pickle)
    return reader


def written(directory, layout, content):
    write(directory, layout, content.__getitem__, texts={"config.json": b"{}"})
    return directory / PICKLE_FILE


@pytest.mark.parametrize("source", SOURCES)
def test_unchanged_weights_are_the_same_file(tmp_path, source):
    path = SOURCES[source](tmp_path / "source") / PICKLE_FILE
    reader = read(path.parent)
    content = {name: reader.view(name) for name in reader.specs}
    again = written(tmp_path / "again", reader.layout, content)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("source", SOURCES)
def test_changed_weights_are_a_valid_file(tmp_path, source):
    reader = read(SOURCES[source](tmp_path / "source"))
    content = {name: reader.view(name) + 1 for name in reader.specs}
    path = written(tmp_path / "changed", reader.layout, content)
    loaded = torch.load(path, weights_only=True)
    assert loaded.keys() == content.keys()
    assert all(torch.equal(loaded[name], content[name]) for name in content)
    if source != "without checksums":
        assert zipfile.ZipFile(path).testzip() is None
    assert {n: (t.stride(), t.dtype) for n, t in loaded.items()} == {
        n: (t.stride(), t.dtype)
        for n, t in torch.load(tmp_path / "source" / PICKLE_FILE, weights_only=True).items()
    }
    read(path.parent)


def test_new_file_shares_what_is_the_same(tmp_path):
    content = {"a": torch.randn(100, 7), "b": torch.randn(3).bfloat16(), "none": torch.ones(0)}
    specs = {"a": Spec("F32", (100, 7)), "b": Spec("BF16", (3,)), "none": Spec("F32", (0,))}
    # the second name may come first
    specs = {"again": specs["a"], "half": Spec("F16", (5,)), **specs}
    content["half"] = torch.randn(5).half()
    asked = []

    def fetch(name):
        asked.append(name)
        return content[name]

    made = Pickle(specs, {}, same={"again": "a"})
    write(tmp_path, Layout({PICKLE_FILE: made}), fetch, texts={})
    loaded = torch.load(tmp_path / PICKLE_FILE, weights_only=True)
    assert torch.equal(loaded["a"], content["a"]) and torch.equal(loaded["b"], content["b"])
    assert loaded["again"].data_ptr() == loaded["a"].data_ptr()
    assert asked == made.fetched() == ["half", "a", "b"]
    assert zipfile.ZipFile(tmp_path / PICKLE_FILE).testzip() is None


@pytest.mark.parametrize(
    "content",
    [
        {"a": torch.arange(9.0)[:6], "b": torch.arange(9.0)},
        {"every_other": torch.arange(9.0)[::2]},
    ],
    ids=["overlapping", "strided"],
)
def test_bytes_used_by_halves_are_read_but_not_remembered(tmp_path, content):
    shared = torch.arange(9.0)
    if "b" in content:
        content = {"a": shared[:6], "b": shared}
    reader = PickleReader(saved(tmp_path, content), remember=True)
    assert reader.layout.files[PICKLE_FILE].frame is None
    for name, tensor in content.items():
        assert torch.equal(reader.view(name), tensor)


def test_file_before_zip_is_read_but_not_remembered(tmp_path):
    reader = PickleReader(saved(tmp_path, _use_new_zipfile_serialization=False), remember=True)
    assert reader.layout.files[PICKLE_FILE].frame is None
    assert all(torch.equal(reader.view(name), t) for name, t in tensors().items())


def test_several_files_are_read_as_one(tmp_path):
    content = tensors()
    torch.save({"a": content["a"]}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"half": content["half"]}, tmp_path / "pytorch_model-00002-of-00002.bin")
    for beside in ("training_args.bin", "rng_state.pth", "scaler.pt"):
        torch.save({"lr": 3}, tmp_path / beside)
    reader = PickleReader(tmp_path, remember=True)
    assert reader.layout.files[PICKLE_FILE].frame is None and reader.specs.keys() == {"a", "half"}
    torch.save({"a": content["a"]}, tmp_path / PICKLE_FILE)
    with pytest.raises(CheckpointError, match=r"a is also in pytorch_model-00001.* in one file"):
        PickleReader(tmp_path)


def test_flipped_bit_is_found(tmp_path):
    path = saved(tmp_path) / PICKLE_FILE
    raw = bytearray(path.read_bytes())
    at = raw.find(tensors()["a"].numpy().tobytes())
    raw[at + 9] ^= 4
    path.write_bytes(raw)
    torch.load(path, weights_only=True)
    with pytest.raises(
        CheckpointError, match=r"pytorch_model/data/0 is damaged \(checksum .*again"
    ):
        PickleReader(tmp_path)


def test_old_weights_do_not_stay_beside_new_ones(tmp_path):
    specs = {"a": Spec("F32", (5, 7))}
    content = {"a": tensors()["a"]}
    bins = Layout({PICKLE_FILE: Pickle(specs, {})})
    for layout, there, gone in (
        (plan(specs), SINGLE_FILE, PICKLE_FILE),
        (bins, PICKLE_FILE, SINGLE_FILE),
        (plan(specs), SINGLE_FILE, PICKLE_FILE),
    ):
        write(tmp_path, layout, content.__getitem__, texts={})
        assert (tmp_path / there).exists() and not (tmp_path / gone).exists()


@pytest.mark.parametrize("old", ["safetensors", "bin"])
def test_killed_save_leaves_one_whole_checkpoint(tmp_path, old):
    specs = {"a": Spec("F32", (5,)), "b": Spec("F32", (3,))}

    def store(directory, kind, value):
        layout = plan(specs) if kind == "safetensors" else Layout({PICKLE_FILE: Pickle(specs, {})})
        content = {n: torch.full(s.shape, float(value)) for n, s in specs.items()}
        texts = {"config.json": json.dumps(value).encode()}
        write(directory, layout, content.__getitem__, texts=texts)

    def found(directory):
        value = json.loads(resolve(directory, "config.json").read_text())
        try:
            reader = Reader(directory)
        except CheckpointError as error:
            assert "--from-pickle" in str(error)
            reader = PickleReader(directory)
        assert all((reader.view(name) == value).all() for name in specs)
        return value

    seen = set()
    for step in range(1, 200):
        directory = tmp_path / str(step)
        store(directory, old, 1)
        was_killed = killed_at(step, directory, lambda d=directory: store(d, "bin", 2))
        seen.add(found(directory))
        store(directory, "bin", 3)
        assert found(directory) == 3
        if not was_killed:
            break
    else:
        raise AssertionError("never ran to its end")
    assert seen == {1, 2}


# --- hostile pickles


class Runs:
    """What a pickle of malice does when it is read."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def archived(raw, *storages, **options):
    """An archive of this pickle and these storages."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as made:
        made.writestr("m/data.pkl", raw)
        for i, storage in enumerate(storages):
            made.writestr(f"m/data/{i}", storage)
        made.writestr("m/version", "3\n")
    return file.getvalue()


def one_tensor(numel=4, size=(4,), stride=(1,), key="0", offset=0, old=b""):
    """The pickle of one tensor, by hand: what torch.save would not write can be said too."""

    def number(n):
        return b"\x8a\x08" + struct.pack("<q", n)

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    def text(s):
        return b"X" + struct.pack("<I", len(s)) + s.encode()

    id_ = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu")
    id_ += number(numel) + old + b"tQ"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n(" + id_ + number(offset)
    rebuild += numbers(size) + numbers(stride) + b"\x89" + b"ccollections\nOrderedDict\n)RtR"
    return b"\x80\x02}" + text("a") + rebuild + b"s."


def legacy(content):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


GOOD = archived(one_tensor(), bytes(16))
BAD = {
    "empty": b"",
    "one byte": b"P",
    "a zip's first bytes": b"PK\x03\x04",
    "noise": bytes(range(256)) * 9,
    "code": b"cos\nsystem\n(S'touch ran'\ntR.",
    "code in an archive": archived(pickle.dumps({"a": Runs(os.system, "touch ran")}, 2)),
    "code, protocol 4": archived(pickle.dumps({"a": Runs(os.system, "touch ran")}, 4)),
    "code in an old file": legacy({"a": torch.ones(2)}).replace(
        b"ctorch._utils\n_rebuild_tensor_v2\n", b"cos\nsystem\n"
    ),
    "eval": archived(pickle.dumps({"a": Runs(eval, "open('ran', 'w')")}, 2)),
    # the next three pass torch's own weights_only
    "a terabyte": archived(pickle.dumps({"a": Runs(bytearray, 2**40)}, 2)),
    "a counter": archived(b"\x80\x02ccollections\nCounter\n)R."),
    "a storage of its own": archived(
        b"\x80\x02ctorch.storage\nUntypedStorage\n\x8a\x05\0\0\0\0\x10\x85R."
    ),
    "more than there is": archived(one_tensor(2**40, (2**40,)), bytes(16)),
    "beyond its storage": archived(one_tensor(size=(5,)), bytes(16)),
    "before its storage": archived(one_tensor(offset=-4), bytes(16)),
    "one number a million times": archived(one_tensor(size=(2**40,), stride=(0,)), bytes(16)),
    # its list of storages that follow is empty: memory that nothing fills
    "claimed in an old file": b"".join(
        pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    )
    + one_tensor(2**20, (2**20,), old=b"N")
    + b"\x80\x02].",
    "no storage": archived(one_tensor()),
    "storage elsewhere": archived(one_tensor(key="../../../etc/passwd"), bytes(16)),
    "no tensors": archived(b"\x80\x02K\x03."),
    "a number for a name": archived(one_tensor().replace(b"X\x01\0\0\0a", b"K\x07"), bytes(16)),
    "no pickle": archived(b""),
    "no end": archived(one_tensor()[:-1], bytes(16)),
    "compressed": archived(one_tensor(), bytes(2**20), compression=zipfile.ZIP_DEFLATED),
    "a pickle of 32 MiB": archived(b"\x80\x02" + b"]" * 2**25 + b"."),
    "millions of lists": archived(b"\x80\x02" + b"]" * 2**22 + b"."),
    "millions of old lists": b"\x80\x02" + b"]" * 2**25 + b".",
    "half of it": GOOD[: len(GOOD) // 2],
    "no directory": GOOD[:-22],
    "a directory of billions": GOOD[:-12] + struct.pack("<HII", 0xFFFF, 2**32 - 2, 0) + b"\0\0",
    "wide directory elsewhere": (
        GOOD[:-22] + b"PK\x06\x07" + struct.pack("<IQI", 0, 2**63 + 5, 1) + b"PK\x05\x06"
        + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 0)
    ),
    "entries over each other": GOOD.replace(b"PK\x01\x02", b"PK\x01\x02", 1)[:-22]
    + GOOD[-22:-12] + struct.pack("<HIIH", 3, 0, len(GOOD) - 22, 0),
}  # fmt: skip


SAID = {
    "code": "calls os system",
    "code in an archive": "calls posix system",
    "a terabyte": "calls __builtin__ bytearray",
    "claimed in an old file": "more bytes than the file",
    "compressed": "compressed, which torch.save never does",
    "millions of lists": "operations",
}


@pytest.mark.parametrize("case", BAD)
def test_bad_pickle_ends_in_a_sentence_and_runs_nothing(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    (tmp_path / PICKLE_FILE).write_bytes(BAD[case])
    began = time.monotonic()
    with pytest.raises(CheckpointError) as refused:
        PickleReader(tmp_path, remember=True)
    text = str(refused.value)
    assert SAID.get(case, PICKLE_FILE) in text
    assert PICKLE_FILE in text and "\n" not in text and len(text) < 600
    assert [p.name for p in tmp_path.iterdir()] == [PICKLE_FILE]
    # what any bad input may take
    assert time.monotonic() - began < 5


def test_the_archive_that_the_bad_ones_come_from_is_good(tmp_path):
    (tmp_path / PICKLE_FILE).write_bytes(GOOD)
    assert PickleReader(tmp_path).view("a").tolist() == [0, 0, 0, 0]


# pickletools says so of a text with a stray backslash
@pytest.mark.filterwarnings("ignore:invalid escape")
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_change_of_bytes_is_refused_or_harmless(tmp_path_factory, data):
    """Fuzz: a file of torch.save with some bytes set, cut or doubled."""
    directory = tmp_path_factory.mktemp("fuzz")
    path = saved(directory, {"a": torch.ones(3, 5), "b": torch.ones(2).half()}) / PICKLE_FILE
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at, n = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(0, 12))
        raw[at : at + n] = data.draw(st.binary(max_size=12))
    path.write_bytes(raw)
    try:
        reader = PickleReader(directory, remember=True)
    except CheckpointError as error:
        assert "\n" not in str(error)
        return
    content = {name: reader.view(name) for name in reader.specs}
    assert sum(t.nbytes for t in content.values()) <= 2 * len(raw)
    # one that cannot be remembered leaves in a frame of its own
    if reader.layout.files[PICKLE_FILE].frame is not None:
        again = written(directory / "again", reader.layout, content)
        assert again.read_bytes() == raw


# --- frames that somebody wrote into a config.json


def deflated(raw):
    return base64.b64encode(zlib.compress(raw, 9)).decode()


def evil(honest):
    """The frame of an archive that has the tensor where it says, and code in its pickle."""
    raw = archived(pickle.dumps({"a": Runs(os.system, "touch ran")}, 2), bytes(4 * 35))
    start = raw.find(bytes(4 * 35))
    return Frame(deflated(raw[:start] + raw[start + 4 * 35 :]), {"a": start})


FRAMES = {
    "code": evil,
    "no base64": lambda f: replace(f, rest="~" + f.rest),
    "no deflate": lambda f: replace(f, rest=base64.b64encode(b"noise").decode()),
    "cut off": lambda f: replace(f, rest=base64.b64encode(base64.b64decode(f.rest)[:-9]).decode()),
    "more than any frame": lambda f: replace(f, rest=deflated(bytes(2**27))),
    "nothing": lambda f: replace(f, rest=deflated(b"")),
    "another file": lambda f: replace(f, rest=deflated(bytes(3000))),
    "a tensor too many": lambda f: replace(f, starts=f.starts | {"b": 0}),
    "a tensor too few": lambda f: replace(f, starts={}),
    "another name": lambda f: replace(f, starts={"b": f.starts["a"]}),
    "before the file": lambda f: replace(f, starts={"a": -1}),
    "far behind it": lambda f: replace(f, starts={"a": 2**60}),
    "moved": lambda f: replace(f, starts={"a": f.starts["a"] + 1}),
    "an order of no dimensions": lambda f: replace(f, orders={"a": [0, 2]}),
    "another order": lambda f: replace(f, orders={"a": [1, 0]}),
    "shared with nobody": lambda f: replace(f, same={"c": "b"}),
    "text for a number": lambda f: replace(f, starts={"a": "0"}),
    "a list for a name": lambda f: replace(f, same={"a": []}),
}  # fmt: skip


@pytest.mark.parametrize("case", FRAMES)
def test_frame_of_somebody_else_is_refused(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    content = {"a": tensors()["a"]}
    reader = read(saved(tmp_path / "source", content))
    made = reader.layout.files[PICKLE_FILE]
    target = tmp_path / "target"
    with pytest.raises(CheckpointError, match=r"source_layout.*Remove source_layout"):
        broken = replace(made, frame=FRAMES[case](made.frame))
        write(target, Layout({PICKLE_FILE: broken}), content.__getitem__, texts={})
    assert not target.exists() or not list(target.iterdir())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("case", ["cut off", "more than any frame"])
def test_frame_that_does_not_end_is_not_written_at_all(tmp_path, case):
    made = read(saved(tmp_path)).layout.files[PICKLE_FILE]
    with pytest.raises(CheckpointError, match="cut off, or more than 67108864 bytes"):
        FRAMES[case](made.frame).pieces(made.tensors)


def test_long_frames_are_not_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(frame, "_MAX_FRAME", 1000)
    reader = PickleReader(saved(tmp_path), remember=True)
    assert reader.layout.files[PICKLE_FILE].frame is None


def test_entries_lie_where_python_says(tmp_path):
    path = saved(tmp_path) / PICKLE_FILE
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as theirs:
        for entry in archive.read_entries(path):
            info = theirs.getinfo(entry.name)
            assert (info.CRC, info.file_size) == (entry.crc, entry.stop - entry.start)
            assert raw[entry.start : entry.stop] == theirs.read(entry.name)
            assert {raw[at : at + 4] for at in entry.crc_at} == {entry.crc.to_bytes(4, "little")}
            assert len(entry.crc_at) == 2


def test_sizes_beyond_four_gigabytes_are_read(tmp_path):
    """A sparse archive of 5 GiB: its entry needs the wide fields of zip64."""
    path = tmp_path / PICKLE_FILE
    made = {"a": torch.empty(5 * 2**30, dtype=torch.int8), "b": torch.ones(1)}
    with torch.serialization.skip_data():
        torch.save(made, path)
    spans = {e.name: (e.start, e.stop) for e in archive.read_entries(path)}
    start, stop = spans["pytorch_model/data/0"]
    assert stop - start == 5 * 2**30 and spans["pytorch_model/data/1"][0] > stop
    with open(path, "r+b") as file:
        file.seek(stop - 1)
        file.write(b"\x07")
    assert archive.load_tensors(path)["a"][-1] == 7
