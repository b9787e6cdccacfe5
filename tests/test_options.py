"""options: values are what their annotations say, or one sentence says why not."""

# tables read as rows: one case a line
# ruff: noqa: E501

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from hybridzoo.errors import ConfigError
from hybridzoo.options import check_fields, checked, read_file, read_options, suggest


@dataclass(frozen=True)
class Oven:
    heat: int
    grams: float = 1.5
    shelf: int = field(default=0, metadata={"min": 0, "max": 3})
    name: str = "oven"
    fan: bool = False
    mode: Literal["bake", "grill"] = "bake"
    sizes: tuple[int, ...] = ()
    span: tuple[float, float] = field(default=(0.0, math.inf), metadata={"max": math.inf})
    door: int | None = None
    cake: int | str = 1
    extra: dict[str, Any] = field(default_factory=dict)


def read(**options):
    return read_options(Oven, "kitchen.A", {"heat": 5} | options, of="oven")


def test_values_arrive_as_their_types():
    oven = read(grams=2, sizes=[3, 4], span=[1, 2.5], door=None, cake="plum", extra={"a": [1]})
    assert oven == Oven(5, 2.0, sizes=(3, 4), span=(1.0, 2.5), cake="plum", extra={"a": [1]})
    assert isinstance(oven.grams, float)
    assert read(span=[0, math.inf]).span == (0.0, math.inf)
    assert read(shelf=0).shelf == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"gramms": 1}, "kitchen.A.gramms is not a key of oven; did you mean grams? its keys: heat, grams, shelf, name, fan, mode, sizes, span, door, cake, extra."),
        ({7: 1}, "kitchen.A.7 is not a key of oven; its keys: heat,"),
        ({"heat": 0}, "kitchen.A.heat: too small (0); it must be at least 1. Use a larger number."),
        ({"heat": 2**40}, "kitchen.A.heat: too large (1099511627776); it must be at most 2147483647. Use a smaller number."),
        ({"heat": 10**400}, "kitchen.A.heat: too large (1000"),
        ({"heat": True}, "kitchen.A.heat: wrong type (True); expected a whole number. Change the value."),
        ({"heat": 2.0}, "kitchen.A.heat: wrong type (2.0); expected a whole number."),
        ({"heat": None}, "kitchen.A.heat: wrong type (None); expected a whole number."),
        ({"shelf": 4}, "kitchen.A.shelf: too large (4); it must be at most 3."),
        ({"shelf": -1}, "kitchen.A.shelf: too small (-1); it must be at least 0."),
        ({"grams": "1e-5x"}, "kitchen.A.grams: wrong type ('1e-5x'); expected a number."),
        ({"grams": math.nan}, "kitchen.A.grams: not a finite number (nan); it must be one. Write a number."),
        ({"grams": math.inf}, "kitchen.A.grams: not a finite number (inf); it must be one."),
        ({"span": [0, math.nan]}, "kitchen.A.span: not a finite number (nan); it must be one."),
        ({"grams": 10**400}, "kitchen.A.grams: too large (1000"),
        ({"name": 3}, "kitchen.A.name: wrong type (3); expected text."),
        ({"fan": "yes"}, "kitchen.A.fan: wrong type ('yes'); expected true or false."),
        ({"mode": "grlil"}, "kitchen.A.mode: unknown choice ('grlil'); did you mean grill? use one of: bake, grill."),
        ({"mode": ["bake"]}, "kitchen.A.mode: unknown choice (['bake']); did you mean bake? use one of: bake, grill."),
        ({"sizes": 3}, "kitchen.A.sizes: wrong type (3); expected a list of a whole number."),
        ({"sizes": [3, 0]}, "kitchen.A.sizes: too small (0); it must be at least 1."),
        ({"span": [1]}, "kitchen.A.span: wrong type ([1]); expected a list of 2 values."),
        ({"door": "x"}, "kitchen.A.door: wrong type ('x'); expected a whole number."),
        ({"cake": 1.5}, "kitchen.A.cake: wrong type (1.5); expected a whole number or text."),
        ({"extra": []}, "kitchen.A.extra: wrong type ([]); expected a mapping."),
    ],
)  # fmt: skip
def test_a_wrong_value_is_one_sentence(options, sentence):
    with pytest.raises(ConfigError) as error:
        read_options(Oven, "kitchen.A", {"heat": 5} | options, of="oven")
    assert str(error.value).startswith(sentence)


