"""The layer pattern: one line of text that says which sublayer stands where in the stack.

pattern := segment ('|' segment)*     segment := term+     term := [count] atom
atom    := LETTER | '(' segment ')' | '[' LETTER LETTER+ ']'              spaces are free
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

from hybridzoo.errors import ConfigError

MAX_PLACES = 100_000
MEGATRON_LEGEND: Mapping[str, str] = dict(zip("M*-EGD+", "MAFEGDL", strict=True))

_BLANKS = frozenset(string.whitespace)
_LETTERS = frozenset(string.ascii_letters)
_SYMBOLS = frozenset(string.printable) - _BLANKS - {"|", "/"}
_COUNT = r"(?:(?P<count>[0-9]+)\s*)?"
_TERM = re.compile(_COUNT + r"(?P<atom>[A-Za-z(]|\[[A-Za-z\s]*\])", re.ASCII)
_BROKEN_TERM = re.compile(_COUNT + r"(?P<bracket>\[[A-Za-z\s]*)?", re.ASCII)
_WINDOW = 60
# the search for the shortest spelling is more than quadratic, and no stack in use is this deep
_SEARCH_LIMIT = 512
_HINTS = {
    **dict.fromkeys("*-+/", "Megatron's strings are read by Pattern.from_megatron"),
    **dict.fromkeys(",;:._{}<>", "spaces are free, places need no comma, a group is written ( )"),
}


@dataclass(frozen=True)
class Pattern:
    """A stack of residual sublayers, expanded, and the places where pipeline stages start.

    >>> Pattern.parse("2(M [MA]) | F").places
    (('M',), ('M', 'A'), ('M',), ('M', 'A'), ('F',))

    Attributes:
        text: the pattern as written, in the grammar that `parse` reads.
        places: one entry a residual sublayer: its letters, one a branch, so one unless in [..].
        cuts: indices into places where a new pipeline stage starts; increasing, never 0.
    """

    text: str
    places: tuple[tuple[str, ...], ...]
    cuts: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read a pattern.

        Raises:
            ConfigError: the text is not a pattern, or has over 100,000 places. The message points
                at the column, counted from 1 over the whole text; line breaks are shown as spaces.
        """
        _check_is_text(text)
        return cls(text, *_Reader(text, text).read())

    @classmethod
    def from_megatron(cls, text: str, legend: Mapping[str, str] | None = None) -> Pattern:
        """Read a hybrid pattern of Megatron-LM or Nemotron-H; its `text` is the compact spelling.

        >>> Pattern.from_megatron("M-M-M-M*-|ME").text
        '3(MF)MAF | ME'

        Args:
            text: one symbol a place; `|` cuts pipeline stages; spaces are free.
            legend: Megatron symbol -> letter, complete: it replaces MEGATRON_LEGEND.

        Raises:
            ConfigError: a symbol is not in the legend, a segment is empty, or there is a `/`.
        """
        _check_is_text(text)
        legend = _checked_legend(legend)
        for at, char in enumerate(text):
            if char == "/":
                rule = "multi-token prediction is no part of the stack. Pass what stands before it"
                raise _error(text, at, "'/' and what follows it", rule)
            if char not in legend and char not in _BLANKS and char != "|":
                rule = f"the legend has {' '.join(legend)}. Counts and ( ) [ ] are Pattern.parse's"
                raise _error(text, at, f"unknown Megatron symbol {_named(char)}", rule)
        # one symbol is one letter, so columns in the translation are columns in the text
        letters = "".join(legend.get(char, char) for char in text)
        pattern = cls(letters, *_Reader(letters, text).read())
        return replace(pattern, text=pattern.compact())

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
        """Split the places at the cuts: one entry a pipeline stage."""
        return tuple(self.places[a:b] for a, b in pairwise((0, *self.cuts, len(self.places))))

    def compact(self) -> str:
        """Spell the same places and cuts in the fewest characters, blanks round `|` aside.

        Equal stacks have equal spellings. A repeated unit over 512 places is spelled in full.

        >>> Pattern.parse("MF MF MF AF | MMM").compact()
        '3(MF)AF | 3M'
        """
        # one character a distinct place, so that the search runs on str's own find and startswith
        codes = {place: chr(i) for i, place in enumerate(dict.fromkeys(self.places))}
        names = {c: p[0] if len(p) == 1 else f"[{''.join(p)}]" for p, c in codes.items()}
        coded = ("".join(codes[place] for place in segment) for segment in self.segments())
        return " | ".join(_spell(segment, names, {}) for segment in coded)

    def to_megatron(self, legend: Mapping[str, str] | None = None) -> str:
        """Write the pattern as Megatron-LM reads it, such that `from_megatron` reads it back.

        >>> Pattern.parse("2(MF) AE | M").to_megatron()
        'M-M-*E|M'

        Args:
            legend: as in `from_megatron`; of several symbols for a letter the first is written.

        Raises:
            ConfigError: a place has parallel branches, or a letter has no symbol.
        """
        symbols = {letter: s for s, letter in reversed([*_checked_legend(legend).items()])}
        if any(len(place) > 1 for place in self.places):
            what = "parallel branches have no Megatron spelling"
            raise _error(self.text, self.text.index("["), what, "one symbol is one sublayer there")
        for letter in self.letters:
            if letter not in symbols:
                rule = f"the legend has symbols for {' '.join(reversed(symbols))}. Pass one with it"
                raise _error(self.text, self.text.index(letter), f"unmapped {letter!r}", rule)
        return "|".join("".join(symbols[c] for (c,) in segment) for segment in self.segments())


