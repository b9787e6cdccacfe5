"""The layer pattern: one line of text that says which sublayer stands where in the stack.

pattern := segment ('|' segment)*     segment := term+     term := [count] atom
atom    := LETTER | '(' segment ')' | '[' LETTER LETTER+ ']'              spaces are free
"""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import groupby, pairwise

from hybridzoo.errors import ConfigError

MAX_PLACES = 100_000
MEGATRON_LEGEND: Mapping[str, str] = {
    "M": "M",
    "*": "A",
    "-": "F",
    "E": "E",
    "G": "G",
    "D": "D",
    "+": "L",
}

_SPACES = frozenset(" \t\n\r\f\v")
_LETTERS = frozenset(string.ascii_letters)
_DIGITS = frozenset(string.digits)
_WINDOW = 60
# the search for the shortest spelling is quadratic or worse, and no stack in use is this deep
_SEARCH_LIMIT = 512

_STAGE_RULE = "a pipeline stage holds at least one place"
_MEGATRON_STAGE_RULE = (
    "Megatron allows a stage without layers, but here a cut is the index of a stage's first place. "
    "Drop this '|'"
)
_HINTS = {
    **dict.fromkeys("*-+/", "Megatron's strings are read by Pattern.from_megatron"),
    **dict.fromkeys(",;:._", "places need no separator, and spaces are free"),
    **dict.fromkeys("{}<>", "a group is written ( )"),
}


