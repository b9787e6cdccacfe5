"""tokenizer: bytes and BPE round trips, special ids, streaming, and what is refused."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

from hybridzoo.errors import ConfigError
from hybridzoo.tokenizer import ByteTokenizer, Decoder, load_tokenizer

TEXT = "Ünïcode — naïve 日本語 🦓🦓 text, and plain text again.\n" * 8


def save_byte_level(path):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    backend.save(str(path))


def save_metaspace(path):
    """Llama's shape: a leading space is dropped, unknown characters fall back to bytes."""
    words = ["▁", "a", "b", "▁a", "▁b"]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    model = models.BPE(
        vocab={word: i for i, word in enumerate(vocabulary)},
        merges=[("▁", "a"), ("▁", "b")],
        unk_token="<unk>",
        byte_fallback=True,
    )
    backend = Tokenizer(model)
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.save(str(path))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizers")
    save_byte_level(directory / "byte_level.json")
    save_metaspace(directory / "metaspace.json")
    return {
        "bytes": load_tokenizer("bytes"),
        "byte_level": load_tokenizer(directory / "byte_level.json"),
        "metaspace": load_tokenizer(directory / "metaspace.json"),
    }


KINDS = ["bytes", "byte_level", "metaspace"]


def test_byte_ids_are_the_bytes():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aé") == [0x61, 0xC3, 0xA9]
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id) == (256, 257, 258)
    assert tokenizer.vocab_size == 259


def test_byte_decode_ignores_specials_and_replaces_broken_utf8():
    assert ByteTokenizer().decode([257, 0x61, 0xC3, 258, 0xA9, 319, 0xFF, 256]) == "aé\ufffd"


def test_bytes_smuggled_through_argv_come_back():
    assert ByteTokenizer().encode(b"\xff\xe9a".decode("utf-8", "surrogateescape")) == [255, 233, 97]


@pytest.mark.parametrize("kind", KINDS)
def test_text_survives_the_round_trip(tokenizers, kind):
    tokenizer = tokenizers[kind]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_a_bpe_merges_what_it_was_trained_on(tokenizers):
    assert len(tokenizers["byte_level"].encode(TEXT)) < len(TEXT.encode()) // 2


@pytest.mark.parametrize("kind", KINDS)
def test_encode_adds_no_special_id_and_decode_skips_them(tokenizers, kind):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode("a b")
    assert not {tokenizer.eos_id, tokenizer.bos_id} & set(ids)
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == "a b"


def test_well_known_names_give_eos_and_bos(tokenizers):
    assert (tokenizers["byte_level"].eos_id, tokenizers["byte_level"].bos_id) == (0, None)
    assert (tokenizers["metaspace"].bos_id, tokenizers["metaspace"].eos_id) == (1, 2)


def test_the_config_beside_the_file_names_eos_and_bos(tmp_path):
    save_byte_level(tmp_path / "tokenizer.json")
    names = {"eos_token": {"content": "<pad>"}, "bos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.bos_id) == (1, 0)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_streamed_parts_join_to_the_whole(tokenizers, kind, data):
    tokenizer = tokenizers[kind]
    texts = st.text(alphabet="ab é日🦓\ufffd", max_size=12).map(tokenizer.encode)
    any_ids = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30)
    # a broken run of byte-fallback ids changes characters that are out already; see Decoder
    ids = data.draw(texts if kind == "metaspace" else st.one_of(texts, any_ids))
    decoder = Decoder(tokenizer)
    parts = [decoder.push(i) for i in ids]
    assert "".join(parts) + decoder.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_streaming_never_shows_half_a_character(tokenizers, kind):
    tokenizer = tokenizers[kind]
    decoder = Decoder(tokenizer)
    parts = [decoder.push(i) for i in tokenizer.encode("a🦓é日 b")]
    assert "\ufffd" not in "".join(parts)
    assert "".join(parts) == "a🦓é日 b"


def test_a_special_id_between_words_keeps_the_space(tokenizers):
    tokenizer = tokenizers["metaspace"]
    decoder = Decoder(tokenizer)
    ids = [*tokenizer.encode("a"), tokenizer.eos_id, *tokenizer.encode("b")]
    assert [decoder.push(i) for i in ids] == ["a", "", " b"]


def test_text_is_shown_as_soon_as_it_is_whole():
    decoder = Decoder(ByteTokenizer())
    assert [decoder.push(i) for i in "né!".encode()] == ["n", "", "é", "!"]


def test_flush_shows_the_broken_end_and_starts_anew():
    decoder = Decoder(ByteTokenizer())
    assert [decoder.push(0xE6), decoder.flush(), decoder.push(0x61)] == ["", "\ufffd", "a"]


def test_refusals_are_sentences(tmp_path):
    with pytest.raises(ConfigError, match=r"^tokenizer: .*none.json does not exist; .* 'bytes'"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"model": 3}')
    with pytest.raises(ConfigError, match=r"bad.json is not a tokenizers JSON \(.*\); "):
        load_tokenizer(tmp_path / "bad.json")
    save_byte_level(tmp_path / "tokenizer.json")
    for text in ("{", "[" * 100_000):
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"tokenizer_config.json is not JSON"):
            load_tokenizer(tmp_path)
    for text in ("[]", "null", '{"eos_token": 5}', '{"bos_token": {}}'):
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(
            ConfigError, match=r"config.json.* is a \w+, not .*names the special tokens"
        ):
            load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match=r"lone surrogate \(U\+D800 at character 1\)"):
        ByteTokenizer().encode("a\ud800")


def test_a_prompt_starts_as_the_file_says_and_is_not_ended(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"<s>": 0, "</s>": 1, "a": 2, "b": 3}
    backend = Tokenizer(models.WordLevel(words, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a b") == [2, 3]
    assert tokenizer.encode_prompt("a b") == [0, 2, 3]
    assert tokenizer.encode_prompt("") == [0]


def test_a_prompt_of_bytes_is_its_bytes_and_an_empty_one_bos():
    assert load_tokenizer("bytes").encode_prompt("a") == [97]
    assert load_tokenizer("bytes").encode_prompt("") == [257]


@pytest.mark.parametrize("method", ["encode", "encode_prompt"])
def test_file_that_contradicts_itself_is_refused_when_it_shows(tmp_path, method):
    """tokenizers raises bare Exception for a word when the id of unknown words is missing."""
    Tokenizer(models.WordLevel({"a": 0}, unk_token="gone")).save(str(tmp_path / "words.json"))
    tokenizer = load_tokenizer(tmp_path / "words.json")
    assert getattr(tokenizer, method)("a") == [0]
    with pytest.raises(ConfigError, match=r"words\.json contradicts itself \(WordLevel error"):
        getattr(tokenizer, method)("b")


def test_vocabulary_with_holes_needs_rows_up_to_its_highest_id(tmp_path):
    Tokenizer(models.WordLevel({"a": 0, "b": 9}, unk_token="a")).save(str(tmp_path / "words.json"))
    assert load_tokenizer(tmp_path / "words.json").vocab_size == 10
