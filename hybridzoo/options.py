"""A file becomes a mapping, a mapping a frozen dataclass, or one sentence says what is wrong."""

from __future__ import annotations

import difflib
import json
import math
import re
import reprlib
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from hybridzoo.errors import ConfigError

T = TypeVar("T")
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxstring, _SHORT.maxother = 2, 4, 80, 80
NO_LIMITS: Mapping[str, Any] = types.MappingProxyType({})
_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def read_options(cls: type[T], where: str, options: Any, *, of: str) -> T:
    """Build the dataclass `cls` from a mapping.

    Args:
        cls: a dataclass; its fields are the legal keys, its annotations the legal types.
        where: path of the mapping in the user's file, such as layers.M.
        options: what the file holds there.
        of: what the mapping describes, such as mamba2.

    Raises:
        ConfigError: not a mapping, an unknown or missing key, or a value of the wrong type or
            range.
    """
    dot = f"{where}." if where else ""
    if not isinstance(options, Mapping):
        raise ConfigError(
            f"{where or of}: expected keys of {of} ({shown(options)}); write a mapping of "
            "key: value."
        )
    legal = {f.name: f for f in fields(cls) if f.init}  # type: ignore[arg-type]
    for key in options:
        if key not in legal:
            raise ConfigError(
                f"{dot}{key} is not a key of {of}; {suggest(str(key), legal)}"
                f"its keys: {', '.join(legal)}."
            )
    hints = get_type_hints(cls)
    made = {}
    for name, f in legal.items():
        if name in options:
            made[name] = checked(f"{dot}{name}", options[name], hints[name], f.metadata)
        elif f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(
                f"{dot}{name} is missing; {of} needs it. "
                f"Add '{name}: ...' ({_describe(hints[name])})."
            )
    return cls(**made)


def read_file(path: str | Path) -> Any:
    """The plain values of a YAML or JSON file; ConfigError says which line is wrong."""
    path = Path(path)
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "no such file"
        raise ConfigError(
            f"{path}: {what}; a config or a recipe is a .yaml or .json file. Check the path "
            "(`hybridzoo list` names the configs)."
        )
    is_json = path.suffix == ".json"
    try:
        text = path.read_text(encoding="utf-8")
        if is_json:
            return json.loads(text, object_pairs_hook=unique)
        return yaml.load(text, _Loader)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 text (byte {error.start}); a config is text. Save it as UTF-8."
        ) from None
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}: not JSON at line {error.lineno} ({error.msg}). Mend that line."
        ) from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(
            f"{path}: not YAML at line {line} ({error.problem}). Mend that line."
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{path}: not YAML ({str(error).splitlines()[0]}). Save it as plain text."
        ) from None
    except (ValueError, RecursionError) as error:
        # an impossible date, a number of thousands of digits, a key given twice, endless nesting
        kind = "JSON" if is_json else "YAML"
        raise ConfigError(f"{path}: not {kind} that can be read ({error}). Mend it.") from None


def check_fields(where: str, instance: Any) -> None:
    """Raise ConfigError where a field of the dataclass `instance` has the wrong type or range."""
    hints = get_type_hints(type(instance))
    for f in fields(instance):
        checked(f"{where}.{f.name}", getattr(instance, f.name), hints[f.name], f.metadata)


def shown(value: Any) -> str:
    """`value` as a message shows it: short, even where a file holds a book, or aliases of it."""
    return _SHORT.repr(value)


def suggest(word: str, known: typing.Iterable[str]) -> str:
    """'did you mean ...? ' when a known word is near, else nothing."""
    words = list(known)
    # a word that differs in case alone is the nearest
    same = [k for k in words if k.lower() == word.lower()]
    near = same or difflib.get_close_matches(word, words, 1, 0.6)
    return f"did you mean {near[0]}? " if near else ""


def checked(where: str, value: Any, hint: Any, limits: Mapping[str, Any] = NO_LIMITS) -> Any:
    """`value` as the type `hint` wants it (lists become tuples), or ConfigError.

    Args:
        where: path of the value in the user's file.
        value: what the file holds there.
        hint: the field's annotation.
        limits: the field's metadata: "min" and "max". Whole numbers are counts and widths, from 1
            to 2**31 - 1 unless it says otherwise; numbers are finite unless "max" is infinity.
    """
    if hint is float:
        value = _number(value)
    origin, args = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        inner = [a for a in args if a is not type(None)]
        if len(inner) == 1:
            return checked(where, value, inner[0], limits)
        if any(_is_of(value, a) for a in inner):
            return value
    elif origin is Literal:
        if value in args and not isinstance(value, bool):
            return value
        legal = ", ".join(map(str, args))
        raise ConfigError(
            f"{where}: unknown choice ({shown(value)}); {suggest(shown(value), map(str, args))}"
            f"use one of: {legal}."
        )
    elif origin is tuple:
        if isinstance(value, (list, tuple)) and (args[-1] is Ellipsis or len(args) == len(value)):
            each = [args[0]] * len(value) if args[-1] is Ellipsis else args
            return tuple(checked(where, v, a, limits) for v, a in zip(value, each, strict=True))
    elif origin in (dict, Mapping) or hint in (dict, Any):
        if hint is Any or isinstance(value, Mapping):
            return value
    elif _is_of(value, hint):
        return _within(where, value, hint, limits) if hint in (int, float) else value
    raise ConfigError(
        f"{where}: wrong type ({shown(value)}); expected {_describe(hint)}. Change the value."
    )


def strict(value: Any) -> Any:
    """Plain values with the infinities, which JSON lacks, as {"__float__": "Infinity"}.

    transformers 5 writes them so; `checked` reads them back.
    """
    if isinstance(value, dict):
        return {k: strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(v) for v in value]
    words = (w for w, n in _FLOATS.items() if isinstance(value, float) and n == value)
    return next(({"__float__": word} for word in words), value)


def _number(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"__float__"}:
        return _FLOATS.get(str(value["__float__"]), value)
    return value


def _within(where: str, value: Any, hint: Any, limits: Mapping[str, Any]) -> Any:
    low, high = (1, 2**31 - 1) if hint is int else (-sys.float_info.max, sys.float_info.max)
    low, high = limits.get("min", low), limits.get("max", high)
    if low <= value <= high:
        return hint(value)
    if value != value or abs(value) == math.inf:
        what, way = f"not a finite number ({value}); it must be one", "Write a number"
    elif value < low:
        what, way = f"too small ({value}); it must be at least {low}", "Use a larger number"
    else:
        what, way = f"too large ({value}); it must be at most {high}", "Use a smaller number"
    raise ConfigError(f"{where}: {what}. {way}.")


def _is_of(value: Any, hint: Any) -> bool:
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    names = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        dict: "a mapping",
    }
    if hint in names:
        return names[hint]
    origin, args = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if a is type(None) else _describe(a) for a in args)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is tuple:
        return (
            f"a list of {_describe(args[0])}"
            if args[-1] is Ellipsis
            else f"a list of {len(args)} values"
        )
    return "a mapping" if origin in (dict, Mapping) else str(hint)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's pairs as a dict; ValueError where a key is given twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(k for i, (k, _) in enumerate(pairs) if k in dict(pairs[:i]))
        raise ValueError(f"the key {twice} is given twice")
    return made


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-5 as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            # a list as a key is refused by the base class
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else key_node
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key} is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