@dataclass(frozen=True)
class Pattern:
    """A stack of residual sublayers, expanded, and the places where pipeline stages start.

    >>> Pattern.parse("2(M [MA]) | F").places
    (('M',), ('M', 'A'), ('M',), ('M', 'A'), ('F',))

    Attributes:
        text: the pattern as written, in the grammar that `parse` reads.
        places: one entry a residual sublayer; its letters are the branches, one unless written [..].
        cuts: indices into places where a new pipeline stage starts; increasing, never 0.
    """

    text: str
    places: tuple[tuple[str, ...], ...]
    cuts: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read a pattern.

        Raises:
            ConfigError: the text is not a pattern, or has over 100,000 places; the message points at
                the column, counted from 1 over the whole text, with line breaks shown as spaces.
        """
        _check_is_text(text)
        reader = _Reader(text)
        reader.read()
        return cls(text, tuple(reader.places), tuple(reader.cuts))

    @classmethod
    def from_megatron(cls, text: str, legend: Mapping[str, str] | None = None) -> Pattern:
        """Read a hybrid pattern of Megatron-LM or Nemotron-H; its `text` is the compact spelling.

        >>> Pattern.from_megatron("M-M-M-M*-|ME").text
        '3(MF)MAF | ME'

        Args:
            text: one symbol a place; `|` cuts pipeline stages; spaces are free.
            legend: Megatron symbol -> letter, complete: it replaces MEGATRON_LEGEND.

        Raises:
            ConfigError: a symbol is not in the legend, a segment is empty, a `/` starts a
                multi-token-prediction block, or the legend itself cannot work.
        """
        _check_is_text(text)
        legend = _checked_legend(legend)
        places: list[tuple[str, ...]] = []
        cuts: list[int] = []
        for at, char in enumerate(text):
            if char in _SPACES:
                continue
            if char == "|":
                _cut(text, at, places, cuts, _MEGATRON_STAGE_RULE)
            elif char in legend:
                _check_room(text, at, len(places) + 1)
                places.append((legend[char],))
            else:
                raise _megatron_symbol_error(text, at, legend)
        _check_end(text, places, cuts, _MEGATRON_STAGE_RULE)
        return cls(_compact(places, cuts), tuple(places), tuple(cuts))

    @property
    def letters(self) -> tuple[str, ...]:
        """The distinct letters, in order of first use."""
        return tuple(dict.fromkeys(letter for place in self.places for letter in place))

    @property
    def n_segments(self) -> int:
        """How many pipeline stages the cuts ask for; 1 without a cut."""
        return len(self.cuts) + 1

    def __len__(self) -> int:
        """Count the places."""
        return len(self.places)

    def segments(self) -> tuple[tuple[tuple[str, ...], ...], ...]:
        """Split the places at the cuts."""
        return tuple(self.places[a:b] for a, b in pairwise((0, *self.cuts, len(self.places))))

    def compact(self) -> str:
        """Spell the same places and cuts in the fewest characters, blanks round `|` aside.

        Equal stacks have equal spellings. In a segment over 512 places the repeat of the whole is
        found, and inside its unit, if that is still longer, only runs of one place.

        >>> Pattern.parse("MF MF MF AF | MM").compact()
        '3(MF)AF | 2M'
        """
        return _compact(self.places, self.cuts)

    def to_megatron(self, legend: Mapping[str, str] | None = None) -> str:
        """Write the pattern as Megatron-LM reads it; the inverse of `from_megatron`.

        >>> Pattern.parse("2(MF) AE | M").to_megatron()
        'M-M-*E|M'

        Args:
            legend: Megatron symbol -> letter, complete: it replaces MEGATRON_LEGEND.

        Raises:
            ConfigError: a place has parallel branches, or a letter has no symbol, or has several.
        """
        symbols: dict[str, list[str]] = {}
        for symbol, letter in _checked_legend(legend).items():
            symbols.setdefault(letter, []).append(symbol)
        if any(len(place) > 1 for place in self.places):
            what = "parallel branches have no Megatron spelling"
            raise _error(self.text, self.text.index("["), what, "write them one after another")
        for letter in self.letters:
            if len(found := symbols.get(letter, [])) != 1:
                what = f"{letter!r} has {' and '.join(map(repr, found)) or 'no Megatron symbol'}"
                rule = "pass a legend, symbol to letter, that gives each letter one symbol"
                raise _error(self.text, self.text.index(letter), what, rule)
        return "|".join("".join(symbols[c][0] for (c,) in part) for part in self.segments())


class _Reader:
    """One pass over the text with a stack of open groups, so that no nesting is too deep.

    All groups share one list of places: closing a group repeats the list's tail in place, which
    keeps the work linear in the text plus the places.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.places: list[tuple[str, ...]] = []
        self.cuts: list[int] = []
        self.groups: list[tuple[int, int, int, int]] = []  # (term column, '(' column, count, start)

    def read(self) -> None:
        while char := self.peek():
            if char == "|":
                self.cut()
            elif char == ")":
                self.close_group()
            else:
                self.term()
        if self.groups:
            raise _error(self.text, self.groups[-1][1], "'(' is never closed")
        _check_end(self.text, self.places, self.cuts, _STAGE_RULE)

    def peek(self) -> str:
        """Skip spaces; the next character, or "" at the end."""
        while self.at < len(self.text) and self.text[self.at] in _SPACES:
            self.at += 1
        return self.text[self.at : self.at + 1]

    def term(self) -> None:
        column = self.at
        count = self.count()
        char, at = self.peek(), self.at
        self.at += 1
        if char in _LETTERS:
            self.repeat(column, count, (char,))
        elif char == "(":
            self.groups.append((column, at, count, len(self.places)))
        elif char == "[":
            self.repeat(column, count, self.branches(at))
        elif column != at and (char in "|)]" or char in _DIGITS):
            rule = "a count stands before a letter, '(' or '['"
            raise _error(self.text, column, f"count {count} has nothing to repeat", rule)
        elif char == "]":
            raise _error(self.text, at, "']' closes no '['")
        else:
            raise _unknown(self.text, at)

    def count(self) -> int:
        start = self.at
        while self.text[self.at : self.at + 1] in _DIGITS:
            self.at += 1
        if start == self.at:
            return 1
        digits = self.text[start : self.at].lstrip("0")
        if not digits:
            raise _error(self.text, start, "count 0", "a count is at least 1")
        # python refuses to convert very long digit strings, so the length is checked first
        _check_room(self.text, start, MAX_PLACES + 1 if len(digits) > 6 else int(digits))
        return int(digits)

    def branches(self, opened: int) -> tuple[str, ...]:
        letters: list[str] = []
        while (char := self.peek()) in _LETTERS:
            if char in letters:
                raise _error(self.text, self.at, f"{char!r} is twice in one [..]")
            letters.append(char)
            self.at += 1
        if not char:
            raise _error(self.text, opened, "'[' is never closed")
        if char in _DIGITS or char in "([|)":
            rule = "it holds letters only, and a count goes before it"
            raise _error(self.text, self.at, f"{char!r} inside [..]", rule)
        if char != "]":
            raise _unknown(self.text, self.at)
        if len(letters) < 2:
            rule = "one letter alone needs no brackets"
            raise _error(self.text, opened, "[..] needs two letters or more", rule)
        self.at += 1
        return tuple(letters)

    def repeat(self, column: int, count: int, place: tuple[str, ...]) -> None:
        _check_room(self.text, column, len(self.places) + count)
        self.places.extend([place] * count)

    def close_group(self) -> None:
        if not self.groups:
            raise _error(self.text, self.at, "')' closes no '('")
        column, opened, count, start = self.groups.pop()
        size = len(self.places) - start
        if not size:
            raise _error(self.text, opened, "empty group", "'(' and ')' hold one term or more")
        _check_room(self.text, column, start + size * count)
        self.places.extend(self.places[start:] * (count - 1))
        self.at += 1

    def cut(self) -> None:
        if self.groups:
            what = "'|' cuts pipeline stages and is allowed at top level only"
            raise _error(self.text, self.at, what)
        _cut(self.text, self.at, self.places, self.cuts, _STAGE_RULE)
        self.at += 1