def test_a_missing_key_is_named_with_its_type():
    with pytest.raises(ConfigError) as error:
        read_options(Oven, "", {}, of="oven")
    assert str(error.value) == "heat is missing; oven needs it. Add 'heat: ...' (a whole number)."


def test_what_is_no_mapping_is_refused():
    with pytest.raises(
        ConfigError, match=r"^oven: expected keys of oven \(\[1\]\); write a mapping"
    ):
        read_options(Oven, "", [1], of="oven")


def test_a_dataclass_made_in_python_is_checked_too():
    check_fields("oven", Oven(3))
    with pytest.raises(ConfigError, match=r"^oven\.heat: too small \(-3\)"):
        check_fields("oven", Oven(-3))
    with pytest.raises(ConfigError, match=r"^x: wrong type \('a'\); expected a whole number"):
        checked("x", "a", int)


def test_suggestions_are_near_or_absent():
    assert suggest("n_head", ["n_heads", "top_k"]) == "did you mean n_heads? "
    assert suggest("zzz", ["n_heads", "top_k"]) == ""
    assert suggest("d_state", ["d_ff", "gated"]) == ""


def write(folder, content, name="a.yaml"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_yaml_and_json_are_read(tmp_path):
    assert read_file(write(tmp_path, "a: 1e-5\nb: {c: [1, 2.5e+3]}\nd: -1E6\ne: 1.\n")) == {
        "a": 1e-5, "b": {"c": [1, 2500.0]}, "d": -1e6, "e": 1.0,
    }  # fmt: skip
    assert read_file(write(tmp_path, '{"a": 1e-5, "b": null}', "a.json")) == {"a": 1e-5, "b": None}
    assert read_file(write(tmp_path, "")) is None
    # neither a number: text stays text
    assert read_file(write(tmp_path, "a: 1e-5x\nb: e5\nc: '1e5'")) == {
        "a": "1e-5x",
        "b": "e5",
        "c": "1e5",
    }


@pytest.mark.parametrize(
    ("content", "name", "sentence"),
    [
        ("a: 1\nb: 2\na: 3\n", "a.yaml", "not YAML at line 3 (the key a is given twice). Mend that line."),
        ("a:\n  b: 1\n  b: 2\n", "a.yaml", "not YAML at line 3 (the key b is given twice). Mend that line."),
        ("a:\n\tb: 1\n", "a.yaml", "not YAML at line 2 (found character '\\t' that cannot start any token)."),
        ("a: [1,\n", "a.yaml", "not YAML at line 2 ("),
        ("a: !!python/object:os.system x\n", "a.yaml", "not YAML at line 1 (could not determine a constructor"),
        ("{[1]: 2}", "a.yaml", "not YAML at line 1 (found unhashable key)"),
        ("a: 2026-13-45\n", "a.yaml", "not YAML that can be read (month must be in 1..12). Mend it."),
        ("[" * 9999, "a.yaml", "not YAML that can be read (maximum recursion depth exceeded"),
        ("a: " + "1" * 5000, "a.yaml", "not YAML that can be read (Exceeds the limit"),
        ("a: *b\n", "a.yaml", "not YAML at line 1 (found undefined alias 'b'). Mend that line."),
        (b"\x80\x81\x00", "a.yaml", "not UTF-8 text (byte 0); a config is text. Save it as UTF-8."),
        (b"a: \x00\x01", "a.yaml", "not YAML ("),
        ('{"a": 1,}', "a.json", "not JSON at line 1 ("),
        ('{"b": {"a": 1, "a": 2}}', "a.json", "not JSON that can be read (the key a is given twice). Mend it."),
        ("a: 1", "a.json", "not JSON at line 1 (Expecting value)."),
    ],
)  # fmt: skip
def test_a_broken_file_is_one_sentence(tmp_path, content, name, sentence):
    path = write(tmp_path, content, name)
    with pytest.raises(ConfigError) as error:
        read_file(path)
    assert str(error.value).startswith(f"{path}: {sentence}")
    assert "\n" not in str(error.value)


def test_a_missing_file_or_a_folder_is_one_sentence(tmp_path):
    rule = r"; a config or a recipe is a \.yaml or \.json file\. Check the path \(`hybridzoo list` "
    for path, what in ((tmp_path, "is a directory"), (tmp_path / "no.yaml", "no such file")):
        with pytest.raises(ConfigError, match=what + rule):
            read_file(path)


def test_merge_keys_and_anchors_work(tmp_path):
    text = "base: &b {x: 1, y: 2}\nother:\n  <<: *b\n  y: 3\n"
    assert read_file(write(tmp_path, text))["other"] == {"x": 1, "y": 3}
