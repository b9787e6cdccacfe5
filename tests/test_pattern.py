"""pattern: the grammar, its expansion, its shortest spelling, Megatron's strings, every refusal."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridzoo.errors import ConfigError
from hybridzoo.pattern import MAX_PLACES, MEGATRON_LEGEND, Pattern


@dataclass(frozen=True)
class Letter:
    """One place with one branch."""

    name: str

    def spell(self, blank: str) -> str:
        return self.name

    def expand(self) -> list[tuple[str, ...]]:
        return [(self.name,)]


@dataclass(frozen=True)
class Branches:
    """One place with several branches."""

    names: tuple[str, ...]

    def spell(self, blank: str) -> str:
        return f"[{blank}{blank.join(self.names)}]"

    def expand(self) -> list[tuple[str, ...]]:
        return [self.names]


@dataclass(frozen=True)
class Group:
    """Terms in parentheses."""

    terms: tuple[Term, ...]

    def spell(self, blank: str) -> str:
        return f"({blank}{blank.join(term.spell(blank) for term in self.terms)})"

    def expand(self) -> list[tuple[str, ...]]:
        return [place for term in self.terms for place in term.expand()]


@dataclass(frozen=True)
class Term:
    """An atom with or without a count."""

    count: int | None
    atom: Letter | Branches | Group

    def spell(self, blank: str) -> str:
        return ("" if self.count is None else f"{self.count}{blank}") + self.atom.spell(blank)

    def expand(self) -> list[tuple[str, ...]]:
        return [place for _ in range(self.count or 1) for place in self.atom.expand()]


NAMES = st.sampled_from("MAFEmZ")
COUNTS = st.none() | st.integers(1, 4)
LEAVES = st.builds(Letter, NAMES) | st.builds(
    Branches, st.lists(NAMES, min_size=2, max_size=3, unique=True).map(tuple)
)
ATOMS = st.recursive(
    LEAVES,
    lambda atom: st.builds(
        Group, st.lists(st.builds(Term, COUNTS, atom), min_size=1, max_size=4).map(tuple)
    ),
    max_leaves=6,
)
SEGMENTS = st.lists(st.builds(Term, COUNTS, ATOMS), min_size=1, max_size=4)
STACKS = st.lists(SEGMENTS, min_size=1, max_size=4)
BLANKS = st.sampled_from(["", " ", "\n", " \t "])


def expanded(stack: list[list[Term]]) -> tuple[tuple[tuple[str, ...], ...], ...]:
    return tuple(tuple(p for term in segment for p in term.expand()) for segment in stack)


def spelled(stack: list[list[Term]], blank: str) -> str:
    return f"{blank}|".join(blank.join(term.spell(blank) for term in s) for s in stack)


def refusal(text: object) -> str:
    with pytest.raises(ConfigError) as caught:
        Pattern.parse(text)  # type: ignore[arg-type]
    return str(caught.value)


@settings(deadline=None)
@given(STACKS, BLANKS)
def test_a_pattern_expands_as_its_tree_does(stack: list[list[Term]], blank: str) -> None:
    text = spelled(stack, blank)
    pattern = Pattern.parse(text)
    segments = expanded(stack)
    assert pattern.text == text
    assert pattern.segments() == segments
    assert pattern.places == tuple(place for segment in segments for place in segment)
    assert pattern.cuts == tuple(itertools.accumulate(map(len, segments[:-1])))
    assert (len(pattern), pattern.n_segments) == (sum(map(len, segments)), len(segments))


@settings(deadline=None)
@given(STACKS)
def test_compact_keeps_the_stack_and_is_never_longer(stack: list[list[Term]]) -> None:
    pattern = Pattern.parse(spelled(stack, ""))
    short = Pattern.parse(pattern.compact())
    assert (short.places, short.cuts) == (pattern.places, pattern.cuts)
    assert len(short.text.replace(" ", "")) <= len(pattern.text)
    assert short.compact() == short.text


def test_jamba_is_attention_at_4_of_8_and_moe_every_other_ffn() -> None:
    pattern = Pattern.parse("4(MF ME MF ME AF ME MF ME)")
    mixers = ["A" if i % 8 == 4 else "M" for i in range(32)]
    ffns = ["E" if i % 2 == 1 else "F" for i in range(32)]
    assert [letter for (letter,) in pattern.places] == [
        letter for pair in zip(mixers, ffns, strict=True) for letter in pair
    ]
    assert pattern.letters == ("M", "F", "E", "A")


def test_a_bar_cuts_where_the_next_stage_starts() -> None:
    pattern = Pattern.parse("2(MF AF) | 2(MF AF)")
    assert pattern.cuts == (8,)
    assert pattern.n_segments == 2
    assert pattern.segments()[0] == pattern.segments()[1] == pattern.places[:8]


def test_brackets_are_one_place_and_keep_the_written_order() -> None:
    pattern = Pattern.parse("2[A M] F[MA]")
    assert pattern.places == (("A", "M"), ("A", "M"), ("F",), ("M", "A"))
    assert pattern.letters == ("A", "M", "F")


def test_upper_and_lower_case_are_two_letters() -> None:
    assert Pattern.parse("[Mm]M").places == (("M", "m"), ("M",))


def test_leading_zeros_and_blanks_in_a_term_are_free() -> None:
    assert Pattern.parse("\n 007\tM\r\n").places == (("M",),) * 7


# every refusal: text, sentence, column from 1
MISTAKES = [
    ("", "empty", 1),
    (" \n ", "empty", 1),
    ("2(M|F)", "'|' cuts pipeline stages and is allowed at top level only", 4),
    ("M*-", "unknown character '*'", 2),
    ("MF-M", "unknown character '-'", 3),
    ("+", "unknown character '+'", 1),
    ("M/E", "unknown character '/'", 2),
    ("2*M", "unknown character '*'", 2),
    ("M, F", "unknown character ','", 2),
    ("M\N{EN DASH}F", "unknown character '\\u2013' (EN DASH)", 2),
    (
        "\N{CYRILLIC CAPITAL LETTER EM}",
        "unknown character '\\u041c' (CYRILLIC CAPITAL LETTER EM)",
        1,
    ),
    ("\N{ARABIC-INDIC DIGIT TWO}M", "unknown character '\\u0662' (ARABIC-INDIC DIGIT TWO)", 1),
    ("M\N{NO-BREAK SPACE}F", "unknown character '\\xa0' (NO-BREAK SPACE)", 2),
    ("M\0", "unknown character '\\x00'", 2),
    ("0M", "count 0", 1),
    ("M 00(F)", "count 0", 3),
    ("M2", "a count has nothing to repeat", 2),
    ("(M2)F", "a count has nothing to repeat", 3),
    ("2|M", "a count has nothing to repeat", 1),
    ("M 2 3F", "a count has nothing to repeat", 3),
    ("M 2 ", "a count has nothing to repeat", 3),
    ("F(M(A)", "'(' is never closed", 2),
    ("F 2(M", "'(' is never closed", 4),
    ("(M(A", "'(' is never closed", 3),
    ("M)F", "')' closes no '('", 2),
    ("M()", "empty group", 2),
    ("F 2( )", "empty group", 4),
    ("F[MA", "'[' is never closed", 2),
    ("F 2 [M", "'[' is never closed", 5),
    ("MA]", "']' closes no '['", 3),
    ("(M]", "']' closes no '['", 3),
    ("F[]", "[..] needs two letters or more", 2),
    ("2[ M ]", "[..] needs two letters or more", 2),
    ("F[MAM]", "'M' is twice in one [..]", 5),
    ("[M A A]", "'A' is twice in one [..]", 6),
    ("[2MA]", "'2' inside [..]", 2),
    ("[M(A)]", "'(' inside [..]", 3),
    ("[M|A]", "'|' inside [..]", 3),
    ("[[MA]]", "'[' inside [..]", 2),
    ("[M*]", "'*' inside [..]", 3),
    ("|M", "empty segment before '|'", 1),
    ("M||F", "empty segment before '|'", 3),
    ("M | | F", "empty segment before '|'", 5),
    ("M|F|", "empty segment after '|'", 4),
    ("M| \n", "empty segment after '|'", 2),
    ("F 100001M", "more than 100,000 places", 3),
    ("99999(M)2F", "more than 100,000 places", 9),
    ("F 2(50000M)", "more than 100,000 places", 3),
]


@pytest.mark.parametrize(("text", "sentence", "column"), MISTAKES, ids=lambda value: ascii(value))
def test_a_mistake_is_named_with_a_caret_under_its_column(
    text: str, sentence: str, column: int
) -> None:
    first, line, caret = refusal(text).split("\n")
    rest = first.removeprefix(f"pattern: {sentence} at column {column}")
    assert rest != first
    assert rest.startswith("; ")
    assert rest.endswith(".")
    assert line == "  " + "".join(c if c.isprintable() else " " for c in text)
    assert caret == "  " + " " * (column - 1) + "^"


def test_the_refusal_of_an_inner_bar_is_the_one_in_house_md() -> None:
    assert refusal("2(M|F)") == (
        "pattern: '|' cuts pipeline stages and is allowed at top level only at column 4; "
        "close the group before it.\n"
        "  2(M|F)\n"
        "     ^"
    )


@pytest.mark.parametrize("text", ["M-M*", "M*", "+M", "[M*]", "M/*"])
def test_megatrons_symbols_name_the_way_to_read_them(text: str) -> None:
    assert "Megatron's strings are read by Pattern.from_megatron" in refusal(text)


def test_a_line_break_is_one_blank_column() -> None:
    assert refusal("2(MF)\n| 2(M\tF\n?)").split("\n")[1:] == ["  2(MF) | 2(M F ?)", " " * 16 + "^"]


@pytest.mark.parametrize(
    ("n_before", "n_after", "head", "tail"),
    [
        (29, 30, "  MMM", "FFF"),
        (29, 31, "  MMM", "F..."),
        (0, 200, "  ?FF", "F..."),
        (31, 200, "  ...M", "F..."),
        (200, 0, "  ...M", "M?"),
        (200, 200, "  ...M", "F..."),
    ],
)
def test_a_long_pattern_is_shown_through_a_window(
    n_before: int, n_after: int, head: str, tail: str
) -> None:
    first, line, caret = refusal("M" * n_before + "?" + "F" * n_after).split("\n")
    assert f"at column {n_before + 1};" in first
    assert len(line.replace("...", "")) == 62
    assert line.startswith(head)
    assert line.endswith(tail)
    assert line[len(caret) - 1] == "?"


@pytest.mark.parametrize("value", [48, None, ["MA"], b"M", 4.0])
def test_what_is_not_text_is_refused_by_its_type(value: object) -> None:
    message = refusal(value)
    assert message.startswith(f"pattern: must be text, not {type(value).__name__}; ")
    assert message.endswith("Put the pattern in quotes.")
    with pytest.raises(ConfigError, match="must be text"):
        Pattern.from_megatron(value)  # type: ignore[arg-type]


def test_the_largest_stack_is_read_and_one_more_place_is_not() -> None:
    assert len(Pattern.parse(f"{MAX_PLACES}M")) == MAX_PLACES
    assert len(Pattern.parse(f"10(100({MAX_PLACES // 1000}M))")) == MAX_PLACES
    assert "more than 100,000 places at column 11" in refusal(f"{MAX_PLACES}M | F")


@pytest.mark.parametrize(
    "text",
    [
        "9" * 5000 + "M",
        "9" * 5000 + "(M)",
        "99999(" * 9 + "M" + ")" * 9,
        "(99999M" * 9999 + ")" * 9999,
        "(" * 50_000 + "99999M" + ")" * 50_000 + "MM",
        "M" + " " * 200_000 + "?",
        "[" + "A" * 200_000,
    ],
    ids=["digits", "group", "nested", "open", "deep", "blanks", "bracket"],
)
def test_an_absurd_text_is_refused_at_once(text: str) -> None:
    start = time.perf_counter()
    refusal(text)
    # 0.3 s is the slowest here; expanding or rescanning any of them would take minutes
    assert time.perf_counter() - start < 5


@settings(deadline=None, max_examples=500)
@given(st.text(alphabet="MAF()[]|0129 \n*-", max_size=24) | st.text(max_size=24))
def test_any_text_is_a_pattern_or_a_config_error(text: str) -> None:
    for read in (Pattern.parse, Pattern.from_megatron):
        try:
            pattern = read(text)
        except ConfigError as error:
            assert len(str(error).split("\n")) == 3
        else:
            assert Pattern.parse(pattern.compact()).places == pattern.places


def shortest_lengths(size: int) -> dict[tuple[str, ...], int]:
    """Fewest characters of any spelling, by closing a set of spellings, for words up to size."""
    names = ("M", "A", "[MA]")
    best = {(name,): len(name) for name in names}
    for n in range(2, size + 1):
        for word in itertools.product(names, repeat=n):
            joined = min(best[word[:i]] + best[word[i:]] for i in range(1, n))
            powers = [
                len(str(n // p)) + best[word[:p]] + (2 if p > 1 else 0)
                for p in range(1, n)
                if n % p == 0 and word == word[:p] * (n // p)
            ]
            best[word] = min([joined, *powers])
    return best


def test_no_spelling_is_shorter_than_compact() -> None:
    for word, length in shortest_lengths(8).items():
        assert len(Pattern.parse("".join(word)).compact()) == length


@settings(deadline=None)
@given(st.text(alphabet="MA", min_size=9, max_size=40))
def test_no_spelling_of_a_longer_word_is_shorter_than_compact(word: str) -> None:
    best: dict[str, int] = {}
    for size in range(1, len(word) + 1):
        for part in {word[i : i + size] for i in range(len(word) - size + 1)}:
            costs = [best[part[:i]] + best[part[i:]] for i in range(1, size)] or [1]
            for p in range(1, size // 2 + 1):
                if size % p == 0 and part == part[:p] * (size // p):
                    costs.append(len(str(size // p)) + best[part[:p]] + 2 * (p > 1))
            best[part] = min(costs)
    assert len(Pattern.parse(word).compact()) == best[word]


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("M", "M"),
        ("MMM", "3M"),
        ("MFMF", "MFMF"),
        ("2(MF AF) | 2(MF AF)", "2(MFAF) | 2(MFAF)"),
        ("3([MA]F)", "3([MA]F)"),
        ("MF MF MF M AF", "3(MF)MAF"),
        ("4(MF ME MF ME AF ME MF ME)", "4(2(MFME)AFMEMFME)"),
        ("2(3(4M))", "24M"),
        ("40000(MF)20000M", "MF" * 40_000 + "M" * 20_000),
        ("50000(FM)", "50000(FM)"),
    ],
    ids=lambda text: text[:20],
)
def test_compact_spelling(text: str, short: str) -> None:
    assert Pattern.parse(text).compact() == short


NEMOTRON_H_8B = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"


def test_a_megatron_string_becomes_letters_and_cuts() -> None:
    pattern = Pattern.from_megatron("M-*E|GD+\n")
    assert pattern.text == "MFAE | GDL"
    assert pattern.places == (("M",), ("F",), ("A",), ("E",), ("G",), ("D",), ("L",))
    assert pattern.cuts == (4,)
    assert pattern == Pattern.parse(pattern.text)


def test_nemotron_h_8b_is_24_mamba_24_mlp_4_attention() -> None:
    pattern = Pattern.from_megatron(NEMOTRON_H_8B)
    letters = [letter for (letter,) in pattern.places]
    assert [letters.count(c) for c in "MFA"] == [24, 24, 4]
    assert [i for i, letter in enumerate(letters) if letter == "A"] == [7, 18, 29, 40]
    assert pattern.text == "3(MF)M4(A5(FM))F"
    assert pattern.to_megatron() == NEMOTRON_H_8B


MEGATRON = st.lists(st.text(alphabet="M*-EGD+", min_size=1, max_size=20), min_size=1, max_size=4)


@settings(deadline=None)
@given(MEGATRON.map("|".join))
def test_megatron_to_pattern_and_back(text: str) -> None:
    assert Pattern.from_megatron(text).to_megatron() == text


@settings(deadline=None)
@given(st.lists(st.text(alphabet="MAFEGDL", min_size=1), min_size=1, max_size=4).map("|".join))
def test_pattern_to_megatron_and_back(text: str) -> None:
    pattern = Pattern.parse(text)
    back = Pattern.from_megatron(pattern.to_megatron())
    assert (back.places, back.cuts) == (pattern.places, pattern.cuts)


def test_a_legend_replaces_the_default_both_ways() -> None:
    legend = {"m": "M", "M": "N", "*": "A", "3": "c", "x": "A"}
    pattern = Pattern.from_megatron("mM*|3x", legend)
    assert pattern.text == "MNA | cA"
    # of the two symbols for A the first one is written
    assert pattern.to_megatron(legend) == "mM*|3*"
    with pytest.raises(ConfigError, match=r"unknown Megatron symbol '-' at column 2; the legend"):
        Pattern.from_megatron("m-", legend)


@pytest.mark.parametrize(
    ("text", "sentence", "column"),
    [
        ("M-X", "unknown Megatron symbol 'X'", 3),
        ("2M", "unknown Megatron symbol '2'", 1),
        ("M-M*/ME/ME", "'/' and what follows it", 5),
        ("*||M", "empty segment before '|'", 3),
        ("|M", "empty segment before '|'", 1),
        ("M|", "empty segment after '|'", 2),
        ("", "empty", 1),
        ("M" * (MAX_PLACES + 1), "more than 100,000 places", MAX_PLACES + 1),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_megatron_mistake_points_into_the_megatron_text(
    text: str, sentence: str, column: int
) -> None:
    with pytest.raises(ConfigError) as caught:
        Pattern.from_megatron(text)
    first, line, caret = str(caught.value).split("\n")
    assert first.startswith(f"pattern: {sentence} at column {column}")
    assert line.removeprefix("  ").removeprefix("...") in text
    assert (line + " ")[len(caret) - 1] == (text + " ")[column - 1]


def test_megatron_prediction_heads_and_empty_stages_name_the_way_out() -> None:
    with pytest.raises(ConfigError, match="Pass what stands before it"):
        Pattern.from_megatron("M-/M")
    with pytest.raises(ConfigError, match=r"though Megatron allows none\. Drop this '\|'"):
        Pattern.from_megatron("M||M")


def test_what_megatron_cannot_say_is_refused_with_a_caret() -> None:
    with pytest.raises(ConfigError) as caught:
        Pattern.parse("2M 3[MA]").to_megatron()
    first, line, caret = str(caught.value).split("\n")
    assert first.startswith("pattern: parallel branches have no Megatron spelling at column 5")
    assert (line, caret) == ("  2M 3[MA]", "      ^")
    with pytest.raises(ConfigError, match=r"unmapped 'x' at column 4; .* M A F E G D L\."):
        Pattern.parse("2M x").to_megatron()


@pytest.mark.parametrize(
    ("symbol", "letter"), [("|", "M"), ("/", "M"), (" ", "M"), ("MM", "M"), ("M", "MM"), ("M", "é")]
)
def test_a_legend_that_cannot_work_is_refused(symbol: str, letter: str) -> None:
    for convert in (Pattern.from_megatron, lambda text, by: Pattern.parse(text).to_megatron(by)):
        with pytest.raises(ConfigError, match="Megatron legend maps"):
            convert("M", {symbol: letter})


def test_the_default_legend_maps_no_two_symbols_to_one_letter() -> None:
    assert len(set(MEGATRON_LEGEND.values())) == len(MEGATRON_LEGEND) == 7
