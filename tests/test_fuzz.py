"""Files that strangers write, spoiled at random: taken, or refused in a line; nothing else.

The same targets run for as long as one likes under scripts/fuzz.py.
"""

import copy
import json
import resource
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybridzoo.checkpoint.convert import CONVERTERS
from tests.fuzzing import Target, targets

FUZZ = settings(
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# a first look always, a longer one in CI
AMOUNTS = pytest.mark.parametrize("amount", [30, pytest.param(400, marks=pytest.mark.slow)])
# what parsers trip over: edges of widths, numbers that are none, names that lead elsewhere
ODD = [0, 1, -1, 2, 3, 7, 2**31 - 1, 2**31, 2**40, 2**63, 2**64, 10**400, True, False, None]
ODD += [0.5, -0.0, 1e308, float("inf"), float("nan"), "", " ", "0", "null", "../x", "/etc/passwd"]
ODD += ["\0", "\ud800", "é", "a" * 300, "a\nb", "M", "9" * 30, "bytes", "mamba1", [], {}, [[]]]
ODD += [["M"], {"kind": "mlp"}, {"__float__": "Infinity"}, {"": None}]
VALUES = st.sampled_from(ODD) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)
# a value that went into a tree may be spoiled in its turn
VALUES = VALUES.map(copy.deepcopy)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory) -> dict[str, Target]:
    return targets(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(autouse=True)
def little_memory():
    """A GiB above what the process has now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        n_pages = int(file.read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (n_pages * resource.getpagesize() + 2**30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a tree of plain values."""
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    inner = [tree[key] for key in keys if isinstance(tree[key], dict | list)]
    return [(tree, key) for key in keys] + [place for one in inner for place in places(one)]


@st.composite
def spoiled(draw, tree: Any) -> Any:
    """A tree with one to three values replaced, dropped, renamed, repeated or moved."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        found = places(tree)
        if not found:
            return tree
        container, key = draw(st.sampled_from(found))
        match draw(st.sampled_from(["replace", "replace", "drop", "add", "move"])):
            case "replace":
                container[key] = draw(VALUES)
            case "drop":
                del container[key]
            case "move":
                other, place = draw(st.sampled_from(found))
                container[key] = copy.deepcopy(other[place])
            case "add" if isinstance(container, dict):
                container[draw(st.sampled_from(["x", "", "\ud800", "kind"]) | st.text())] = draw(
                    VALUES
                )
            case _:
                container.append(draw(VALUES))
    return tree


@st.composite
def cut_up(draw, content: bytes) -> bytes:
    """Bytes flipped, cut, repeated or thrown in between."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at, n = draw(st.integers(0, len(data))), draw(st.sampled_from([1, 1, 2, 8, 100]))
        match draw(st.sampled_from(["flip", "set", "cut", "drop", "repeat", "insert"])):
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "set":
                data[at : at + n] = draw(st.sampled_from([b"\0", b"\xff", b"9", b'"', b"["])) * n
            case "cut":
                del data[at:]
            case "drop":
                del data[at : at + n]
            case "repeat":
                data[at:at] = data[at : at + n]
            case _:
                data[at:at] = draw(st.binary(max_size=9) | st.sampled_from(TOKENS))
    return bytes(data)


TOKENS = [b"{", b"}", b"[", b"]", b",", b'"', b":", b"-", b"&a ", b"*a", b"!!python/object:os.x "]
TOKENS += [b"<<: ", b"\t", b"\r", b"\0", b"\xff", b"1e999", b"NaN", b"9" * 5000, b"[" * 5000]
TOKENS += [b'"\\ud800"', b"\xe2\x80\xa8", b"2001-99-99", b"?", b"|", b"---\n", b"%YAML 9\n"]


def as_json(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def as_yaml(tree: Any) -> bytes:
    return yaml.safe_dump(tree, allow_unicode=False).encode("utf-8", "replace")


def spoil_values(
    target: Target, amount: int, write: Callable[[Any], bytes], load: Callable[[bytes], Any]
) -> None:
    """Feed a target trees that differ from its seeds in some values."""
    taken = []

    @settings(FUZZ, max_examples=amount)
    @given(st.sampled_from([load(seed) for seed in target.seeds]).flatmap(spoiled))
    def feed(tree):
        try:
            content = write(tree)
        except yaml.YAMLError:
            return
        taken.append(target.feed(content) is None)

    feed()
    # both ends are reached, or the spoiler spoils nothing or everything
    assert amount < 100 or 0 < sum(taken) < len(taken), f"{sum(taken)} of {len(taken)} taken"


@AMOUNTS
@pytest.mark.parametrize("name", [*CONVERTERS, "native", "json", "index", "tokenizer"])
def test_json_of_other_values_is_taken_or_refused(fuzzed, name, amount):
    spoil_values(fuzzed[name], amount, as_json, json.loads)


@AMOUNTS
@pytest.mark.parametrize("name", ["yaml", "recipe"])
def test_yaml_of_other_values_is_taken_or_refused(fuzzed, name, amount):
    spoil_values(fuzzed[name], amount, as_yaml, yaml.safe_load)


@AMOUNTS
@pytest.mark.parametrize("name", ["shard", "golden"])
def test_header_of_other_values_is_taken_or_refused(fuzzed, name, amount):
    """The length before it and the bytes behind it are right."""
    seed = fuzzed[name].seeds[0]
    n = int.from_bytes(seed[:8], "little")

    def write(tree):
        text = as_json(tree)
        return len(text).to_bytes(8, "little") + text + seed[8 + n :]

    spoil_values(fuzzed[name], amount, write, lambda content: json.loads(content[8 : 8 + n]))


NAMES = ["pattern", "megatron", "yaml", "json", "recipe", "tokenizer", "index", "shard", "sums"]
NAMES += ["golden", "native", "pickle", *CONVERTERS]


@AMOUNTS
@pytest.mark.parametrize("name", NAMES)
def test_spoiled_bytes_are_taken_or_refused(fuzzed, name, amount):
    target = fuzzed[name]
    for seed in target.seeds:
        assert target.feed(seed) is None

    @settings(FUZZ, max_examples=amount)
    @given(st.sampled_from(target.seeds).flatmap(cut_up) | st.binary(max_size=64))
    def feed(content):
        target.feed(content)

    feed()


@pytest.mark.parametrize("name", ["json", "index", *CONVERTERS])
def test_key_given_twice_is_refused(fuzzed, name):
    target = fuzzed[name]
    text = target.seeds[0].decode()
    for key in json.loads(text):
        said = target.feed(text.replace("{", f'{{"{key}": 1, ', 1).encode())
        assert said is not None and f"the key {key} is given twice" in said


def test_every_target_is_fuzzed(fuzzed):
    assert set(NAMES) == set(fuzzed)
