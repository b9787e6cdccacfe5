"""Messages: one printable line whatever a file's author wrote, and a pattern's caret below it."""

import pytest

from hybridzoo.errors import ConfigError
from hybridzoo.pattern import Pattern


@pytest.mark.parametrize(
    "name, shown",
    [
        ("plain é 日本", "plain é 日本"),
        ("\x1b[2J", r"\x1b[2J"),
        ("a\nb", r"a\nb"),
        ("a\n  b", r"a\n  b"),
        ("a\n  b\n  ^", r"a\n  b\n  ^"),
        ("\ud800", r"\ud800"),
        ("\u202e\u2028", r"\u202e\u2028"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(name, shown):
    message = str(ConfigError(f"model.yaml: {name} is not a key. Remove it."))
    assert message == f"model.yaml: {shown} is not a key. Remove it."


def test_long_middle_is_left_out():
    message = str(ConfigError(f"model.yaml: {'x' * 10**6} is not a key. Remove it."))
    assert len(message) < 600
    assert message.startswith("model.yaml: xxx") and message.endswith(
        "xxx is not a key. Remove it."
    )


def test_pattern_keeps_its_line_and_caret_when_a_path_comes_in_front():
    with pytest.raises(ConfigError) as caught:
        Pattern.parse("M" * 200 + "-")
    message = str(caught.value)
    assert [line[:2] for line in message.split("\n")[1:]] == ["  ", "  "]
    assert str(ConfigError(f"model.yaml: {message}")) == f"model.yaml: {message}"