def _compact(places: Sequence[tuple[str, ...]], cuts: Sequence[int]) -> str:
    # one character a distinct place, so that the search runs on str's own find and startswith
    codes = {place: chr(i) for i, place in enumerate(dict.fromkeys(places))}
    names = {c: p[0] if len(p) == 1 else f"[{''.join(p)}]" for p, c in codes.items()}
    coded = "".join(codes[place] for place in places)
    bounds = pairwise((0, *cuts, len(coded)))
    return " | ".join(_spell(coded[start:stop], names) for start, stop in bounds)


def _spell(segment: str, names: Mapping[str, str]) -> str:
    if len(segment) <= _SEARCH_LIMIT:
        return _shortest(segment, names, {})
    unit = segment[: _period(segment)]
    if len(unit) <= _SEARCH_LIMIT:
        return _counted(len(segment) // len(unit), unit, _shortest(unit, names, {}))
    runs = [(char, len(list(run))) for char, run in groupby(unit)]
    text = "".join(_counted(n, char, names[char]) if n > 1 else names[char] for char, n in runs)
    return _counted(len(segment) // len(unit), unit, text) if unit != segment else text


def _period(unit: str) -> int:
    """Length of the shortest word of which `unit` is a power."""
    return (unit + unit).find(unit, 1)


def _counted(count: int, unit: str, text: str) -> str:
    return f"{count}{text}" if len(unit) == 1 else f"{count}({text})"


def _shortest(segment: str, names: Mapping[str, str], known: dict[str, str]) -> str:
    """Dynamic programme over prefixes: a prefix ends in a place or in a repeated unit.

    A unit that is itself a power is left out, because one larger count is never longer. Between
    spellings of one length the one with fewer terms wins, then the first found.
    """
    if segment in known:
        return known[segment]
    size = len(segment)
    best = [(0, 0, "")] + [(size * max(map(len, names.values())) + 1, 0, "")] * size

    def offer(start: int, stop: int, term: str) -> None:
        _, n_terms, text = best[start]
        spelling = (len(text) + len(term), n_terms + 1, text + term)
        if spelling[:2] < best[stop][:2]:
            best[stop] = spelling

    for start in range(size):
        offer(start, start + 1, names[segment[start]])
        for length in range(1, (size - start) // 2 + 1):
            unit = segment[start : start + length]
            stop = start + 2 * length
            if not segment.startswith(unit, start + length) or _period(unit) < length:
                continue
            text = _shortest(unit, names, known)
            while True:
                offer(start, stop, _counted((stop - start) // length, unit, text))
                if not segment.startswith(unit, stop):
                    break
                stop += length
    known[segment] = best[size][2]
    return known[segment]


def _check_is_text(text: object) -> None:
    if not isinstance(text, str):
        raise ConfigError(
            f"pattern: must be text, not {type(text).__name__}; "
            "YAML reads 48 as a number and [MA] as a list. Put the pattern in quotes."
        )


def _check_room(text: str, at: int, n_places: int) -> None:
    if n_places > MAX_PLACES:
        raise _error(text, at, f"more than {MAX_PLACES:,} places", "lower a count")


def _cut(text: str, at: int, places: Sized, cuts: list[int], rule: str) -> None:
    if len(places) == (cuts[-1] if cuts else 0):
        raise _error(text, at, "empty segment before '|'", rule)
    cuts.append(len(places))


def _check_end(text: str, places: Sized, cuts: list[int], rule: str) -> None:
    if not places:
        raise _error(text, 0, "empty", "write one letter or more")
    if cuts and cuts[-1] == len(places):
        raise _error(text, text.rindex("|"), "empty segment after '|'", rule)


def _checked_legend(legend: Mapping[str, str] | None) -> Mapping[str, str]:
    if legend is None:
        return MEGATRON_LEGEND
    for symbol, letter in legend.items():
        if not isinstance(symbol, str) or len(symbol) != 1 or symbol in "|/" or symbol in _SPACES:
            rule = "a symbol is one character, and not '|', '/' or a blank"
        elif letter not in _LETTERS:
            rule = "a letter is one of A-Z a-z"
        else:
            continue
        raise ConfigError(f"pattern: Megatron legend maps {symbol!r} to {letter!r}; {rule}.")
    return legend


def _megatron_symbol_error(text: str, at: int, legend: Mapping[str, str]) -> ConfigError:
    if text[at] == "/":
        rule = (
            "it starts a multi-token-prediction block, no part of the stack. Pass what precedes it"
        )
        return _error(text, at, "'/'", rule)
    rule = f"the legend has {' '.join(legend)}. Counts, ( ) and [ ] are read by Pattern.parse"
    return _error(text, at, f"unknown Megatron symbol {_named(text[at])}", rule)


def _unknown(text: str, at: int) -> ConfigError:
    rule = _HINTS.get(text[at], "a place is one letter A-Z a-z")
    return _error(text, at, f"unknown character {_named(text[at])}", rule)


def _named(char: str) -> str:
    # a look-alike (a dash, a Cyrillic M) or an invisible character is only told by its name
    return repr(char) if char.isascii() else f"{char!a} ({unicodedata.name(char, 'unnamed')})"


def _error(text: str, at: int, what: str, rule: str = "") -> ConfigError:
    """Point at text[at], inside a window of the text when it is long."""
    start = max(0, min(at - _WINDOW // 2, len(text) - _WINDOW))
    stop = start + _WINDOW
    window = "".join(
        " " if c in _SPACES else c if c.isprintable() else "?" for c in text[start:stop]
    )
    before, after = "..." if start else "", "..." if stop < len(text) else ""
    sentence = f"pattern: {what} at column {at + 1}" + (f"; {rule}." if rule else "")
    caret = " " * (len(before) + at - start) + "^"
    return ConfigError(f"{sentence}\n  {before}{window}{after}\n  {caret}")
