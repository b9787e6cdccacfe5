"""Text to ids and back: plain bytes, or any JSON that the `tokenizers` library reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from hybridzoo.errors import ConfigError

# tried in this order when no tokenizer_config.json beside the file names the token
_EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
_BOS_NAMES = ("<|begin_of_text|>", "<|startoftext|>", "<s>", "<bos>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer(Protocol):
    """What every tokenizer offers; `eos_id` and `bos_id` are None where it has no such token."""

    @property
    def vocab_size(self) -> int:
        """One more than the highest id, special ones included: the rows that an embedding needs."""

    @property
    def eos_id(self) -> int | None:
        """Id that ends a text."""

    @property
    def bos_id(self) -> int | None:
        """Id that starts a text."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; no special id is added."""

    def encode_prompt(self, text: str) -> list[int]:
        """Ids for a model to continue: `text`, behind the id that starts a text if there is one.

        Empty only for an empty text and a tokenizer that has neither bos nor eos.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special ids give nothing, broken UTF-8 gives U+FFFD."""


class ByteTokenizer:
    """Ids 0..255 are the bytes of UTF-8; 256 ends a text, 257 starts one, 258 pads."""

    vocab_size = 259
    eos_id = 256
    bos_id = 257
    pad_id = 258

    def encode(self, text: str) -> list[int]:
        """Bytes of `text`; raw bytes that Python keeps as surrogates in argv come back as bytes.

        Raises:
            ConfigError: the text holds a lone surrogate, which UTF-8 cannot write.
        """
        return list(_utf8(text, "surrogateescape"))

    def encode_prompt(self, text: str) -> list[int]:
        """Bytes of `text`; of an empty one, bos: training windows start anywhere, not at a bos."""
        return self.encode(text) or [self.bos_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids below 256; those above, a padded vocabulary's too, give nothing."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class JsonTokenizer:
    """A tokenizer.json; tokenizer_config.json beside it, or a well-known name, says eos and bos."""

    def __init__(self, path: Path) -> None:
        # imported here because it costs 30 ms and the byte tokenizer does without
        from tokenizers import Tokenizer as Backend

        text = path.read_bytes()
        self._faults = _Faults(path)
        try:
            with self._faults:
                self._backend = Backend.from_buffer(text)
        except ValueError as error:
            raise ConfigError(
                f"tokenizer: {path} is not a tokenizers JSON ({error}); the file is what "
                "tokenizers' Tokenizer.save() writes. Give such a file, or 'bytes'."
            ) from error
        # a vocabulary may have holes
        ids = self._backend.get_vocab(with_added_tokens=True).values()
        self.vocab_size = 1 + max(ids, default=-1)
        named = _named_specials(path.with_name("tokenizer_config.json"))
        self.eos_id = self._special(named.get("eos_token"), _EOS_NAMES)
        self.bos_id = self._special(named.get("bos_token"), _BOS_NAMES)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without those that the file's post-processor would add round it.

        Raises:
            ConfigError: the text holds surrogates, or raw bytes that Python keeps as such in argv.
        """
        _utf8(text)
        with self._faults:
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """Ids as the file's post-processor completes them, but for an end: the model goes on."""
        _utf8(text)
        with self._faults:
            ids: list[int] = self._backend.encode(text, add_special_tokens=True).ids
        if ids and ids[-1] == self.eos_id:
            ids = ids[:-1]
        start = self.eos_id if self.bos_id is None else self.bos_id
        return ids or ([] if start is None else [start])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special ones skipped; ids that the file does not know give nothing."""
        with self._faults:
            text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text

    def _special(self, named: str | None, names: Sequence[str]) -> int | None:
        candidates = names if named is None else (named,)
        ids = (self._backend.token_to_id(name) for name in candidates)
        return next((i for i in ids if i is not None), None)


class _Faults:
    """Where tokenizers is at work: what a file that contradicts itself makes it raise.

    That is Exception itself, none of its kinds, or a panic of Rust, a type that cannot be imported.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: object, _: object) -> None:
        if kind is Exception or (kind is not None and kind.__name__ == "PanicException"):
            raise ConfigError(
                f"tokenizer: {self.path} contradicts itself ({error}); every part must name ids of "
                "its vocabulary. Give another file, or 'bytes'."
            )


def _utf8(text: str, errors: str = "strict") -> bytes:
    try:
        return text.encode("utf-8", errors)
    except UnicodeEncodeError as error:
        raise ConfigError(
            "tokenizer: the text holds a raw byte or a lone surrogate "
            f"(U+{ord(text[error.start]):04X} at character {error.start}); UTF-8 has no such "
            "character. Remove it from the text."
        ) from error


def _named_specials(path: Path) -> dict[str, str]:
    """eos_token and bos_token of a tokenizer_config.json; empty when there is no such file."""
    if not path.is_file():
        return {}
    rule = "it names the special tokens of the tokenizer.json beside it. Correct or remove it."
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"tokenizer: {path} is not JSON ({error}); {rule}") from error
    if not isinstance(entries, dict):
        raise ConfigError(f"tokenizer: {path} is a {type(entries).__name__}, not an object; {rule}")
    found = {}
    for key in ("eos_token", "bos_token"):
        # a token is written as its text, or as an object that holds the text under "content"
        token = entries.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            found[key] = text
        elif token is not None:
            kind = type(text).__name__
            raise ConfigError(f"tokenizer: {path}: {key} is a {kind}, not a text; {rule}")
    return found


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Tokenizer of `spec`: "bytes", a tokenizers JSON, or a directory with tokenizer.json.

    Raises:
        ConfigError: there is no such file, or it is not a tokenizers JSON.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(
            f"tokenizer: {path} does not exist; a tokenizer is 'bytes' or the path of a tokenizers "
            "JSON. Correct the path, or write bytes."
        )
    return JsonTokenizer(path)


class Decoder:
    """Streaming decode: never half a character; all parts joined are `tokenizer.decode` of all ids.

    One exception: of a broken run of bytes, a byte-fallback BPE makes each byte U+FFFD, also the
    characters before the break; those are out already by then.

    >>> decoder = Decoder(ByteTokenizer())
    >>> [decoder.push(i) for i in "né".encode()]
    ['n', '', 'é']
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # ids before _shown are out; those from _context on are decoded with the new ones, because
        # some tokenizers drop the space in front of the first id they are given
        self._ids: list[int] = []
        self._context = 0
        self._shown = 0

    def push(self, token_id: int) -> str:
        """Text that `token_id` completes; empty while the last character may still grow."""
        self._ids.append(token_id)
        text = self._pending()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._ids = self._ids[self._context :]
        self._shown -= self._context
        self._context, self._shown = self._shown, len(self._ids)
        return text

    def flush(self) -> str:
        """Rest of the text, a broken last character as U+FFFD; the decoder is then as new."""
        text = self._pending()
        self._ids, self._context, self._shown = [], 0, 0
        return text

    def _pending(self) -> str:
        before = self._tokenizer.decode(self._ids[self._context : self._shown])
        return self._tokenizer.decode(self._ids[self._context :])[len(before) :]