class _Reader:
    """One pass over the text with a stack of open groups, so that no nesting is too deep.

    All groups share one list of places, and closing a group repeats the list's tail in place: the
    work is linear in the text plus the places. Errors show `shown`, whose columns are the text's.
    """

    def __init__(self, text: str, shown: str) -> None:
        self.text, self.error = text, partial(_error, shown)
        self.places: list[tuple[str, ...]] = []
        self.cuts: list[int] = []
        # column of the term, column of its '(', count, first place
        self.groups: list[tuple[int, int, int, int]] = []

    def read(self) -> tuple[tuple[tuple[str, ...], ...], tuple[int, ...]]:
        at = 0
        while at < len(self.text):
            term = _TERM.match(self.text, at)
            if term:
                self.term(term)
            elif self.text[at] == "|":
                self.cut(at)
            elif self.text[at] == ")":
                self.close_group(at)
            elif self.text[at] not in _BLANKS:
                raise self.mistake(at)
            at = term.end() if term else at + 1
        if self.groups:
            raise self.error(self.groups[-1][1], "'(' is never closed", "write ')' where it ends")
        if not self.places:
            raise self.error(0, "empty", "write one letter or more")
        self.check_segment(self.text.rfind("|"), "after")
        return tuple(self.places), tuple(self.cuts)

    def term(self, term: re.Match[str]) -> None:
        at = term.start()
        # seven digits are already refused, and python does not convert thousands of them
        count = int((term["count"] or "1").lstrip("0")[:7] or "0")
        if not count:
            raise self.error(at, "count 0", "a count is at least 1")
        if term["atom"] == "(":
            self.groups.append((at, term.start("atom"), count, len(self.places)))
            return
        place = tuple(char for char in term["atom"] if char in _LETTERS)
        if term["atom"][0] == "[" and len(place) < 2:
            raise self.error(term.start("atom"), "[..] needs two letters or more", "add one")
        for i, char in enumerate(term["atom"]):
            if char in _LETTERS and char in term["atom"][:i]:
                raise self.error(term.start("atom") + i, f"{char!r} is twice in one [..]", "cut it")
        self.check_room(at, len(self.places) + count)
        self.places.extend([place] * count)

    def close_group(self, at: int) -> None:
        if not self.groups:
            raise self.error(at, "')' closes no '('", "drop it, or open the group")
        column, opened, count, start = self.groups.pop()
        if not (size := len(self.places) - start):
            raise self.error(opened, "empty group", "'(' and ')' hold one term or more")
        self.check_room(column, start + size * count)
        if count > 1:
            self.places.extend(self.places[start:] * (count - 1))

    def cut(self, at: int) -> None:
        if self.groups:
            what = "'|' cuts pipeline stages and is allowed at top level only"
            raise self.error(at, what, "close the group before it")
        self.check_segment(at, "before")
        self.cuts.append(len(self.places))

    def mistake(self, at: int) -> ConfigError:
        parts = _BROKEN_TERM.match(self.text, at)
        assert parts, "every part of the expression is optional"
        bad, char = parts.end(), self.text[parts.end() : parts.end() + 1]
        if parts["bracket"]:
            if not char:
                return self.error(parts.start("bracket"), "'[' is never closed", "add ']'")
            rule = _HINTS.get(char, "it holds letters only; a count goes before it")
            return self.error(bad, f"{_named(char)} inside [..]", rule)
        if parts["count"] and (not char or char in "|)]0123456789"):
            rule = "a count stands before a letter, '(' or '['"
            return self.error(at, "a count has nothing to repeat", rule)
        if char == "]":
            return self.error(bad, "']' closes no '['", "drop it, or open the bracket")
        rule = _HINTS.get(char, "a place is one letter A-Z a-z")
        return self.error(bad, f"unknown character {_named(char)}", rule)

    def check_room(self, at: int, n_places: int) -> None:
        if n_places > MAX_PLACES:
            raise self.error(at, f"more than {MAX_PLACES:,} places", "no stack is that deep")

    def check_segment(self, at: int, side: str) -> None:
        if len(self.places) == (self.cuts[-1] if self.cuts else 0):
            rule = "a stage here holds a place or more, though Megatron allows none. Drop this '|'"
            raise self.error(at, f"empty segment {side} '|'", rule)


def _spell(word: str, names: Mapping[str, str], known: dict[str, str]) -> str:
    # dynamic programme over prefixes: each ends in a place or in a repeated unit
    if word in known:
        return known[word]
    # a word recurs in its double first after the shortest word of which it is a power
    if (period := (word + word).find(word, 1)) < len(word):
        return _repeated(len(word) // period, period, _spell(word[:period], names, known))
    if len(word) > _SEARCH_LIMIT:
        return "".join(names[char] for char in word)
    best = [""]
    for stop in range(1, len(word) + 1):
        spellings = [best[stop - 1] + names[word[stop - 1]]]
        for length in range(1, stop // 2 + 1):
            start, unit = stop - length, word[stop - length : stop]
            # a unit that is a power is left to its root: one larger count is never longer
            if not word.endswith(unit, 0, start) or (unit + unit).find(unit, 1) < length:
                continue
            text = _spell(unit, names, known)
            while word.endswith(unit, 0, start):
                start -= length
                spellings.append(best[start] + _repeated((stop - start) // length, length, text))
        best.append(min(spellings, key=len))
    known[word] = best[-1]
    return best[-1]


def _repeated(count: int, length: int, text: str) -> str:
    return min(text * count, f"{count}{text}" if length == 1 else f"{count}({text})", key=len)


def _check_is_text(text: object) -> None:
    if not isinstance(text, str):
        rule = "YAML reads 48 as a number and [MA] as a list. Put the pattern in quotes."
        raise ConfigError(f"pattern: must be text, not {type(text).__name__}; {rule}")


def _checked_legend(legend: Mapping[str, str] | None) -> Mapping[str, str]:
    legend = MEGATRON_LEGEND if legend is None else legend
    for symbol, letter in legend.items():
        if symbol not in _SYMBOLS or letter not in _LETTERS:
            rule = "a symbol is one ASCII character but '|' and '/', a letter one of A-Z a-z"
            raise ConfigError(f"pattern: Megatron legend maps {symbol!r} to {letter!r}; {rule}.")
    return legend


def _named(char: str) -> str:
    # a look-alike (a dash, a Cyrillic M) or an invisible character is only told by its name
    return repr(char) if char.isascii() else f"{char!a} ({unicodedata.name(char, 'unnamed')})"


def _error(text: str, at: int, what: str, rule: str) -> ConfigError:
    """Point at text[at], inside a window of the text when it is long."""
    start = max(0, min(at - _WINDOW // 2, len(text) - _WINDOW))
    before, after = "..." * (start > 0), "..." * (start + _WINDOW < len(text))
    line = "".join(c if c.isprintable() else " " for c in text[start : start + _WINDOW])
    shown = f"  {before}{line}{after}\n  {' ' * (len(before) + at - start)}^"
    return ConfigError(f"pattern: {what} at column {at + 1}; {rule}.\n{shown}")
